"""GGUF files of LLaVAs, an LLM's and what it sees with, against transformers' models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import converters
from converters.inspect import inspect
from tests.gguf import write
from tests.mmproj import PINPOINTS, llava
from tests.mmproj import write as write_seeing
from vfjax import InputError
from vfjax.model import forward


def folder(path: Path, model: Any, llm: Any, kind: str = "llama", **options: Any) -> Path:
    path.mkdir()
    write(path / "model.gguf", llm, kind)
    write_seeing(path / "mmproj-model-f16.gguf", model, **options)
    return path


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor_of(model: Any) -> Any:
    side = model.config.vision_config.image_size
    options: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    if points := getattr(model.config, "image_grid_pinpoints", None):
        made = transformers.LlavaNextImageProcessorPil
        return made(image_grid_pinpoints=points, **options)
    return transformers.LlavaImageProcessorPil(do_pad=True, **options)


CASES: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("llama", "clip", False, {}),
    ("qwen2", "clip", True, {"vision_feature_layer": [1, 2]}),
    ("phi3", "siglip", False, {"vision_feature_layer": -1}),
    ("llama", "clip", True, {"image_grid_pinpoints": PINPOINTS}),
]


@pytest.mark.parametrize(("kind", "tower", "new", "config"), CASES)
def test_logits_are_those_of_the_model(
    tmp_path: Path, kind: str, tower: str, new: bool, config: dict[str, Any]
):
    """Names, old and new, taps, cut layers, pinpoints of their own order; pixels, too."""
    theirs, llm = llava(kind, tower, **config)
    model, processor = converters.load(folder(tmp_path / "m", theirs, llm, kind, new=new))
    image = picture(61, 33)
    batch = processor(images=[image], input_ids=[[1, 70, -200, 44, 31]])
    inputs = processor_of(theirs)(images=[image], return_tensors="pt")
    found = np.asarray(forward(model, batch))[batch.mask]
    count = len(found) - 4
    ids = torch.tensor([[1, 70, *[287] * count, 44, 31]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, **inputs).logits[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        converters.open_source(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_files_may_be_named(tmp_path: Path):
    """Wherever they are; alone it takes the only LLM beside it."""
    theirs, llm = llava()
    made = folder(tmp_path / "m", theirs, llm)
    (tmp_path / "n").mkdir()
    apart = (made / "mmproj-model-f16.gguf").rename(tmp_path / "n" / "mmproj.gguf")
    assert "found what an LLM sees with, alone, expected its LLM" in refusal(apart)
    source = converters.open_source(apart, base=made / "model.gguf")
    assert source.layout == "llava-hf" and set(source.files) == {"model.gguf", "mmproj.gguf"}
    inspected = inspect(apart, base=made / "model.gguf")
    assert f"{apart}: layout llava-hf" in inspected and "taps [2]" in inspected
    assert converters.open_source(made / "model.gguf").layout == "llm"
    apart.rename(made / "mmproj.gguf")
    assert converters.open_source(made / "mmproj.gguf").branches
    (made / "other.gguf").write_bytes((made / "model.gguf").read_bytes())
    assert "found GGUF weights, mmproj.gguf, model.gguf, other.gguf" in refusal(made)
    (made / "other.gguf").unlink()
    (made / "mmproj.gguf").write_bytes((made / "model.gguf").read_bytes())
    assert "general.architecture: found 'llama', expected 'clip'" in refusal(made)


def test_members_fuse_as_their_folders_do(tmp_path: Path):
    """Two that see with files of their own, against what save_pretrained wrote of them."""
    both = {"a": llava(vision_feature_layer=-1), "b": llava("llama", "siglip")}
    files, folders = {}, {}
    for name, (theirs, llm) in both.items():
        files[name] = folder(tmp_path / name, theirs, llm)
        folders[name] = tmp_path / f"{name}-hf"
        theirs.save_pretrained(folders[name])
        processor_of(theirs).save_pretrained(folders[name])
        for file in converters.open_source(files[name]).path.glob("token*"):
            (folders[name] / file.name).write_bytes(file.read_bytes())
    found = []
    for kind, members in (("gguf", files), ("hf", folders)):
        converters.fuse(members, tmp_path / kind, method="linear")
        model, processor = converters.load(tmp_path / kind)
        batch = processor(images=[picture(40, 31)], input_ids=[[1, 70, -200, 44]])
        found.append(np.asarray(forward(model, batch))[batch.mask])
    assert len(found[0]) == 3 + 2 * 16
    np.testing.assert_allclose(*found, rtol=0, atol=1e-6 * np.abs(found[0]).max())


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"clip.projector_type": "ldpv2"}, "clip.projector_type: found 'ldpv2', expected mlp"),
    ({"clip.projector_type": "gemma3"}, "clip.projector_type: found 'gemma3'"),
    ({"clip.nobody": 1}, "clip: nobody: found 1"),
    ({"clip.has_text_encoder": True}, "has_text_encoder"),
    ({"clip.use_silu": True}, "use_silu"),
    ({"clip.vision.feature_layer": [9]}, "vision.feature_layer"),
    ({"clip.vision.image_mean": [0.5]}, "vision.image_mean: found [0.5], expected three numbers"),
    ({"clip.vision.mm_patch_merge_type": "spatial_unpad"}, "'flat' without pinpoints"),
    ({"clip.vision.image_aspect_ratio": "anyres"}, "'pad' or 'square' without pinpoints"),
    ({"clip.vision.image_grid_pinpoints": [28, 56, 28]}, "a width and a height"),
    ({"clip.vision.mm_projector_type": "linear"}, "mm_projector_type"),
    ({"clip.vision.block_count": 1, "clip.vision.feature_layer": None}, "tensor"),
    ({"clip.vision.image_size": None}, "image_size"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: found a key that is not known"),
]


@pytest.mark.parametrize(("keys", "line"), KEYS)
def test_keys_that_are_refused(tmp_path: Path, keys: dict[str, Any], line: str):
    theirs, llm = llava()
    made = folder(tmp_path / "m", theirs, llm, keys=keys)
    if line == "tensor":  # found where the model is built
        with pytest.raises(InputError, match=r"mmproj.*: found 0 tensors missing, 16 unknown"):
            converters.load(made)
    else:
        assert line in refusal(made)


@pytest.mark.parametrize("name", ["mm.3.weight", "v.post_ln.weight", "resampler.query"])
def test_tensors_that_are_refused(tmp_path: Path, name: str):
    theirs, llm = llava()
    assert f"{name}: found a tensor that no part" in refusal(
        folder(tmp_path / "m", theirs, llm, more=(name,))
    )


def test_without_a_feature_layer_the_last_is_read(tmp_path: Path):
    """Its converter cut those behind; llama.cpp's newest names and a square are known, too."""
    theirs, llm = llava()
    keys = {"clip.vision.feature_layer": None, "clip.vision.image_aspect_ratio": "square"}
    source = converters.open_source(folder(tmp_path / "m", theirs, llm, keys=keys))
    assert source.branches[0].connector["groups"] == [[2]]
    assert source.branches[0].preprocessor["do_pad"] is False
