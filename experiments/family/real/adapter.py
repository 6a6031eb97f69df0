"""What a trained member adds to packages' weights, as a folder of LLaVA's `finetune_lora` scripts.

adapter_model.safetensors and adapter_config.json are PEFT's, non_lora_trainables.safetensors holds
the projector, config.json names the tower; `converters.load` reads it with `base` and `towers`.
"""

import re
from pathlib import Path

import flax.nnx as nnx
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from converters.export import to_bytes
from converters.files.names import ADAPTER, EXTRA, SETTINGS
from converters.origin import origin_of
from vfjax import InputError, Model
from vfjax.atomic import JSON, temporary
from vfjax.train.optim import name_of

BASE = "SmolLM2-135M-Instruct"

LAYERS = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
"""Dense layers of a Llama's block: here -> in transformers."""

ADAPTED = re.compile(r"llm/blocks/(\d+)/(\w+/\w+)/([ab])")
PROJECTED = re.compile(r"branches/\w+/connector/projector/layers/(\d+)/(kernel|bias)")
START = "base_model.model.model."


def save(model: Model, folder: Path, *, base: str, tower: str, rank: int, alpha: float) -> None:
    """Writes a member's adapters and projector, rounded to bfloat16.

    Args:
        model: of `experiments.family.members.make`, adapters not merged.
        folder: to make.
        base: the LLM's name, which `towers` of `converters.load` gives a folder; so for the next.
        tower: the vision tower's.
        rank: of the adapters.
        alpha: their scale times the rank.

    Raises:
        InputError: the model has no adapters, or `folder` exists.
    """
    adapters, projector, layers = {}, {}, set()
    for path, param in nnx.to_flat_state(nnx.state(model)):
        name = name_of(path)
        value = np.asarray(jax.device_get(param.get_value()))
        if found := ADAPTED.fullmatch(name):
            block, layer, factor = found.groups()
            to = f"{START}layers.{block}.{LAYERS[layer]}.lora_{factor.upper()}.weight"
            adapters[to] = _stored(value.T)
            layers.add(LAYERS[layer].split(".")[-1])
        elif found := PROJECTED.fullmatch(name):
            number, kind = found.groups()
            kind = "weight" if kind == "kernel" else kind
            to = f"{START}mm_projector.{2 * int(number)}.{kind}"  # an activation lies between two
            projector[to] = _stored(value.T)
    if not adapters or folder.exists():
        raise InputError(
            folder,
            found="a folder" if adapters else "a model without adapters",
            expected="a member, and a new folder",
            fix="remove it" if adapters else "train one",
        )
    settings: JSON = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers),
    }
    config: JSON = {
        **origin_of(model).config,
        "_name_or_path": base,
        "mm_vision_tower": tower,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary(folder.parent, f".{folder.name}") as made:
        out = made / "member"
        out.mkdir()
        (out / SETTINGS).write_bytes(to_bytes(settings))
        (out / "config.json").write_bytes(to_bytes(config))
        for stem, tensors in ((ADAPTER, adapters), (EXTRA, projector)):
            safetensors.numpy.save_file(tensors, out / f"{stem}.safetensors")
        out.rename(folder)


def _stored(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).astype(ml_dtypes.bfloat16)
