"""Folders in another layout against transformers' classes and recordings of the authors' code."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import converters
from converters.__main__ import main
from converters.chat import jinja
from converters.load import model_config
from converters.processor import processor
from tests import onevision
from tests.checkpoints import hf_llava_folder, make_llama, upstream_llava_folder, write_json
from tests.converters.formats.test_onevision import authors_folder
from vfjax import InputError, Processor
from vfjax.atomic import read_json
from vfjax.text.prompts import get_template

NEXT = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
    "mm_patch_merge_type": "spatial_unpad",
}
pytestmark = pytest.mark.filterwarnings("ignore:of pictures of few sizes", "ignore:frames of")


def same_tensors(one: Path, other: Path) -> None:
    """Both hold the same tensors of each part, bit for bit."""
    a, b = converters.open_source(one), converters.open_source(other)
    assert a.parts.keys() == b.parts.keys()
    for part, tensors in b.parts.items():
        for name, tensor in tensors.items():
            old, new = np.asarray(a.parts[part][name][...]), np.asarray(tensor[...])
            assert old.dtype == new.dtype and old.tobytes() == new.tobytes(), (part, name)


def processor_of(folder: Path) -> Processor:
    source = converters.open_source(folder)
    return processor(source, model_config(source))


@pytest.mark.parametrize("case", ["llava15_mlp2x", "llava15_gqa", "llava_next_anyres"])
@torch.no_grad()
def test_recorded_cases(shared: Path, tmp_path: Path, case: str):
    """Transformers computes of the same pictures and ids what was recorded of the authors' code."""
    folder = shared / "golden" / case
    converters.export(folder, tmp_path / "hf", layout="hf")
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    inputs, recorded = (load_file(folder / f"{x}.safetensors") for x in ("inputs", "outputs"))
    for sample in sorted({name.split(".")[0] for name in inputs} - {"batch"}):
        pictures = [x for name, x in sorted(inputs.items()) if name.startswith(f"{sample}.image")]
        given, counts = {}, []
        if pictures:
            given = dict(images(pictures, return_tensors="pt"))
            counts = [len(x) for x in model.get_image_features(**given).pooler_output]
            pixels = given["pixel_values"].reshape(-1, *given["pixel_values"].shape[-3:]).numpy()
            pixels = pixels[[bool(x.any()) for x in pixels]]  # batches of tiles are filled
            np.testing.assert_array_equal(pixels, recorded[f"{sample}.pixel_values"])
        wide = iter(counts)
        ids = [
            token
            for i in inputs[f"{sample}.input_ids"].ravel()
            for token in ([model.config.image_token_id] * next(wide) if i == -200 else [int(i)])
        ]
        logits = model(torch.tensor([ids]), **given).logits[0].numpy()
        wanted = recorded[f"{sample}.logits"]
        np.testing.assert_allclose(logits[:, : wanted.shape[1]], wanted, rtol=0, atol=1e-4)
        assert (logits[:, wanted.shape[1] :].max(1) < wanted.max(1)).all()  # rows for the picture
    converters.export(tmp_path / "hf", tmp_path / "back", layout="llava")
    same_tensors(folder, tmp_path / "back")


def test_onevision(tmp_path: Path):
    """The tower lacks its last layer; both tokens, canvases and videos' settings are said."""
    theirs = onevision.port_folder(tmp_path / "port")
    authors_folder(tmp_path / "own", theirs, mm_prompt_template="vicuna_v1")
    converters.export(tmp_path / "own", tmp_path / "hf", layout="hf")
    model, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    config = model.config
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (2, 2)
    assert (config.image_token_id, config.video_token_id) == (259, 260)
    assert config.image_grid_pinpoints[:3] == [[28, 28], [56, 28], [84, 28]]
    weights = model.state_dict()
    for name, value in theirs.state_dict().items():
        if "vision_tower.encoder.layers.2." not in name:
            assert torch.equal(weights[name], value), name
    video = read_json(tmp_path / "hf/video_preprocessor_config.json")
    assert video["video_processor_type"] == "LlavaOnevisionVideoProcessor"
    converters.export(tmp_path / "hf", tmp_path / "back", layout="llava")
    own, back = (load_file(tmp_path / x / "model.safetensors") for x in ("own", "back"))
    assert own.keys() == back.keys()
    assert all(np.array_equal(own[name], back[name]) for name in own)
    assert processor_of(tmp_path / "back").template == "vicuna_v1"


def test_a_model_that_was_changed(tmp_path: Path):
    """What is in memory is written, tied, with a tower of its own and names of both layouts."""
    folder = tmp_path / "own"
    upstream_llava_folder(folder, llm=make_llama(3, tie_word_embeddings=True), **NEXT)
    state = torch.load(folder / "pytorch_model.bin")
    torch.save(state | {"model.image_newline": torch.ones(32)}, folder / "pytorch_model.bin")
    model, _ = converters.load(folder)
    connector = model.branches["clip"].connector
    connector.newline[...] = connector.newline[...] + 1
    converters.export(model, tmp_path / "hf", layout="hf")
    theirs, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    assert theirs.model.image_newline.tolist() == [2.0] * 32
    assert theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight
    loaded, _ = converters.load(tmp_path / "hf")
    converters.export(loaded, tmp_path / "back", layout="llava")
    again = converters.open_source(tmp_path / "back")
    assert again.config["unfreeze_mm_vision_tower"] and "lm_head.weight" not in again.parts["llm"]
    assert again.llm["vocab_size"] == 320


DENSE = {
    "mm_dense_connector_type": "dci",
    "mm_dense_connector_layers": 4,
    "mm_hidden_size": 96,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "a projector of 3 layers, expected two"),
        ({**NEXT, "mm_patch_merge_type": "spatial"}, "'spatial', expected 'spatial_unpad'"),
        ({"mm_prompt_template": "v0"}, "answers that end with '###', which is no token"),
        ({"mm_prompt_template": "qwen_1_5"}, "answers that end with '<|im_end|>'"),
        (DENSE, "a Dense Connector: means of layers"),
    ],
)
def test_what_transformers_cannot_say(tmp_path: Path, changes: dict, message: str):
    folder = tmp_path / "own"
    upstream_llava_folder(folder, **changes)
    state = torch.load(folder / "pytorch_model.bin")
    if changes is DENSE:
        state["model.mm_projector.0.weight"] = torch.ones(32, 96)
    if changes.get("mm_projector_type"):
        state |= {"model.mm_projector.4.weight": torch.ones(32, 32)}
        state |= {"model.mm_projector.4.bias": torch.ones(32)}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        converters.export(folder, tmp_path / "hf", layout="hf")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "hidden states -2, -1 of the tower, expected one"),
        ({"projector_hidden_act": "silu"}, "projector.act: found 'silu', expected 'gelu'"),
        ({"multimodal_projector_bias": False}, "projector.bias: found False, expected True"),
        ({"text": {"model_type": "qwen2"}}, "an LLM of type 'qwen2', expected one of llama, mist"),
    ],
)
def test_what_the_authors_cannot_say(tmp_path: Path, changes: dict, message: str):
    hf_llava_folder(tmp_path / "hf", **changes)
    (tmp_path / "hf/chat_template.jinja").write_text(jinja(get_template("vicuna_v1"), ["<image>"]))
    with pytest.raises(InputError) as caught:
        converters.export(tmp_path / "hf", tmp_path / "out", layout="llava")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command(tmp_path: Path, monkeypatch, capsys):
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["converters", "export", *map(str, words)])
        return main()

    with pytest.raises(SystemExit):
        run("--help")
    assert "export llava-v1.5-7b llava-v1.5-7b-hf --layout=hf" in capsys.readouterr().out
    upstream_llava_folder(tmp_path / "own", weights="safetensors", image_aspect_ratio="square")
    write_json(tmp_path / "own/generation_config.json", {"repetition_penalty": 1.2})
    assert run(tmp_path / "own", tmp_path / "hf", "--layout=hf") == 0
    assert capsys.readouterr().err.startswith("note: repetition_penalty of generation_config.json")
    assert read_json(tmp_path / "hf/preprocessor_config.json")["do_pad"] is False
    assert run(tmp_path / "hf", tmp_path / "x", "--layout=hf") == 2
    assert "a folder in layout llava-hf" in capsys.readouterr().err
