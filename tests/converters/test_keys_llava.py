"""Each key of LlavaConfig and LlavaNextConfig, mutated by itself, beside transformers.

As in test_keys.py, with a picture in the prompt. A section is read as a folder of its own would be,
which is compared there; a few of its keys are compared here again, inside the model.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.initialization import no_init_weights

import converters
from converters import open_source
from converters.formats.llava_next import PINPOINTS
from converters.load import model_config
from converters.registry import TABLES
from tests.checkpoints import preprocessor, randomize, write_json
from tests.keys import HIDDEN, UNTRIED, WIDEST, mutations, same, show
from vfjax import InputError
from vfjax.model import ModelConfig

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration, {}),
    "llava_next": (
        transformers.LlavaNextConfig,
        transformers.LlavaNextForConditionalGeneration,
        {"image_grid_pinpoints": [[12, 24], [24, 12]]},
    ),
}
"""`model_type` -> transformers' classes, keys beside the sections."""

OTHERS: dict[str, tuple[Any, ...]] = {
    "hidden_size": (32,),
    "ignore_index": (-1,),
    "image_aspect_ratio": ("anyres",),
    "mm_projector_type": ("linear",),
    "pad_token_id": (3,),
    "use_image_newline_parameter": (True, False),
    "vocab_size": (80,),
}
"""Keys at the top that no class has, beside `HIDDEN`."""

SECTIONS = ("text_config", "vision_config")

COMPARED = {
    "llava": {
        "text_config": ("num_attention_heads", "rms_norm_eps", "tie_word_embeddings"),
        "vision_config": ("hidden_size", "layer_norm_eps", "num_hidden_layers"),
    },
    "llava_next": {
        "text_config": ("tie_word_embeddings",),
        "vision_config": ("patch_size",),
    },
}
"""Keys of sections whose logits are compared, too."""


def every(config_class: Any, base: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(Section or "", key, another value) of all keys."""
    top = {key: value for key, value in base.items() if key not in SECTIONS}
    for key, value in mutations(config_class, top):
        if key not in SECTIONS and (key, value) != ("image_grid_pinpoints", None):
            yield "", key, value  # null: the default's canvases, too large for these sizes
    for key in sorted(OTHERS.keys() - top.keys() - HIDDEN.keys()):
        yield from (("", key, value) for value in OTHERS[key])
    yield from (("", "vision_feature_layer", value) for value in ([-1], [-2, -1], 0, 1))
    for section in SECTIONS:
        kind = type(getattr(config_class(**{section: base[section]}), section))
        yield from ((section, *pair) for pair in mutations(kind, base[section]))


class Reference:
    """Transformers' model of a config, and what it says of one picture."""

    def __init__(self, kind: str):
        self.config_class, self.model_class, more = KINDS[kind]
        config = self.config_class(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=39,
            image_seq_length=9,
            **more,
        )
        self.base = json.loads(config.to_json_string(use_diff=False)) | {"model_type": kind}
        self.images = transformers.LlavaNextImageProcessorPil if more else None

    def settings(self, made: Any) -> dict[str, Any]:
        """Of the image processor."""
        settings = preprocessor(made.vision_config)
        if self.images:
            settings["image_processor_type"] = "LlavaNextImageProcessor"
            settings["image_grid_pinpoints"] = made.image_grid_pinpoints
        return settings

    def made(self, config: dict[str, Any]) -> Any:
        """Config of transformers; raises whatever it does."""
        keys = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
        return self.config_class(**copy.deepcopy(keys), attn_implementation="eager")

    def logits(self, made: Any, folder: Path | None) -> np.ndarray:
        """Logits, and the weights in a folder; raises whatever transformers does."""
        with no_init_weights():
            model = self.model_class(made)
        model.tie_weights()
        randomize(model, 0)
        if folder:
            config = (folder / "config.json").read_text()
            model.save_pretrained(folder)
            (folder / "config.json").write_text(config)
        settings = self.settings(made)
        images = self.images or transformers.CLIPImageProcessorPil
        with torch.no_grad():
            inputs = images(**settings)(PICTURE, return_tensors="pt")
            (features,) = model.get_image_features(**inputs, return_dict=True).pooler_output
            ids = [
                x for i in IDS for x in ([made.image_token_id] * len(features) if i < 0 else [i])
            ]
            out = model(input_ids=torch.tensor([ids]), **inputs, return_dict=True, use_cache=False)
        return out.logits[0].numpy()


IDS = [1, 5, -200, 7]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (15, 29, 3), dtype=np.uint8))


def read(folder: Path) -> ModelConfig:
    return model_config(open_source(folder))


def ours(folder: Path) -> np.ndarray:
    model, processor = converters.load(folder)
    batch = processor([PICTURE], input_ids=[IDS])
    return np.asarray(model(batch))[0][np.asarray(batch.mask)[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_fate(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reference = Reference(kind)
    whole, folder = tmp_path / "whole", tmp_path / "mutated"
    whole.mkdir()
    made = reference.made(reference.base)
    write_json(whole / "config.json", reference.base)
    write_json(whole / "preprocessor_config.json", reference.settings(made))
    before = reference.logits(made, whole)
    base = read(whole)
    assert same([ours(whole)], [before], WIDEST)
    fates: dict[str, str] = {}
    keys = set()
    for section, key, value in every(reference.config_class, reference.base):
        name = f"{section}.{key}".strip(".")
        keys.add(name)
        if fates.get(name) == "used" and isinstance(value, int | float | str):
            continue  # one of many values tells
        mutated = copy.deepcopy(reference.base)
        (mutated[section] if section else mutated)[key] = value
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        write_json(folder / "config.json", mutated)
        compared = not section or key in COMPARED[kind][section]
        made = expected = None
        try:
            made = reference.made(mutated)
            write_json(folder / "preprocessor_config.json", reference.settings(made))
            if compared:
                expected = reference.logits(made, folder)
        except Exception:  # transformers takes no such value
            made = None
        try:
            config = read(folder)
        except InputError as error:
            assert key in str(error), (name, value, str(error))
            fates.setdefault(name, "refused")
            continue
        if made is None:
            continue
        if config == base:
            try:
                expected = reference.logits(made, None) if expected is None else expected
            except Exception:  # nor to compute with
                continue
            assert same([expected], [before], 1e-6), f"{name}: {value!r} is read past"
            fates.setdefault(name, "without effect")
            continue
        if compared:
            assert same([ours(folder)], [expected], WIDEST), f"{name}: {value!r}"
        else:
            (branch,) = config.branches
            part = (
                branch.architecture.encoders["encoder"]
                if section == "vision_config"
                else config.llm
            )
            alone = TABLES[mutated[section]["model_type"]].config(mutated[section])
            assert part == alone, name
        fates[name] = "used"
    assert show(kind, fates, capsys)["used"] > 20
    assert {key for key in keys - fates.keys() if key.split(".")[-1] not in UNTRIED} == set()


def test_default_pinpoints():
    assert transformers.LlavaNextConfig().image_grid_pinpoints == PINPOINTS
