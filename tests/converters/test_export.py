"""Import, export, import: the same names, shapes, dtypes and bytes in every layout."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

import converters
from converters.files.reader import read_weights
from tests.checkpoints import (
    fused_folder,
    hf_llava_folder,
    llama_folder,
    make_connector,
    make_llama,
    make_tower,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.merge import LazyTensor
from vfjax.sharding import make_mesh

Stored = dict[str, tuple[str, tuple[int, ...], str]]
"""Name -> dtype, shape and hash of the bytes."""

TEXT_AND_BUFFERS = {
    "vision_model.embeddings.position_ids": torch.arange(17)[None],
    "text_model.embeddings.token_embedding.weight": torch.ones(8, 4),
    "text_projection.weight": torch.ones(4, 4),
    "visual_projection.weight": torch.ones(4, 32),
    "logit_scale": torch.tensor(2.6),
}
"""What the published CLIP repository has beside the vision tower."""


def stored(folder: Path) -> dict[str, Stored]:
    """Sub-folder -> what its weights files hold."""
    out = {}
    for sub in ("", "vision_tower", "vision_tower_aux"):
        if any((folder / sub).glob("*.safetensors")) or any((folder / sub).glob("*.bin")):
            out[sub] = hashed(read_weights(folder / sub))
    return out


def hashed(tensors: Mapping[str, LazyTensor]) -> Stored:
    def sha(tensor: LazyTensor) -> str:
        return hashlib.sha256(tensor[...].tobytes()).hexdigest()

    return {name: (t.dtype.name, t.shape, sha(t)) for name, t in tensors.items()}


def round_trip(folder: Path, tmp_path: Path) -> dict[str, Stored]:
    """What `folder` is after one round; the second round changes nothing at all."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    converters.export(converters.load(folder)[0], once)
    converters.export(converters.load(once)[0], twice)
    files = {str(f.relative_to(once)): f.read_bytes() for f in once.rglob("*") if f.is_file()}
    again = {str(f.relative_to(twice)): f.read_bytes() for f in twice.rglob("*") if f.is_file()}
    assert files.keys() == again.keys()
    assert [name for name in files if files[name] != again[name]] == []
    assert read_json(once / "config.json").keys() >= read_json(folder / "config.json").keys()
    return stored(once)


def without(tensors: Mapping[str, Stored], pattern: str) -> dict[str, Stored]:
    """Without the names that the pattern matches; it matches some."""
    out = {
        sub: {n: x for n, x in own.items() if not re.fullmatch(pattern, n)}
        for sub, own in tensors.items()
    }
    assert out != tensors
    return out


def upstream(folder: Path) -> None:
    upstream_llava_folder(folder, 1)


def upstream_linear(folder: Path) -> None:
    """A projector of one layer, which has names of its own."""
    upstream_llava_folder(folder, 2, weights="safetensors", mm_projector_type="linear")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.mm_projector.2.weight"], tensors["model.mm_projector.2.bias"]
    for name in ("weight", "bias"):
        tensors[f"model.mm_projector.{name}"] = tensors.pop(f"model.mm_projector.0.{name}")
    save_file(tensors, folder / "model.safetensors")


def hf(kind: str, **config: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        hf_llava_folder(folder, 3, kind=kind, **config)

    return make


def fused(folder: Path) -> None:
    llm, branches = make_llama(4), {}
    for i, kind in enumerate(("clip", "dinov2")):
        tower = make_tower(kind, i)
        connector = make_connector((32, 32, 32), i)
        branches[f"b{i}"] = (tower, connector, {"taps": [-2], "drop": 1, "aspect": "crop"})
    fused_folder(folder, llm, branches)


def untied(folder: Path) -> None:
    llama_folder(folder, 5)


def tied(folder: Path) -> None:
    llama_folder(folder, 6, tie_word_embeddings=True)


def sharded(folder: Path) -> None:
    make_llama(7).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def sharded_bin(folder: Path) -> None:
    """Three shards of before the zip format."""
    llama_folder(folder, 8)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        own = {name: x for name, x in tensors.items() if places[name] == shard}
        torch.save(own, folder / shard, _use_new_zipfile_serialization=False)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": places})


@pytest.mark.parametrize(
    "make",
    [
        upstream,
        upstream_linear,
        hf("clip"),
        hf("siglip", vision_feature_select_strategy="full"),
        hf("dinov2", vision_feature_layer=[-1, -2]),
        hf("dinov2_with_registers"),
        fused,
        untied,
        tied,
        sharded,
        sharded_bin,
    ],
    ids=lambda make: make.__qualname__.split(".")[0],
)
def test_all_comes_back(tmp_path: Path, make: Callable[[Path], None]):
    folder = tmp_path / "folder"
    make(folder)
    expected = stored(folder)
    assert round_trip(folder, tmp_path) == expected


TRANSFORMERS = {
    "hub": {"vision_tower.": "vision_tower.vision_model."},
    "tf5-save": {},
    "tf4-late-memory": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "tf5-memory": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
"""Spelling of transformers -> prefixes in place of those that version 5 writes."""


@pytest.mark.parametrize("spelling", TRANSFORMERS)
def test_every_spelling_of_transformers(tmp_path: Path, shared: Path, spelling: str):
    folder = tmp_path / "folder"
    hf_llava_folder(folder, 9)
    tensors = load_file(folder / "model.safetensors")
    for old, new in TRANSFORMERS[spelling].items():
        tensors = {re.sub(f"^{re.escape(old)}", new, name): x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    spec = json.loads((shared / f"specs/tensors/llava-1.5-7b-hf.{spelling}.json").read_text())
    assert set(tensors) <= set(spec["files"]["model"])
    expected = stored(folder)
    assert round_trip(folder, tmp_path) == expected
    prompt = converters.load(folder)[1]([], ["a"])
    logits = converters.load(tmp_path / "once")[0](prompt)
    assert jnp.isfinite(logits[prompt.mask]).all()


def test_dtypes_of_one_checkpoint_may_differ(tmp_path: Path):
    """Half LLM, bfloat16 projector, float32 norms; what is not read comes along as it is."""
    folder = tmp_path / "folder"
    upstream_llava_folder(folder, 10, weights="safetensors")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        dtype = torch.bfloat16 if "mm_projector" in name else torch.float16
        tensors[name] = tensors[name].to(torch.float32 if "norm" in name else dtype)
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {buffer: torch.ones(4)}, folder / "model.safetensors")
    tower = load_file(folder / "vision_tower" / "model.safetensors")
    tower = {n if n.startswith("vision") else f"vision_model.{n}": x for n, x in tower.items()}
    save_file(tower | TEXT_AND_BUFFERS, folder / "vision_tower" / "model.safetensors")
    expected = stored(folder)
    assert {x[0] for x in expected[""].values()} == {"float16", "bfloat16", "float32"}
    assert round_trip(folder, tmp_path) == expected


def test_a_tuned_tower_stays_in_the_checkpoint(tmp_path: Path):
    folder = tmp_path / "folder"
    tuned = make_tower("clip", 11).state_dict()
    start = "model.vision_tower.vision_tower.vision_model."
    tensors = {start + n.removeprefix("vision_model."): x for n, x in tuned.items()}
    upstream_llava_folder(folder, 12, tensors=tensors, unfreeze_mm_vision_tower=True)
    expected = {"": stored(folder)[""]}
    assert sum(name.startswith(start) for name in expected[""]) == len(tuned)
    assert round_trip(folder, tmp_path) == expected
    assert read_json(tmp_path / "once/vision_tower/config.json")["hidden_size"] == 32


def test_a_copy_that_upstream_does_not_read_is_left_behind(tmp_path: Path):
    folder = tmp_path / "folder"
    start = "model.vision_tower.vision_tower.vision_model."
    tower = make_tower("clip", 13).state_dict()
    tensors = {start + n.removeprefix("vision_model."): x for n, x in tower.items()}
    upstream_llava_folder(folder, 14, tensors=tensors)
    expected = without(stored(folder), re.escape(start) + ".*")
    assert round_trip(folder, tmp_path) == expected


@pytest.mark.parametrize(
    ("case", "left"),
    [
        ("llava15_mlp2x", ""),
        ("llava_next_anyres", ""),
        ("dc_sti_siglip", ""),
        ("mgm_hd", r"model\.vision_tower_aux\..*"),
        ("mgm_plain", ""),
        ("slime_llama3", ""),
    ],
)
def test_recorded_cases(shared: Path, tmp_path: Path, case: str, left: str):
    folder = shared / "golden" / case
    whole = hashed(read_weights(folder))
    found = round_trip(folder, tmp_path)
    expected = without({"": whole}, left) if left else {"": whole}
    assert found[""] == expected[""]
    for slot in found.keys() - {""}:
        assert found[slot] == hashed(read_weights(folder, [slot]))


def test_shards(tmp_path: Path):
    untied(tmp_path / "folder")
    model, _ = converters.load(tmp_path / "folder")
    converters.export(model, tmp_path / "out", shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 2
    assert stored(tmp_path / "out") == stored(tmp_path / "folder")


def test_parameters_on_a_mesh(tmp_path: Path):
    hf_llava_folder(tmp_path / "folder", 15)
    model, _ = converters.load(tmp_path / "folder", mesh=make_mesh(4, 2))
    converters.export(model, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(tmp_path / "folder")


def test_what_was_changed_is_written(tmp_path: Path):
    untied(tmp_path / "folder")
    model, _ = converters.load(tmp_path / "folder", dtype="bfloat16")
    kernel = model.llm.blocks[1].mlp.up.kernel
    kernel.set_value(jnp.arange(32 * 48, dtype=jnp.float32).reshape(32, 48))
    converters.export(model, tmp_path / "out")
    found = read_weights(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    assert (found[name][...] == jnp.arange(32 * 48).reshape(32, 48).T).all()
    assert {n for n, t in found.items() if t.dtype != jnp.bfloat16} == {name}
    config = read_json(tmp_path / "out" / "config.json")
    assert [config.get(key) for key in ("dtype", "torch_dtype")] == ["bfloat16", None]


def test_files_that_travel(tmp_path: Path):
    hf_llava_folder(tmp_path / "folder", 16)
    (tmp_path / "folder" / "modeling_llava.py").write_text("raise SystemExit")
    converters.export(converters.load(tmp_path / "folder")[0], tmp_path / "out")
    same = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    for name in (*same, "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_llava.py").exists()


def test_refused(tmp_path: Path):
    untied(tmp_path / "folder")
    model, _ = converters.load(tmp_path / "folder")
    with pytest.raises(InputError, match=r"folder: found an existing path"):
        converters.export(model, tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(InputError, match=r"folder: found no folder, expected the checkpoint that"):
        converters.export(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == []
