"""Cambrian's folders against what its authors' code computed, see tests/peers/cambrian.py."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import converters
from converters.folder import open_source
from converters.load import check, model_config, structure
from tests import cambrian as toy
from tests.checkpoints import header_file, write_json
from tests.converters.test_published import MODELS, row, shapes
from vfjax import Batch, InputError, Model, Processor
from vfjax.atomic import read_json

DATA = Path(__file__).resolve().parents[2] / "data" / "cambrian.npz"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    with np.load(DATA) as data:
        return dict(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, recorded: dict[str, Any]) -> Path:
    """One folder a case."""
    out = tmp_path_factory.mktemp("cambrian")
    for case, tensors in json.loads(str(recorded["shapes"])).items():
        toy.write_folder(out / case, tensors, {**toy.CONFIG, **toy.CASES[case]})
    return out


def two(processor: Processor) -> Batch:
    """Rows of unequal length with a picture each."""
    samples = [(toy.picture(k, toy.SIZES[k]), toy.row(k, 9 + 2 * k)) for k in (1, 3)]
    pictures, rows = zip(*samples, strict=True)
    return processor(list(pictures), input_ids=[row.tolist() for row in rows])


@jax.jit
def outputs(model: Model, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    (memory,) = model.memories(batch.images)
    return memory.stages, model.embed(batch)[0], model(batch)


def test_stages_equal_the_authors(folders: Path, recorded: dict[str, Any]):
    """Pixels, towers, samplers before the LLM and within it, on two pictures and unequal rows."""
    model, processor = converters.load(folders / "samplers", dtype="float32")
    batch = two(processor)
    with jax.default_matmul_precision("highest"):
        stages, embeds, logits = jax.tree.map(np.asarray, outputs(model, batch))
    (seen,) = batch.images.values()
    names = model.config.branches[0].architecture.connector.names
    shown = {"encoder": seen.given.pixels, **seen.given.others}
    found = {f"pixel_values_{i}": np.moveaxis(shown[x], -1, 1) for i, x in enumerate(names)}
    expected = {
        name.removeprefix("samplers/batch."): x
        for name, x in recorded.items()
        if name.startswith("samplers/batch.")
    }
    real = expected.pop("attention_mask").astype(bool)
    mask = np.asarray(batch.mask)
    assert [row.sum() for row in mask] == [row.sum() for row in real]
    for name, values in (("inputs_embeds", embeds), ("logits", logits)):
        np.testing.assert_allclose(values[mask], expected.pop(name)[real], atol=5e-5)
    found |= stages
    assert expected.keys() == found.keys()
    for name, wanted in expected.items():
        values = found[name]
        if "pixel" in name:
            np.testing.assert_allclose(values[:, :, 1::5, 1::5], wanted, atol=2e-6, err_msg=name)
            continue
        values = values[:, 1::5] if values.shape[1] == 144 else values
        np.testing.assert_allclose(values, wanted, atol=2e-5, err_msg=name)


def test_groups_of_queries_equal_the_authors(folders: Path, recorded: dict[str, Any]):
    """The connector alone, one of two groups resized."""
    model, processor = converters.load(folders / "connector", dtype="float32")
    assert not model.config.branches[0].architecture.connector.layers
    batch = two(processor)
    stages = jax.jit(lambda m, images: m.memories(images)[0].stages)(model, batch.images)
    for name in ("sva_0", "sva_1", "image_features"):
        np.testing.assert_allclose(stages[name], recorded[f"connector/batch.{name}"], atol=2e-5)


def test_it_is_written_back(folders: Path, tmp_path: Path):
    """All tensors of all five folders, and every config."""
    source = folders / "samplers"
    converters.export(converters.load(source)[0], tmp_path / "out")
    for file in source.rglob("*.json"):
        written = read_json(tmp_path / "out" / file.relative_to(source))
        if "preprocessor" not in file.name or "size" not in written:
            assert written == read_json(file), file
    for folder in ("", "vision_tower", *(f"vision_tower_aux_{i}" for i in (1, 2, 3))):
        one, other = (
            {k: v for f in (x / folder).glob("*.safetensors") for k, v in load_file(f).items()}
            for x in (source, tmp_path / "out")
        )
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    again = open_source(tmp_path / "out")
    assert model_config(again) == model_config(open_source(source))


def test_samplers_within_phi3(folders: Path):
    source = open_source(folders / "phi3")
    config = model_config(source)
    check(source, structure(config)[1])
    (branch,) = config.branches
    assert branch.architecture.connector.layers == (1, 2, 3)
    assert source.template == "phi3"


def test_cambrian_8b(recorded: dict[str, Any], tmp_path: Path):
    """Names and shapes at full size; rows of MODELS.md."""
    for folder, tensors in json.loads(str(recorded["published"])).items():
        (tmp_path / folder).mkdir(exist_ok=True)
        stem = "open_clip_model" if folder in toy.OPEN else "model"
        held = {name: ("BF16", shape) for name, shape in tensors.items()}
        header_file(tmp_path / folder / f"{stem}.safetensors", held)
    toy.write_configs(tmp_path, {**toy.CONFIG, **toy.PUBLISHED}, full=True)
    source = open_source(tmp_path)
    check(source, shapes(source))
    lines = MODELS.read_text().splitlines()
    assert row("Cambrian-8B", source) in lines
    seen = model_config(source).branches[0].architecture
    tokens = [len(seen.regions(size)) for size in ((336, 336), (1024, 768), (500, 3000))]
    assert f"| Cambrian-8B | {' | '.join(map(str, tokens))} |" in lines


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type: found 'mlp2x_gelu'"),
        ({"unfreeze_mm_vision_tower": True}, "unfreeze_mm_vision_tower: found True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: found 'cls_patch'"),
        ({"query_num_list": [36, 36]}, "query_num_list: .*as many numbers as num_query_group"),
        ({"query_num_list": [16]}, "query_num_list: found .16.*divide"),
        ({"image_token_len": 37}, "image_token_len: found 37.*square"),
        ({"vision_hidden_size": 24}, "vision_hidden_size: found 24.*multiple of 16"),
        ({"num_of_vision_sampler_layers": 3}, "num_of_vision_sampler_layers: found 3.*4 layers"),
        ({"stride_of_vision_sampler_layers": 0}, "stride_of_vision_sampler_layers: found 0"),
        ({"mm_vision_tower_aux_token_len_list": [36]}, "one number for each of 1 to 8 towers"),
        (
            {"mm_vision_tower_aux_list": ["facebook/sam-vit-large", *toy.NAMES[1:]]},
            "mm_vision_tower_aux_list: found 'facebook/sam-vit-large'",
        ),
        (
            {"mm_vision_tower_aux_list": [*toy.NAMES[:3], "facebook/dinov2-giant"]},
            "aux_3|found model_type 'open_clip_convnext'.*a dinov2",
        ),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: found True"),
        ({"highres_connect": True}, "highres_connect: found True"),
        ({"model_type": "cambrian_mistral"}, "model_type 'cambrian_mistral'"),
    ],
)
def test_keys_that_are_refused(folders: Path, tmp_path: Path, keys: dict[str, Any], message: str):
    """By name, before any tensor is read."""
    source = folders / "samplers"
    write_json(tmp_path / "config.json", read_json(source / "config.json") | keys)
    for path in source.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError, match=message):
        model_config(open_source(tmp_path))
