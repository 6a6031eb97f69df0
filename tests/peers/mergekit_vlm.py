"""Records what mergekit 0.1.5 makes of Qwen2.5-VL folders: whole models, modules, bases, gradients.

In the environment of tests/peers/mergekit.py:

    mk/bin/python tests/peers/mergekit_vlm.py tests/data/mergekit_vlm.npz

mergekit knows the names of few multimodal LLMs; of others, LLaVA's among them, it leaves the LLM
out (findings/mergekit_vlm_without_llm.sh). The file holds `cases`, JSON: case -> `yaml`, `names`
(of all tensors that were written), or `error`; and CASE/TENSOR of those in `STORED`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
MEMBERS = {"base": 0.0, "a": 0.03, "b": 0.03}
"""Folder -> how far its weights lie from the base's."""
STORED = (
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
    "visual.blocks.0.attn.proj.weight",
    "visual.blocks.1.mlp.up_proj.bias",
    "visual.blocks.2.mlp.up_proj.bias",
    "visual.merger.ln_q.weight",
    "visual.merger.mlp.2.bias",
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
VISION = {
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 40,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "fullatt_block_indexes": [1],
}


def write(root: Path, base: Path, load: Callable, save: Callable) -> None:
    """Makes the folders, each a copy of one with other weights.

    Args:
        root: where.
        base: a folder of Qwen2.5-VL of the sizes here; its weights do not count.
        load: file -> name -> array.
        save: (name -> float32 array, file) -> written.
    """
    shapes = {name: x.shape for name, x in load(str(base / "model.safetensors")).items()}
    for folder in MEMBERS:
        (root / folder).mkdir(parents=True)
        for file in base.iterdir():
            if file.suffix != ".safetensors":
                (root / folder / file.name).write_bytes(file.read_bytes())
        save(tensors(folder, shapes), str(root / folder / "model.safetensors"))


def tensors(folder: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Float32 tensors of a folder."""
    found = {}
    for name, shape in sorted(shapes.items()):
        base = np.random.default_rng([*name.encode()])
        own = np.random.default_rng([*f"{folder} {name}".encode()])
        start = base.standard_normal(shape) * 0.1 + (len(shape) == 1)
        found[name] = (start + MEMBERS[folder] * own.standard_normal(shape)).astype(np.float32)
    return found


def models(**weights: object) -> list[dict]:
    """Models with a weight each."""
    return [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]


def cases() -> dict[str, dict]:
    """Recipes."""
    curve = [{"filter": "attn", "value": [0, 1]}, {"value": [0.2, 0.8]}]
    parts = {
        "text_decoder": {"models": models(a=0.3, b=0.7)},
        "vision_tower": {"models": models(a=0.9, b=0.1)},
        "multi_modal_projector": {"models": models(a=0.5, b=0.5)},
    }
    trimmed = {
        "text_decoder": {"models": models(a=0.6, b=0.4), "parameters": {"density": 0.4}},
        "vision_tower": {"models": models(a=[0, 1], b=[1, 0]), "parameters": {"density": 0.8}},
        "multi_modal_projector": {"models": models(a=1.0, b=0.5), "parameters": {"density": 1.0}},
    }
    stacked = {
        "text_decoder": {
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 2]}]},
                {"sources": [{"model": "b", "layer_range": [1, 2]}]},
            ]
        },
        "vision_tower": {"models": [{"model": "a"}]},
        "multi_modal_projector": {"models": [{"model": "b"}]},
    }
    f32 = {"dtype": "float32"}
    task = {"base_model": "base", **f32}
    return {
        "linear": {"merge_method": "linear", "models": models(a=0.4, b=0.6), **f32},
        "modules": {"merge_method": "linear", "modules": parts, **f32},
        "task": {"merge_method": "task_arithmetic", "modules": parts, **task},
        "ties": {"merge_method": "ties", "modules": trimmed, **task},
        "slerp": {
            "merge_method": "slerp",
            "models": [{"model": "a"}, {"model": "b"}],
            "parameters": {"t": curve},
            "base_model": "a",
            **f32,
        },
        "stacked": {"merge_method": "passthrough", "modules": stacked, **f32},
        "half": {
            "merge_method": "linear",
            "modules": {"text_decoder": {"models": models(a=0.5, b=0.5)}},
            **f32,
        },
    }


def folder(path: Path) -> None:
    """A folder of transformers' with the sizes that the cases are about."""
    import transformers

    ids = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, **ids}, vision_config=VISION)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)


def main(target: Path) -> None:
    """Runs all cases; prints what fails."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.remove(str(Path(__file__).resolve().parent))  # where mergekit.py is
    import torch
    import yaml
    from mergekit.architecture import ConfiguredModuleArchitecture
    from mergekit.architecture.base import ConfiguredModelArchitecture
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.numpy import load_file, save_file

    for model in (ConfiguredModuleArchitecture, ConfiguredModelArchitecture):
        model.model_rebuild(force=True, _types_namespace={"torch": torch})
    torch.set_num_threads(1)
    facts: dict[str, dict] = {}
    arrays: Arrays = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folder(root / "like")
        write(root, root / "like", load_file, lambda x, f: save_file(x, f, {"format": "pt"}))
        os.chdir(root)
        for case, given in cases().items():
            LoaderCache().loaders.clear()
            text = yaml.safe_dump(given, sort_keys=False)
            fact = facts[case] = {"yaml": text}
            options = MergeOptions(write_model_card=False, quiet=True, copy_tokenizer=False)
            try:
                made = MergeConfiguration.model_validate(yaml.safe_load(text))
                run_merge(made, str(root / "out" / case), options)
            except Exception as error:
                fact["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(case, fact["error"])
                continue
            (file,) = (root / "out" / case).glob("*.safetensors")
            found = load_file(file)
            fact["names"] = sorted(found)
            stored = (*STORED, "model.layers.2.self_attn.q_proj.bias")  # where layers are stacked
            arrays |= {f"{case}/{x}": found[x] for x in stored if x in found}
    arrays["cases"] = np.array(json.dumps(facts))
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
