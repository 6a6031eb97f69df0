"""Members of one architecture merged whole: every tensor by its formula, the folder as its own."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import converters
from converters.files.reader import read_weights
from tests.converters.formats.test_onevision import port_folder
from vfjax.atomic import read_json

Arrays = dict[str, np.ndarray]


def tune(source: Path, out: Path, seed: int, size: float = 0.1) -> Path:
    """A copy of a folder as fine-tuning leaves it: every tensor moved by `size` of its spread."""
    shutil.copytree(source, out)
    rng = np.random.default_rng(seed)
    for file in sorted(out.rglob("*.safetensors")):
        tensors = load_file(file)
        moved = {
            name: (x + size * (x.std() + 0.01) * rng.standard_normal(x.shape)).astype(x.dtype)
            for name, x in tensors.items()
        }
        save_file(moved, file, {"format": "pt"})
    return out


def arrays(folder: Path) -> Arrays:
    """All tensors of a folder, those of a sub-folder behind its name."""
    found = {name: np.asarray(x[...]) for name, x in read_weights(folder).items()}
    for inner in folder.iterdir():
        if (inner / "model.safetensors").is_file():
            found |= {
                f"{inner.name}/{n}": x for n, x in load_file(inner / "model.safetensors").items()
            }
    return found


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two members of it."""
    root = tmp_path_factory.mktemp("onevision")
    port_folder(root / "base")
    return {"base": root / "base"} | {
        name: tune(root / "base", root / name, seed) for seed, name in enumerate("ab")
    }


def test_every_tensor(onevision: dict[str, Path], tmp_path: Path):
    """Deltas of towers, connectors and LLMs in float64, rules by what the files call tensors."""
    base, members = onevision["base"], {name: onevision[name] for name in "ab"}
    rules = (
        ("multi_modal_projector", {"params": {"weights": (1.0, 0.25)}}),
        ("vision_tower.*patch_embedding", {"take": "b"}),
    )
    options: dict[str, Any] = {"base": base, "params": {"weights": (0.3, 0.6)}, "rules": rules}
    said = converters.dry_run(members, tmp_path / "out", export="whole", **options)
    converters.fuse(members, tmp_path / "out", export="whole", **options)
    start, one, two = (arrays(onevision[name]) for name in ("base", "a", "b"))
    found = arrays(tmp_path / "out")
    assert sorted(found) == sorted(start) and said["tensors"] == len(found)
    for name, value in found.items():
        weights = (1.0, 0.25) if "multi_modal_projector" in name else (0.3, 0.6)
        weights = (0.0, 1.0) if "patch_embedding" in name else weights
        deltas = (x[name].astype(np.float64) - start[name] for x in (one, two))
        expected = start[name] + sum(w * d for w, d in zip(weights, deltas, strict=True))
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
    files = {"config.json", "processor_config.json", "tokenizer.json", "MERGE.md"}
    assert files <= {x.name for x in (tmp_path / "out").iterdir()}
    _, seen = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not seen["missing_keys"] and not seen["unexpected_keys"]
    card = (tmp_path / "out" / "MERGE.md").read_text()
    assert "| vision_tower layer 0 |" in card and "| layer 0 |" in card


def state(model: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


def test_in_memory(onevision: dict[str, Path], tmp_path: Path):
    """The same as of the folder, and exported the same."""
    members = {name: onevision[name] for name in "ab"}
    options: dict[str, Any] = {"method": "linear", "params": {"weights": (0.5, 0.5)}}
    converters.fuse(members, tmp_path / "out", export="whole", **options)
    there, its = converters.load(tmp_path / "out")
    here, processor = converters.load_fused(members, mode="whole", **options)
    assert processor.config == its.config and processor.template == its.template
    expected = state(there)
    for name, value in state(here).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    converters.export(here, tmp_path / "exported")
    one, other = arrays(tmp_path / "exported"), arrays(tmp_path / "out")
    assert sorted(one) == sorted(other)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    first, second = (read_json(tmp_path / x / "config.json") for x in ("exported", "out"))
    assert first == second
