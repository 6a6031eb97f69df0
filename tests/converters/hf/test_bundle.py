"""One file of all families' code: without JAX and vfjax it makes the same arrays."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import transformers

from converters import open_source
from converters.hf import remote
from converters.hf.branch import BRANCHES
from converters.hf.bundle import bundle
from converters.hf.names import Name
from converters.hf.plain import classes_of, from_plain, to_plain
from converters.load import model_config
from converters.source import layout_of
from converters.towers import Towers
from tests.checkpoints import write_json
from tests.converters.test_published_ports import PORTS, PROCESSORS, tokenizer_files
from vfjax import InputError, Processor
from vfjax.architectures import MLPConfig
from vfjax.model import ModelConfig

CASES = ("dc_dci", "llava_next_anyres", "mgm_plain", "slime_vicuna")
"""Authors' folders, whose towers are small."""

NAMES = ("InternVL3-8B-hf", "Ovis2-2B-hf", "Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct")
MORE = ("SmolVLM-256M-Instruct", "llava-onevision-qwen2-7b-ov-hf")


def port(folder: Path, name: str) -> ModelConfig:
    """A published port's config, from its JSON alone."""
    given = PORTS[name]
    config = transformers.AutoConfig.for_model(**given).to_dict()
    processor = PROCESSORS[name if name in PROCESSORS else given["model_type"]]
    write_json(folder / "config.json", config)
    write_json(folder / "processor_config.json", processor)
    if name.startswith("SmolVLM"):
        tokenizer_files(folder)
    layout = layout_of(config)
    assert layout is not None
    return model_config(layout.open(folder, json.loads(json.dumps(config)), Towers({}, "auto")))


@pytest.fixture(scope="module")
def configs(shared: Path, tmp_path_factory) -> dict[str, ModelConfig]:
    """A config of every kind of family."""
    found = {case: model_config(open_source(shared / "golden" / case)) for case in CASES}
    return found | {name: port(tmp_path_factory.mktemp("port"), name) for name in (*NAMES, *MORE)}


def arrays(value: Any, name: str = "") -> dict[str, Any]:
    """All arrays in a batch, by where they are."""
    if hasattr(value, "dtype"):
        return {name: value}
    if isinstance(value, dict):
        items = value
    elif dataclasses.is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return {} if value is None or value == () else {name: np.asarray(value)}
    return {k: v for key, each in items.items() for k, v in arrays(each, f"{name}.{key}").items()}


class Words:
    """A tokenizer: an id a letter."""

    def __call__(self, text: str, **options: object) -> "Words":
        self.input_ids = [1 + ord(letter) % 250 for letter in text]
        return self


def made(processor_class: Any, config: Any) -> dict[str, Any]:
    """The arrays of two unequal rows with two pictures."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((60, 90), (70, 40))]
    rows = [[1, 5, -200, 7, -200, 9], [8, 6, 4]]
    processor = processor_class(config, Words(), lengths=(64, 512, 4096))
    return arrays(processor([pictures, []], input_ids=rows, padding="left"))


def test_the_same_arrays_without_jax(
    configs: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch
):
    own: dict[str, type] = {}
    for config in configs.values():
        own |= classes_of(config)
    used = (Processor, *own.values(), from_plain, to_plain, *remote.AUTO.values())
    roots, twins = (
        [Name(each.__module__, each.__name__) for each in group]
        for group in (used, BRANCHES.values())
    )
    text = bundle(roots, twins)
    assert {len(own) > 25, "register_dataclass" in text, "nnx" in text} == {True, False}
    expected = {name: made(Processor, config) for name, config in configs.items()}
    plain = {name: to_plain(config, "model") for name, config in configs.items()}

    for name in ("jax", "flax", "vfjax", "converters"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    module = ModuleType("modeling_visionfuse")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, f"{module.__name__}.py", "exec"), vars(module))
    for name, given in plain.items():
        config = module.from_plain(given, vars(module), "model")
        assert module.to_plain(config, "model") == given
        found = made(module.Processor, config)
        assert set(found) == set(expected[name]) and len(found) > 4, name
        for key, value in expected[name].items():
            assert found[key].dtype == value.dtype, (name, key)
            np.testing.assert_array_equal(found[key], value, err_msg=f"{name}{key}")
    assert {name: kind.__module__ for name, kind in module.BRANCHES.items()} == dict.fromkeys(
        BRANCHES, module.__name__
    )


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("vfjax.model", "forward", "found what needs JAX"),
        ("vfjax.architectures.llava", "Projector", "found what needs JAX"),
        ("vfjax.vision.resize", "resized", "found what needs JAX"),
        ("converters.files.reader", "read_weights", "found ml_dtypes, expected"),
        ("vfjax.architectures", "Llava", "found no definition"),
    ],
)
def test_what_cannot_be_moved_is_refused(module: str, name: str, said: str):
    with pytest.raises(InputError, match=said) as error:
        bundle([Name(module, name)])
    assert "\n" not in str(error.value)


def test_the_same_sources_make_the_same_bytes():
    names = [Name("vfjax.rows", "open_media"), Name("vfjax.vision.tiling", "tiles")]
    assert bundle(names) == bundle(names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class": "Nobody"}, "class 'Nobody'"),
        ({"din": "8"}, "din: found '8'"),
        ({"layers": True}, "layers: found True"),
        ({"more": 1}, "the fields"),
    ],
)
def test_plain_configs_are_strict(change: dict, said: str):
    config = MLPConfig(8, 16)
    plain = to_plain(config, "mlp")
    assert isinstance(plain, dict)
    assert from_plain(plain, classes_of(config), "mlp") == config
    with pytest.raises(InputError, match=said):
        from_plain({**plain, **change}, classes_of(config), "mlp")
    with pytest.raises(InputError, match="mlp.din: found ndarray"):
        to_plain(MLPConfig(np.zeros(1), 16), "mlp")  # type: ignore[arg-type]
