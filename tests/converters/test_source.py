"""Folders in normal form: which layout, which tower, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image
from safetensors.torch import load_file, save_file

import converters
from converters import open_source
from converters.load import abstract, check, model_config
from converters.params.table import Published
from converters.registry import TABLES
from tests.checkpoints import (
    IMAGE_TOKEN,
    NEXT_PINPOINTS,
    SIGLIP,
    header_file,
    hf_llava_folder,
    llama_folder,
    llava_next_folder,
    make_connector,
    make_tower,
    preprocessor,
    published,
    tower_folder,
    upstream_llava_folder,
    write_json,
)
from tests.hub import ABSENT
from vfjax import Batch, InputError, Model, Processor
from vfjax.atomic import read_json

NAME = "openai/clip-vit-large-patch14-336"


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = read_json(file) | changes
    write_json(file, {key: value for key, value in content.items() if value is not None})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`up`, `hf`, `llm`, as they are made; tests copy them."""
    root = tmp_path_factory.mktemp("folders")
    upstream_llava_folder(root / "up", weights="safetensors")
    hf_llava_folder(root / "hf")
    llama_folder(root / "llm")
    return root


def copy(folders: Path, name: str, tmp_path: Path) -> Path:
    return shutil.copytree(folders / name, tmp_path / name)


@pytest.mark.parametrize("place", ["own", "mapped", "nested", "sibling", "beside", "cache"])
def test_where_a_tower_is_found(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """In the order tried; a tower in each of the later places too shows which one comes first."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = copy(folders, "up", tmp_path)
    edit(folder / "config.json", mm_vision_tower=NAME)
    tower = tmp_path / "tower"
    shutil.move(folder / "vision_tower", tower)
    repository = tmp_path / "cache" / "models--openai--clip-vit-large-patch14-336"
    places = {
        "mapped": tmp_path / "elsewhere",
        "own": folder / "vision_tower",
        "beside": tmp_path / NAME,
        "nested": folder / NAME,
        "sibling": tmp_path / "clip-vit-large-patch14-336",
        "cache": repository / "snapshots" / "0123abc",
    }
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    for key in list(places)[list(places).index(place) :]:
        shutil.copytree(tower, places[key])
    source = open_source(folder, towers={NAME: places["mapped"]} if place == "mapped" else None)
    file = source.weight_files()["branches.clip.encoder/model.safetensors"]
    assert file.absolute() == places[place] / "model.safetensors"


def test_files_beside_the_checkpoint_come_first(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder / "vision_tower" / file, folder / f"vision_tower_{file}")
    shutil.copy(folder / "vision_tower/model.safetensors", folder / "vision_tower.safetensors")
    files = open_source(folder).weight_files()
    assert files["branches.clip.encoder/vision_tower.safetensors"].parent == folder


def test_tokens_around_pictures_are_refused(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    edit(folder / "config.json", mm_use_im_start_end=True)
    with pytest.raises(InputError, match="mm_use_im_start_end: found True, expected False"):
        open_source(folder)


def test_a_tower_is_looked_for_where_it_was_said_to_be_alone(folders: Path, tmp_path: Path):
    """A mistyped folder is no reason to take another's."""
    folder = copy(folders, "up", tmp_path)
    with pytest.raises(InputError, match=r"vision tower 'vision_tower': found none.*/no/such;"):
        open_source(folder, towers={"vision_tower": "/no/such"})


def test_a_tower_that_is_nowhere(folders: Path, tmp_path: Path):
    shutil.rmtree((folder := copy(folders, "up", tmp_path)) / "vision_tower")
    edit(folder / "config.json", mm_vision_tower="someone/beit")
    with pytest.raises(InputError) as error:
        open_source(folder)
    places = f"{folder}/vision_tower, someone/beit, {folder}/someone/beit, {tmp_path}/beit"
    assert str(error.value) == (
        f"{folder}: vision tower 'someone/beit': found none, expected a Hugging Face folder in one "
        f"of: {places}, {ABSENT}; put it there, or pass towers={{'someone/beit': folder}}"
    )


@pytest.mark.parametrize(
    ("tower_source", "tuned", "own"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("checkpoint", False, True),
        ("hub", True, False),
    ],
)
def test_which_copy_of_a_tower(tmp_path: Path, tower_source: str, tuned: bool, own: bool):
    state = make_tower("clip", 7).state_dict()
    tensors = {f"model.vision_tower.vision_tower.{name}": x for name, x in state.items()}
    upstream_llava_folder(tmp_path, tensors=tensors, unfreeze_mm_vision_tower=tuned)
    source = open_source(tmp_path, tower_source=tower_source)
    tensor = source.parts["branches.clip.encoder"]["embeddings.class_embedding"]
    file = "pytorch_model.bin" if own else "vision_tower/model.safetensors"
    assert tensor.path == tmp_path / file
    assert len(source.unread) == (0 if own else len(tensors))
    assert ("branches.clip.encoder" in source.towers) == (not own)


def test_a_tower_without_weights(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    (folder / "vision_tower" / "model.safetensors").unlink()
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert str(error.value) == (
        f"{folder}: branches.clip.encoder: found no weights here, nor in {folder}/vision_tower, "
        "expected the vision tower that config.json names; download its weights"
    )


def test_preprocessor_of_transformers_5(folders: Path, tmp_path: Path):
    folder = copy(folders, "hf", tmp_path)
    images = read_json(folder / "preprocessor_config.json")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="hf: found no preprocessor_config.json, expected it, or"):
        model_config(open_source(folder))
    write_json(folder / "processor_config.json", {"image_processor": images, "patch_size": 7})
    assert open_source(folder).branches[0].preprocessor == images


def test_what_upstream_and_transformers_do_differently(folders: Path):
    (upstream,), (hf,) = (open_source(folders / name).branches for name in ("up", "hf"))
    assert (upstream.aspect, hf.aspect) == ("pad", "crop")
    assert upstream.connector["groups"] == hf.connector["groups"] == [[-2]]
    assert open_source(folders / "llm").branches == ()


def test_the_llm_has_none_of_the_keys_of_the_rest(folders: Path):
    llm = open_source(folders / "up").llm
    assert llm["model_type"] == "llama"
    assert [k for k in llm if "mm_" in k or "vision" in k or "image" in k] == []
    assert llm.keys() >= {"hidden_size", "rope_theta", "rms_norm_eps", "vocab_size", "eos_token_id"}


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("up", {"model_type": "gpt2"}, "config.json: found model_type 'gpt2', expected one of the"),
        ("up", {"model_type": None}, "config.json: found model_type None, expected one of the"),
        ("up", {"image_aspect_ratio": "highres"}, "image_aspect_ratio: found 'highres', expected"),
        ("up", {"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: found 'cls'"),
        ("up", {"mm_hidden_size": None}, "config.json: found no key 'mm_hidden_size', expected it"),
        ("up", {"hidden_size": None}, "config.json: found no key 'hidden_size', expected it"),
        ("up", {"mm_projector_type": "qformer"}, "mm_projector_type: found 'qformer', expected"),
        ("up", {"mm_projector_type": "mlp9x_gelu"}, "mm_projector_type: found 'mlp9x_gelu'"),
        ("hf", {"vision_config": {"model_type": "beit"}}, "vision_config: found model_type 'beit'"),
        (
            "hf",
            {"text_config": {"model_type": "gpt2"}},
            "text_config: found model_type 'gpt2', expected",
        ),
        ("hf", {"vision_config": None}, "config.json: found no key 'vision_config', expected it"),
        (
            "hf",
            {"projector_hidden_act": "mish"},
            "config.json: projector_hidden_act: found 'mish', expected",
        ),
        ("llm", {"hidden_act": "mish"}, "config.json: hidden_act: found 'mish', expected"),
        (
            "llm",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.json: rope_scaling: type: found 'linear', expected 'default', 'dynamic'",
        ),
        (
            "llm",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "config.json: rope_parameters: rope_type: found 'yarn', expected 'default', 'dynamic'",
        ),
        (
            "llm",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}},
            "config.json: rope_parameters: found no key 'low_freq_factor', expected it",
        ),
    ],
)
def test_configs_that_are_refused(
    folders: Path, tmp_path: Path, name: str, changes: dict[str, Any], line: str
):
    folder = copy(folders, name, tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError) as error:
        model_config(open_source(folder))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("broken", [lambda images: images.update(crop_size=14)])
def test_pictures_that_do_not_fit_the_encoder(
    folders: Path, tmp_path: Path, broken: Callable[[dict[str, Any]], None]
):
    folder = copy(folders, "hf", tmp_path)
    images = read_json(folder / "preprocessor_config.json")
    broken(images)
    write_json(folder / "preprocessor_config.json", images)
    with pytest.raises(InputError, match="found pictures of 14 pixels, expected 28, as the encod"):
        model_config(open_source(folder))


def test_tensors_that_belong_to_no_part(folders: Path, tmp_path: Path):
    """Only transformers' layout has no catch-all; the others' extra tensors are seen by tables."""
    folder = copy(folders, "hf", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["adapter.weight"] = tensors["language_model.model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"hf: adapter\.weight: found 1 tensor belonging to no"):
        open_source(folder)


def test_an_unknown_tower_source(folders: Path):
    with pytest.raises(InputError, match="tower_source: found 'own', expected 'auto' or 'check"):
        open_source(folders / "up", tower_source="own")


def test_a_tower_of_a_kind_that_is_not_known(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    edit(folder / "vision_tower" / "config.json", model_type="beit")
    with pytest.raises(InputError, match="vision_tower: found model_type 'beit', expected"):
        open_source(folder)
    shutil.rmtree(folder / "vision_tower")
    tower_folder(folder / "vision_tower", "dinov2")
    assert open_source(folder).branches[0].name == "dinov2"


@pytest.fixture(scope="module")
def port(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, transformers.LlavaNextForConditionalGeneration]:
    """Transformers' LLaVA-1.6."""
    path = tmp_path_factory.mktemp("port") / "next"
    return path, llava_next_folder(path, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    "size",
    [
        (20, 20),  # the wide canvas, where upstream takes the tall one
        (392, 343),  # a row more than upstream leaves
        (588, 49),  # and one less
        (7, 140),  # nothing is left of it but the whole view and newlines
    ],
)
def test_the_port_of_llava_1_6(port: tuple[Path, Any], size: tuple[int, int]):
    folder, theirs = port
    rng = np.random.default_rng(size)
    picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    images = transformers.LlavaNextImageProcessorPil.from_pretrained(folder)
    inputs = images(picture, return_tensors="pt")
    (features,) = theirs.get_image_features(**inputs).pooler_output
    text = torch.tensor([[1, *[IMAGE_TOKEN] * len(features), 7, 200]])
    expected = theirs(input_ids=text, **inputs).logits[0].numpy()

    model, processor = converters.load(folder)
    batch = processor([picture], input_ids=[[1, -200, 7, 200]])
    tokens, logits = read(model, batch)
    tokens = np.asarray(tokens)[batch.visual[0][batch.visual[0] >= 0]]
    assert tokens.shape == features.shape
    scale = np.abs(features.numpy()).max()
    np.testing.assert_allclose(tokens, features.numpy(), rtol=0, atol=2e-5 * scale)
    logits, scale = np.asarray(logits)[0, : len(expected)], np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * scale)


@nnx.jit
def read(model: Model, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The visual tokens and the logits."""
    return model.visual_tokens(batch.images).values, model(batch)


def test_spellings_of_the_port_of_llava_1_6(port: tuple[Path, Any], tmp_path: Path):
    """As on the hub, and as a newer transformers has it in memory."""
    folder, model = port
    expected = open_source(folder)
    assert (expected.layout, expected.template) == ("llava-next-hf", "vicuna_v1")
    assert expected.branches[0].connector["pinpoints"] == [x[::-1] for x in NEXT_PINPOINTS]
    shutil.copytree(folder, tmp_path / "port")
    file = tmp_path / "port" / "model.safetensors"
    assert {"image_newline", "language_model.lm_head.weight"} <= load_file(file).keys()
    memory = {name: x.clone() for name, x in model.state_dict().items()}
    assert {"model.image_newline", "lm_head.weight"} <= memory.keys()
    save_file(memory, file)
    found = open_source(tmp_path / "port")
    for part, tensors in expected.parts.items():
        assert found.parts[part].keys() == tensors.keys()


@pytest.mark.parametrize("text", ["[(28, 56), (56, 28)]", "28x56"])
def test_pinpoints_as_text(folders: Path, tmp_path: Path, text: str):
    """Upstream's mm_utils.py evaluates it."""
    folder = copy(folders, "up", tmp_path)
    edit(folder / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints=text)
    if "x" in text:
        with pytest.raises(InputError, match="image_grid_pinpoints: found '28x56', expected pairs"):
            open_source(folder)
    else:
        found = open_source(folder).branches[0].connector["pinpoints"]
        assert found == [[28, 56], [56, 28]]


def test_pinpoints_that_disagree(port: tuple[Path, Any], tmp_path: Path):
    folder = shutil.copytree(port[0], tmp_path / "port")
    edit(folder / "config.json", image_grid_pinpoints=[[28, 28]])
    with pytest.raises(InputError, match=r"port: image_grid_pinpoints: found \[\[28, 56\], \[56"):
        open_source(folder)
    edit(folder / "config.json", vision_feature_select_strategy="full")
    with pytest.raises(InputError, match="vision_feature_select_strategy: found 'full', expected"):
        open_source(folder)


def test_tiles_with_a_class_token(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    anyres = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]]}
    edit(folder / "config.json", mm_vision_select_feature="cls_patch", **anyres)
    with pytest.raises(InputError, match="found 17 tokens a tile, expected a square of them"):
        model_config(open_source(folder))


@pytest.mark.parametrize(
    ("keys", "template"),
    [
        ({"model_type": "llava_mistral"}, "mistral_instruct"),
        ({"vocab_size": 64000}, "chatml_direct"),
        ({"vocab_size": 32000}, "vicuna_v1"),
        ({"vocab_size": 128256}, "llava_llama_3"),
        ({"vocab_size": 128256, "mm_dense_connector_type": "sci"}, "llama_3_dc"),
    ],
)
def test_templates(folders: Path, tmp_path: Path, keys: dict[str, Any], template: str):
    folder = copy(folders, "up", tmp_path)
    edit(folder / "config.json", architectures=None, **keys)
    assert open_source(folder).template == template


OWN_TOWERS = {
    "llava-v1.6-vicuna-7b": {"clip": "encoder"},
    "MGM-7B": {"clip": "encoder", "aux": "aux"},
    "DenseConnector-v1.5-SigLIP-7B-AnyRes": {"siglip": "encoder"},
}
"""Published models that hold their towers: all that is known of these is their name."""


@pytest.mark.parametrize("name", OWN_TOWERS)
def test_models_that_hold_their_towers(shared: Path, tmp_path: Path, name: str):
    spec = json.loads((shared / "specs" / "tensors" / f"{name}.json").read_text())
    write_json(tmp_path / "config.json", spec["config"])
    header_file(tmp_path / "model.safetensors", spec["files"]["model"])
    source = open_source(tmp_path)
    kinds = {f"branches.{source.branches[0].name}.{x}" for x in OWN_TOWERS[name].values()}
    assert (source.towers, set(source.held), source.unread) == ({}, kinds, ())
    check(source, abstract(model_config(source).build)[1])


@pytest.mark.parametrize(
    ("repository", "kind"),
    [
        ("clip-vit-large-patch14-336", "clip_vision_model"),
        ("siglip-so400m-patch14-384", "siglip_vision_model"),
        ("CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", "open_clip_convnext"),
    ],
)
def test_what_is_known_of_published_towers(shared: Path, repository: str, kind: str):
    file = shared / "specs" / "tensors" / f"{repository}.json"
    config = json.loads(file.read_text())["config"]
    vision = config.get("vision_config") or config["vision_cfg"]
    assert TABLES[kind].published[repository].config == {**vision, "model_type": kind}


def dense_folder(path: Path, *, tower: bool) -> None:
    """Dense Connector with SigLIP, whose 27th layer and head its checkpoint lacks."""
    upstream_llava_folder(
        path,
        weights="safetensors",
        mm_dense_connector_type="dci",
        mm_hidden_size=72,
        mm_vision_tower="google/siglip-so400m-patch14-384",
    )
    shutil.rmtree(path / "vision_tower")
    whole = make_tower("siglip", 5, num_hidden_layers=27)
    state = load_file(path / "model.safetensors") | {
        f"model.mm_projector.{n}": x
        for n, x in make_connector((72, 32, 32), 6).state_dict().items()
    }
    state |= {
        f"model.vision_tower.vision_tower.{name}": x
        for name, x in published(whole).items()
        if ".layers.26." not in name and "head." not in name
    }
    save_file(state, path / "model.safetensors")
    if tower:
        tower_folder(path / "vision_tower", "siglip", 5, num_hidden_layers=27)


def dense_tokens(model: Model, processor: Processor) -> np.ndarray:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return np.asarray(model.visual_tokens(processor([picture], input_ids=[[-200]]).images).values)


def test_a_tower_without_its_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Read from the checkpoint when asked to, or when there is no other copy, and written back."""
    config = {**SIGLIP, "model_type": "siglip_vision_model", "num_hidden_layers": 27}
    images = preprocessor(transformers.SiglipVisionConfig(**SIGLIP))
    known = TABLES["siglip_vision_model"].published
    monkeypatch.setitem(known, "siglip-so400m-patch14-384", Published(config, images))
    dense_folder(tmp_path / "with", tower=True)
    dense_folder(tmp_path / "without", tower=False)
    expected = dense_tokens(*converters.load(tmp_path / "with"))  # the tower's own folder
    written = load_file(tmp_path / "with" / "model.safetensors")
    for folder, options in (("with", {"tower_source": "checkpoint"}), ("without", {})):
        source = open_source(tmp_path / folder, **options)
        assert set(source.held) == {"branches.siglip.encoder"}
        assert source.branches[0].encoder["num_hidden_layers"] == 26
        model, processor = converters.load(tmp_path / folder, **options)
        if folder == "without":
            np.testing.assert_array_equal(dense_tokens(model, processor), expected)
        out = tmp_path / f"{folder} out"
        converters.export(model, out)
        found = load_file(out / "model.safetensors")
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
        again = open_source(out)
        assert again.branches == source.branches
        assert {n: t.keys() for n, t in again.parts.items()} == {
            n: t.keys() for n, t in source.parts.items()
        }


def test_a_tower_without_a_layer_that_taps_are_counted_from(tmp_path: Path):
    """-2 of three layers would be another one of two."""
    state = make_tower("clip", 7).state_dict()
    names = [name for name in state if ".layers.2." not in name]
    tensors = {f"model.vision_tower.vision_tower.{name}": state[name] for name in names}
    upstream_llava_folder(tmp_path, tensors=tensors)
    source = open_source(tmp_path, tower_source="checkpoint")
    with pytest.raises(InputError, match="encoder: encoder.layers.2.*: found 16 tensors missing"):
        check(source, abstract(model_config(source).build)[1])


def test_a_published_tower_that_is_nowhere(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    shutil.rmtree(folder / "vision_tower")
    edit(folder / "config.json", mm_vision_tower=NAME)
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert str(error.value) == (
        f"{folder}: branches.clip.encoder: found no weights here, nor in {folder}/vision_tower, "
        f"{NAME}, {folder}/{NAME}, {tmp_path}/clip-vit-large-patch14-336, {ABSENT}, expected "
        "the vision tower that config.json names; download its weights"
    )
