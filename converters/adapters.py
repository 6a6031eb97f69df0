"""What a checkpoint folder holds, completed by a base LLM's folder where it holds but a part.

Two kinds hold a part: LoRA repositories (Hugging Face's PEFT; with `non_lora_trainables.bin` and a
config.json those of LLaVA's finetune_lora scripts), and the bare projectors of its pretrain scripts
(`mm_projector.bin`). Names are those of LLaVA's llava/model/builder.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.lora import LoRATensor, factors_fit
from converters.reader import has_weights, read_json, read_weights
from converters.rules import rename
from converters.towers import Towers
from vfjax import InputError
from vfjax.merge import LazyTensor, check_family

SETTINGS = "adapter_config.json"
ADAPTER, EXTRA, PROJECTOR = "adapter_model", "non_lora_trainables", "mm_projector"
"""Stems of weights files."""

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files of transformers' layouts that an adapter's folder may lack beside its config.json."""

STARTS = (("base_model.model.", ""), ("model.model.", "model."), ("", ""))
"""What PEFT puts before a model's own names -> what is left of it."""

Names = Sequence[tuple[str, str, str]]
"""See `converters.layouts.Layout.prefixes`."""

WRAPPER = re.compile(r"\.(base_layer|modules_to_save)(\.default)?\.")
"""What it puts inside the names of whole tensors."""

FACTOR = re.compile(r"(.+)\.lora_(A|B)(\.default)?\.weight")

Factors = dict[str, tuple[str, LazyTensor]]
"""Of one module: "A" and "B" -> where it is, the tensor."""

SUPPORTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base's weights too
    "use_dora": (),
    "use_qalora": (),
    "lora_bias": (),
    "layer_replication": (),
    "megatron_config": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
}
"""Settings of PEFT's LoraConfig that change the sum `LoRATensor` computes -> values that don't;
absent, null, false and empty ones never do."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder holds, with its base.

    Attributes:
        path: the folder.
        config: config.json, the base's if the folder has none.
        home: the folder of that config.json.
        tensors: the base's; the folder's own if it is complete without.
        files: all files that tensors are read from, the base's named "base/...".
        base: folder of the base; None if the folder is complete without.
        settings: adapter_config.json; empty if there is none.
        added: stem of a file -> what the folder adds to its base.
    """

    path: Path
    config: dict[str, Any]
    home: Path
    tensors: dict[str, LazyTensor]
    files: dict[str, Path]
    base: Path | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    added: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def read(path: Path, base: str | Path | None, towers: Towers) -> Contents:
    """Reads configs and headers of a checkpoint folder and, if it needs one, of its base.

    Args:
        path: the folder.
        base: the base's folder; None: where the folder's configs say.
        towers: where that is looked for.

    Raises:
        InputError: a file that is absent or unreadable, LoRA settings that are not supported, a
            base that is nowhere to be found, or one that the folder's tensors don't fit.
    """
    if not _is_part(path):
        config, own = read_json(path / "config.json"), read_weights(path)
        return Contents(path, config, path, dict(own), {x.path.name: x.path for x in own.values()})
    settings = _settings(path)
    found = _base(path, base, towers)
    config, home = read_json(found / "config.json"), found
    if (path / "config.json").is_file():
        _check_base(path, found, config)
        config = read_json(path / "config.json")
        if "text_config" not in config or any((path / x).is_file() for x in PROCESSORS):
            home = path
    below, added = read_weights(found), _own_tensors(path, settings)
    files = {f"base/{x.path.name}": x.path for x in below.values()}
    files |= {x.path.name: x.path for tensors in added.values() for x in tensors.values()}
    return Contents(path, config, home, dict(below), files, found, settings, added)


def named_base(path: str | Path, towers: Mapping[str, str | Path] | None = None) -> Path | None:
    """The base that a folder's configs name, if it needs one and that is found."""
    path = Path(path)
    if not path.is_dir() or not _is_part(path):
        return None
    return _look(path, _base_name(path), Towers(towers or {}))


def _is_part(path: Path) -> bool:
    """Whether a folder needs a base.

    Raises:
        InputError: it has both an adapter and whole weights.
    """
    adapter = (path / SETTINGS).is_file()
    if has_weights(path):
        if adapter:
            raise InputError(
                path,
                found=f"{SETTINGS} and the weights of a whole model",
                expected="one of them",
                fix="move the adapter, or the weights, to a folder of its own",
            )
        return False
    return adapter or has_weights(path, (PROJECTOR,))


def _base_name(path: Path) -> str:
    for file, key in ((SETTINGS, "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if (path / file).is_file() and (name := read_json(path / file).get(key)):
            return str(name)
    return ""


def _base(path: Path, base: str | Path | None, towers: Towers) -> Path:
    """The base's folder.

    Raises:
        InputError: it is not there.
    """
    name = _base_name(path)
    found = Path(base) if base is not None else _look(path, name, towers)
    if found is None or not found.is_dir():
        places = ", ".join(map(str, towers.candidates(path, name, "base"))) if name else ""
        raise InputError(
            f"{path}: base LLM {name!r}",
            found="none" if found is None else f"no folder {found}",
            expected=f"a whole checkpoint in one of: {places}" if places else "its folder",
            fix="put it there, or pass base=FOLDER" if places else "pass base=FOLDER",
        )
    return found


def _look(path: Path, name: str, towers: Towers) -> Path | None:
    places = towers.candidates(path, name, "base") if name else []
    return next((p for p in places if (p / "config.json").is_file() and has_weights(p)), None)


def _check_base(path: Path, base: Path, config: Mapping[str, Any]) -> None:
    """Checks that the LLM of the folder's own config.json is the base."""
    own = read_json(path / "config.json")
    label = str(path / "config.json")
    check_family({str(base): config.get("text_config", config), label: own.get("text_config", own)})


def _settings(path: Path) -> dict[str, Any]:
    """adapter_config.json; empty if there is none.

    Raises:
        InputError: a setting that is not supported.
    """
    if not (path / SETTINGS).is_file():
        return {}
    settings = read_json(path / SETTINGS)
    for key, values in SUPPORTED.items():
        value = settings.get(key, values[0] if values else None)
        if value and value not in values:
            expected = " or ".join(map(repr, values)) or "none"
            raise _unsupported(path, key, value, expected)
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise _unsupported(path, key, value, "a positive number")
    return settings


def _unsupported(path: Path, key: str, value: object, expected: str) -> InputError:
    return InputError(
        f"{path / SETTINGS}: {key}",
        found=repr(value),
        expected=expected,
        fix="merge the adapter with PEFT (merge_and_unload) and load the result",
    )


def _own_tensors(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stem -> the tensors of its file, of all files that are there; the adapter's must be."""
    stems = [stem for stem in (EXTRA, PROJECTOR) if has_weights(path, (stem,))]
    return {x: dict(read_weights(path, (x,))) for x in (*stems, *([ADAPTER] if settings else []))}


def completed(contents: Contents, names: Names) -> dict[str, LazyTensor]:
    """The base's tensors with the folder's own in their place, beside them or added to them.

    Args:
        contents: of the folder.
        names: the spellings that its layout reads: an adapter has those of the code that it was
            trained by, the base's files perhaps others.

    Returns:
        All tensors, under the base's names where it has them.

    Raises:
        InputError: tensors that don't fit the base, or that the settings promise and that are not
            there.
    """
    tensors, whole = dict(contents.tensors), set()
    spelled = _spelling(tensors, names)
    factors: dict[str, Factors] = {}
    for stem, found in contents.added.items():
        for name, (own, _) in rename(found, STARTS).items():
            tensor, where = found[name], f"{found[name].path}: {name}"
            if stem == ADAPTER and (match := FACTOR.fullmatch(own)):
                factors.setdefault(match[1], {})[match[2]] = (where, tensor)
                continue
            own = WRAPPER.sub(".", own)
            new = spelled(own)
            _check_whole(where, own, tensor, tensors.get(new), contents)
            tensors[new] = tensor
            whole.add(own)
    for module in contents.settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{name}" for name in whole):
            expected = "modules with tensors in the files"
            raise _unsupported(contents.path, "modules_to_save", module, expected)
    for module, pair in factors.items():
        name = spelled(f"{module}.weight")
        tensors[name] = _updated(contents, module, pair, tensors.get(name))
    return tensors


def _spelling(below: Iterable[str], names: Names) -> Callable[[str], str]:
    """A tensor's name in any spelling -> the base's name of it, or itself if the base has none."""
    starts = [(old, f"{part}\0{new}") for old, part, new in names]

    def meant(name: str) -> str:
        return rename([name], starts).get(name, (name,))[0]

    known = {meant(name): name for name in below}
    return lambda name: known.get(meant(name), name)


def _check_whole(
    where: str, name: str, tensor: LazyTensor, other: LazyTensor | None, contents: Contents
) -> None:
    """Checks a tensor that stands in place of the base's, or beside them."""
    if ".lora_" in name:
        raise InputError(
            where,
            found="a LoRA of another kind",
            expected="lora_A.weight and lora_B.weight of dense layers",
            fix="merge the adapter with PEFT (merge_and_unload) and load the result",
        )
    if other is not None and tensor.shape != other.shape:
        raise _other_base(where, f"shape {tensor.shape}", f"{other.shape} as in {contents.base}")


def _other_base(where: str, found: str, expected: str) -> InputError:
    fix = "pass base= the model that it was trained on"
    return InputError(where, found=found, expected=expected, fix=fix)


def _updated(
    contents: Contents, module: str, pair: Factors, weight: LazyTensor | None
) -> LoRATensor:
    """A module's weight with its update.

    PEFT's peft/tuners/lora: `fan_in_fan_out` has no effect on torch's Linear and Conv2d, which all
    are here.
    """
    where, settings = next(iter(pair.values()))[0], contents.settings
    if weight is None:
        expected = f"{module}.weight in {contents.base}"
        raise _other_base(where, "a module that the base lacks", expected)
    if len(pair) == 1:
        fix = "download the adapter again"
        raise InputError(where, found="one factor", expected="lora_A and lora_B", fix=fix)
    a, b = pair["A"][1], pair["B"][1]
    rank = _by_module(contents.path, settings, "rank_pattern", module, settings["r"])
    alpha = _by_module(contents.path, settings, "alpha_pattern", module, settings["lora_alpha"])
    if not factors_fit(weight.shape, a, b, int(rank)):
        found = f"a product of {tuple(b.shape)} and {tuple(a.shape)}"
        raise _other_base(where, found, f"rank {rank} and {weight.shape} as in {contents.base}")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LoRATensor(weight, a, b, scale)


def _by_module(
    path: Path, settings: Mapping[str, Any], key: str, module: str, default: float
) -> float:
    """A module's value: of the first pattern that its name ends with."""
    try:
        for pattern, value in (settings.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
    except re.error as error:
        raise _unsupported(path, key, f"{pattern!r} ({error})", "regular expressions") from error
    return default
