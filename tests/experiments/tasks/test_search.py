"""The search for coefficients: what it asks, what it chooses, what it reports."""

import json
from pathlib import Path

import pytest

import converters
from experiments.configs.search import get_config
from experiments.tasks import search
from experiments.tasks.common import FAMILY
from vfjax import InputError
from vfjax.eval import Question


def settings(**changed):
    config = get_config()
    config.update({"grid": (0.3, 0.5), "rounds": 0, "scenes": 2, "batch": 14, **changed})
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def record(workdir: Path) -> dict:
    search.run(settings(), workdir)
    return json.loads((workdir / "results.json").read_text())


def test_it_reports_held_out_questions_alone(workdir: Path, record: dict) -> None:
    (line,) = record["lines"]
    assert line["grid"] == [0.3, 0.5] and len(line["score"]) == 2
    held = record["held out"]
    assert held["chosen"]["weights"] == [[line["chosen"]]] * 2
    assert held["equal"]["weights"] == [[0.5]] * 2
    assert held["chosen"]["low"] <= held["chosen"]["value"] <= held["chosen"]["high"]
    text = search.table(record)
    assert f"right {held['chosen']['value']:.2f}" in text and "14 held-out questions" in text
    pictures = [
        {p.read_bytes() for p in workdir.glob(f"{split}-*/images/*")}
        for split in ("validation", "test")
    ]
    assert all(map(len, pictures)) and not pictures[0] & pictures[1]
    assert (workdir / "search.png").stat().st_size > 5000


def test_resumed_it_computes_nothing_again(workdir: Path, record: dict, monkeypatch) -> None:
    monkeypatch.setattr(converters, "load_fused", lambda *a, **k: pytest.fail("loaded again"))
    search.run(settings(), workdir)
    assert json.loads((workdir / "results.json").read_text()) == record
    search.run(settings(objective="consistency"), workdir)
    again = json.loads((workdir / "results.json").read_text())
    assert again["lines"][0]["score"] == record["lines"][0]["score"]
    assert len(again["lines"][0]["consistency"]) == 2


def test_answers_of_other_settings_are_refused(workdir: Path, record: dict) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        search.run(settings(max_new_tokens=1), workdir)


class Made(search.Search):
    """Candidates whose answers are made up.

    More of them are right the nearer the coefficients are to 0.8 and 0.2; all are the same from 0.5
    on, but for what is right.
    """

    def answers(self, part, asked, weights):
        self.asked = [*getattr(self, "asked", []), (part, weights)]
        (clip,), (dino,) = weights
        if self.config.objective == "score":
            right = round(20 - 10 * (abs(clip - 0.8) + abs(dino - 0.2)))
            return ["yes" if i < right else "no" for i in range(len(asked))]
        if clip < 0.5 or dino < 0.5:
            return ["yes"] + [f"{weights} {i}" for i in range(1, len(asked))]
        return ["no"] * len(asked)


def made(tmp_path: Path, **changed) -> Made:
    config = settings(grid=(0.2, 0.4, 0.6, 0.8, 1.0), rounds=2, **changed)
    asked = [Question(str(i), "?", answers=("yes",), cluster=str(i)) for i in range(20)]
    members = {name: str(FAMILY / name) for name in ("clip", "dino")}
    return Made(
        config, tmp_path, members, str(FAMILY / "base"), search.FAMILY_QUIZ, asked, asked[::-1]
    )


def test_it_finds_a_peak_member_by_member(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert found.along_lines() == ((0.8,), (0.2,))
    assert {part for part, _ in found.asked} == {"searched on"}
    places = [line["place"] for line in found.record["lines"]]
    assert places == ["all members", "clip", "dino", "clip", "dino"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["lines"]) == 5 and "held out" not in saved


def test_without_labels_it_finds_what_changes_least(tmp_path: Path) -> None:
    found = made(tmp_path, objective="consistency")
    assert found.along_lines() == ((0.8,), (0.8,))
    line = found.record["lines"][0]
    assert line["grid"] == [0.2, 0.4, 0.5, 0.6, 0.8, 1.0]
    assert line["chosen"] == 0.6  # the nearest to where it was among equals
    assert line["score"] == [5, 5, 0, 0, 0, 0]  # not used
    assert line["consistency"] == pytest.approx([5, 2.5, 50, 100, 100, 100])


def test_groups_of_layers_have_coefficients_of_their_own() -> None:
    weights = ((0.5, 0.5), (0.5, 0.5))
    assert search.put(weights, None, None, 0.2) == ((0.2, 0.2), (0.2, 0.2))
    assert search.put(weights, 1, 0, 0.2) == ((0.5, 0.5), (0.2, 0.5))
    assert search.said(search.put(weights, 1, 0, 0.2)) == "0.5,0.5_0.2,0.5"


def test_groups_are_a_gradient_over_the_layers(tmp_path: Path, monkeypatch) -> None:
    asked = {}
    monkeypatch.setattr(converters, "load_fused", lambda *a, **k: asked.update(k) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path, groups=2).fused(((0.1, 0.2), (0.3, 0.4)))
    assert asked["params"] == {"weights": ([0.1, 0.2], [0.3, 0.4])}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": (0.5, 0.5)}, "config.grid"),
        ({"objective": "luck"}, "score or consistency"),
        ({"method": "karcher"}, "a method with weights"),
        ({"members": ("a", "b")}, "config.base"),
        ({"held_out": 1.0}, "between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        search.run(settings(**changed), tmp_path)


def test_a_benchmark_is_split_by_picture(tmp_path: Path) -> None:
    from PIL import Image

    rows = []
    for i in range(12):
        name = f"{i // 3}.png"
        Image.new("RGB", (8, 8), (i // 3, 0, 0)).save(tmp_path / name)
        rows.append({"question_id": i, "image": name, "text": f"question {i}"})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = get_config("llava")
    config.update({"data": str(tmp_path / "q.jsonl"), "images": str(tmp_path), "held_out": 0.25})
    parts = search.questions(config, search.get_benchmark("llava"))
    seen, held = ({q.images[0].name for q in part} for part in parts)
    assert len(seen) == 3 and len(held) == 1 and not seen & held
