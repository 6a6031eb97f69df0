"""The analysis of the shipped family, and of any pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.configs.analyze import get_config
from experiments.tasks import analyze
from experiments.tasks.common import FAMILY
from vfjax import InputError


def run(workdir: Path, **settings) -> dict:
    config = get_config()
    config.update({"batch": 6, "maps": 2, "probe_scenes": 0, **settings})
    analyze.run(config, workdir)
    return json.loads((workdir / "analysis.json").read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.fixture(scope="module")
def record(workdir: Path) -> dict:
    return run(workdir, pictures=6)


def test_shares_of_attention_sum_to_one(record: dict) -> None:
    assert set(record["attention"]) == {"clip", "dino", "fused"}
    for who, by_readers in record["attention"].items():
        for found in by_readers.values():
            for key in ("share", "share of the visual"):
                total = np.sum(list(found[key].values()), axis=0)
                np.testing.assert_allclose(total, 1, atol=1e-5)
            assert len(found["share"]) == (3 if who == "fused" else 2)
            assert all(0 <= row["hits"] <= 1 for row in found["pointing"].values())
    fused = record["attention"]["fused"]["last"]["pointing"]
    assert set(fused) == {"clip", "dino", "all branches"}
    assert fused["clip"]["chance"] == pytest.approx(1 / 9)


def test_features_of_another_origin_are_far_but_as_alike(record: dict) -> None:
    found = record["features"]
    assert found["n"] == 6 and found["labels"] == ["clip", "dino", "dino, other origin"]
    cka, apart = (np.array(found[key]) for key in ("linear CKA, debiased", "MMD²"))
    np.testing.assert_allclose(cka[0, 1], cka[0, 2], atol=1e-4)  # a turn, which CKA can't see
    assert cka[1, 2] == pytest.approx(1, abs=1e-4)
    assert apart[0, 2] > apart[0, 1] > 0 and apart[1, 2] > 0.5


def test_the_report_opens_offline(workdir: Path, record: dict) -> None:
    page = (workdir / "report.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 5
    assert not any(word in page for word in ("<script", "http:", "https:", "<link"))
    for name in ("attention", "shares", "maps", "features", "pca-96"):
        assert Image.open(workdir / f"{name}.png").width > 300
    assert not list(workdir.glob(".*"))  # nothing half written


def test_any_pictures_and_a_question(workdir: Path, record: dict, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, size in enumerate([(60, 30), (48, 48)]):
        Image.new("RGB", size, (90 * i, 60, 30)).save(pictures / f"{i}.png")
    (pictures / "notes.txt").write_text("no picture")
    found = run(
        tmp_path / "out",
        model=str(FAMILY / "clip"),
        members=(f"other={FAMILY / 'dino'}",),
        data=str(pictures),
        prompt="what colour is 3 ?",
    )
    assert set(found["attention"]) == {"other", "clip"} and found["pictures"] == 2
    assert "pointing" not in found["attention"]["clip"]["last"] and "probes" not in found
    assert found["features"] == {"n": 2, "labels": ["other", "clip"]}  # too few to compare
    assert np.array(found["maps apart"]["bits"]).shape == (2, 2)


def test_probes_say_what_layers_know(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(analyze, "MEMBERS", ("clip",))
    config, record = get_config(), {}
    config.probe_scenes = 40
    (section,) = analyze.probes(config, tmp_path, record)
    assert section.picture.is_file()
    found = record["probes"]["accuracy"]["clip"]
    assert all(len(values) == 4 for values in found.values())  # the embedding and three layers
    assert min(found["colour"][1:]) > 0.7 > 0.4 > max(found["digit"])  # it hardly sees digits


def test_what_a_question_is_about() -> None:
    row = {
        "digits": [-1, 3, 5, -1, 7, -1, -1, -1, -1],
        "colours": [-1, 0, 1, -1, 1, -1, -1, -1, -1],
    }
    assert analyze.cell_of("what colour is 7 ?", row) == 4
    assert analyze.cell_of("what digit is red ?", row) == 1
    assert analyze.cell_of("what digit is green ?", row) is None  # two are
    assert analyze.cell_of("which is largest ?", row) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pictures": 0}, "config.pictures: found 0"),
        ({"data": "."}, "no picture"),
        ({"model": str(FAMILY / "base"), "pictures": 1}, "a plain LLM"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch, settings: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(tmp_path, **settings)
