"""Folders in normal form: which layout, which tower, what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from converters import open_source
from converters.load import model_config
from converters.reader import read_json
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    make_tower,
    tower_folder,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError

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
    files = open_source(folder, towers={"vision_tower": tmp_path}).weight_files()
    assert files["branches.clip.encoder/vision_tower.safetensors"].parent == folder


def test_a_tower_that_is_nowhere(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    shutil.rmtree(folder / "vision_tower")
    edit(folder / "config.json", mm_vision_tower="someone/beit")
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert str(error.value) == (
        f"{folder}: vision tower 'someone/beit': found none, expected a Hugging Face folder in one "
        f"of: {folder}/vision_tower, someone/beit, {folder}/someone/beit, {tmp_path}/beit; put it "
        "there, or pass towers={'someone/beit': folder}"
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
        open_source(folder)
    write_json(folder / "processor_config.json", {"image_processor": images, "patch_size": 7})
    assert open_source(folder).branches[0]["preprocessor"] == images


def test_what_upstream_and_transformers_do_differently(folders: Path):
    (upstream,), (hf,) = (open_source(folders / name).branches for name in ("up", "hf"))
    assert (upstream["aspect"], hf["aspect"]) == ("pad", "crop")
    assert upstream["connector"]["groups"] == hf["connector"]["groups"] == [[-2]]
    assert open_source(folders / "llm").branches == []


def test_the_llm_has_none_of_the_keys_of_the_rest(folders: Path):
    llm = open_source(folders / "up").llm
    assert llm["model_type"] == "llama"
    assert [k for k in llm if "mm_" in k or "vision" in k or "image" in k] == []
    assert llm.keys() >= {"hidden_size", "rope_theta", "rms_norm_eps", "vocab_size", "eos_token_id"}


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("up", {"model_type": "phi"}, "config.json: found model_type 'phi', expected one of the"),
        ("up", {"model_type": None}, "config.json: found model_type None, expected one of the"),
        ("up", {"image_aspect_ratio": "highres"}, "image_aspect_ratio: found 'highres', expected"),
        ("up", {"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: found 'cls'"),
        ("up", {"mm_hidden_size": None}, "config.json: found no key 'mm_hidden_size', expected it"),
        ("up", {"hidden_size": None}, "config.json: found no key 'hidden_size', expected it"),
        ("up", {"mm_projector_type": "qformer"}, "mm_projector_type: found 'qformer', expected"),
        ("up", {"mm_projector_type": "mlp9x_gelu"}, "mm_projector_type: found 'mlp9x_gelu'"),
        ("hf", {"vision_config": {"model_type": "beit"}}, "encoder: found model_type 'beit'"),
        ("hf", {"text_config": {"model_type": "phi"}}, "llm: found model_type 'phi', expected"),
        ("hf", {"vision_config": None}, "config.json: found no key 'vision_config', expected it"),
        ("hf", {"projector_hidden_act": "mish"}, "connector: activation: found 'mish', expected"),
        ("llm", {"hidden_act": "mish"}, "llm: activation: found 'mish', expected"),
        (
            "llm",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.json: rope_scaling: found rope_type 'linear', expected 'default' or 'llama3'",
        ),
        (
            "llm",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "config.json: rope_scaling: found rope_type 'yarn', expected 'default' or 'llama3'",
        ),
        (
            "llm",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}},
            "config.json: found no key 'low_freq_factor', expected it",
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
    from safetensors.torch import load_file, save_file

    folder = copy(folders, "hf", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["adapter.weight"] = tensors["language_model.model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"hf: adapter\.weight: found 1 tensors that belong to no"):
        open_source(folder)


def test_an_unknown_tower_source(folders: Path):
    with pytest.raises(InputError, match="tower_source: found 'own', expected 'auto', 'check"):
        open_source(folders / "up", tower_source="own")


def test_a_tower_of_a_kind_that_is_not_known(folders: Path, tmp_path: Path):
    folder = copy(folders, "up", tmp_path)
    edit(folder / "vision_tower" / "config.json", model_type="beit")
    with pytest.raises(InputError, match="vision_tower: found model_type 'beit', expected"):
        open_source(folder)
    shutil.rmtree(folder / "vision_tower")
    tower_folder(folder / "vision_tower", "dinov2")
    assert open_source(folder).branches[0]["name"] == "dinov2"
