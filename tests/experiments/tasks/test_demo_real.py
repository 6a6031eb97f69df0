"""What the demo of published weights asks and shows; its models are run by hand."""

from pathlib import Path

import pytest
from PIL import Image

from experiments.configs.demo_real import get_config
from experiments.family import scenes
from experiments.tasks.demo_real import Asked, draw, questions, side_by_side


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    workdir = tmp_path_factory.mktemp("demo")
    config = get_config()
    scenes.ensure(workdir / "test", "test", config.scenes.test, config.seed, turns=1)
    return questions(config, workdir)


def test_ten_questions_about_as_many_pictures(asked: list[Asked]) -> None:
    assert len(asked) == len({one.picture for one in asked}) == 10
    assert {one.picture.parent.name for one in asked} == {"photographs", "images"}
    assert [one.right for one in asked if one.question.startswith("Does")] == ["Yes", "Yes", "No"]
    for one in asked:
        assert one.question[-1] in "?." and one.right == one.right.strip() != ""


def test_answers_side_by_side(asked: list[Asked], tmp_path: Path) -> None:
    answers = {name: [f"{name} says {i}" for i in range(10)] for name in ("dino", "fused")}
    text = side_by_side(asked, answers)
    assert text.count("says") == 20 and all(one.question in text for one in asked)
    draw(tmp_path / "answers.png", asked, answers)
    with Image.open(tmp_path / "answers.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 1000
