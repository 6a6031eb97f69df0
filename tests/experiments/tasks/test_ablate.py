"""The study of what a fusion's choices do."""

import json
from pathlib import Path

import pytest

import experiments.configs.demo as configs_demo
from experiments.configs.ablate import get_config
from experiments.tasks import ablate, demo
from vfjax import InputError, Prune

MORE = ("clip", "dci", "dino")


def test_every_choice_has_its_name() -> None:
    found = list(ablate.variants(get_config(), MORE))
    keys = [(panel, label) for panel, label, *_ in found]
    assert len(set(keys)) == len(keys)
    sizes = [len(names) for panel, _, names, *_ in found if panel == "members"]
    assert sorted(sizes) == [2, 2, 2, 3]
    assert [prune.keep for *_, prune in found if prune and prune.by == "similarity"] == [
        *((1.0, 1.0), (0.75, 0.75), (0.5, 0.5), (0.25, 0.25)),
        *((0.75, 1.0), (0.5, 1.0), (0.25, 1.0)),
        *((1.0, 0.75), (1.0, 0.5), (1.0, 0.25)),
    ]


def test_goes_on_where_it_was(tmp_path: Path, monkeypatch, capsys) -> None:
    """One fusion, its pruned twin, a member of another origin; nothing is asked twice."""
    names = ("clip", "dino")
    chosen: list[ablate.Variant] = [
        ("weight of each", "0.5", names, {}, None),
        ("visual tokens kept, by attention", "1 1", names, {}, Prune((1.0, 1.0))),
        ("origin", "forced", ("clip", ablate.OTHER), {"family": False}, None),
    ]
    config = get_config()
    config.scenes = 4
    monkeypatch.setattr(ablate, "variants", lambda config, subsets: iter(chosen[:2]))
    ablate.run(config, tmp_path)
    first = json.loads((tmp_path / "ablate" / "results.json").read_text())
    assert list(first) == ["weight of each: 0.5", "visual tokens kept, by attention: 1 1"]
    one, other = first.values()
    assert {k: v for k, v in one.items() if k not in ("panel", "label")}.items() <= other.items()
    capsys.readouterr()
    monkeypatch.setattr(ablate, "variants", lambda config, subsets: iter(chosen))
    ablate.run(config, tmp_path)
    assert capsys.readouterr().out.count("best member") == 1
    found = json.loads((tmp_path / "ablate" / "results.json").read_text())
    assert found.items() > first.items() and len(found) == 3
    assert (tmp_path / "ablate" / "ablate.png").is_file()
    config.seed += 1
    with pytest.raises(InputError, match=r"scenes/config.json: seed: found 1, expected 2"):
        ablate.run(config, tmp_path)


def test_another_tasks_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "fused").mkdir()
    with pytest.raises(InputError, match="found a folder with fused that vfjax did not make"):
        demo.run(configs_demo.get_config(), tmp_path)
    assert (tmp_path / "fused").is_dir()
