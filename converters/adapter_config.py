"""adapter_config.json, the settings that PEFT saves beside an adapter: the fate of every key.

Keys and what they mean are those of PEFT's LoraConfig (peft/tuners/lora/config.py, 0.21). A key is
used, without effect on what the saved tensors compute, or refused by name unless at a value that
changes nothing.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, TypeVar, cast

from converters.files.names import SETTINGS
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.errors import cut

Number = TypeVar("Number", int, float)


class Settings(TypedDict, total=False):
    """The keys of the file that are used, once checked; none where there is no file."""

    alpha_pattern: dict[str, float] | None
    base_model_name_or_path: str | None
    ensure_weight_tying: bool | None
    exclude_modules: list[str] | str | None
    layers_pattern: list[str] | str | None
    layers_to_transform: list[int] | int | None
    lora_alpha: float
    lora_bias: bool | None
    modules_to_save: list[str] | None
    peft_type: str
    r: int
    rank_pattern: dict[str, int] | None
    revision: str | None
    target_modules: list[str] | str | None
    target_parameters: list[str] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    use_dora: bool | None
    use_rslora: bool | None


USED = tuple(Settings.__annotations__)

IDLE = (
    "auto_mapping",
    "corda_config",
    "enable_lora",  # of PEFT before 0.3
    "eva_config",
    "fan_in_fan_out",  # has no effect on torch's Linear, Conv2d and Embedding, which all are here
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",  # of PEFT before 0.3
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
    "velora_config",
)
"""Of training alone, or said by the tensors."""

MERGE = "merge the adapter with PEFT (merge_and_unload) and load the result"
TRAIN = "train an ordinary LoRA: PEFT can't merge this one into weights either"
CONVERT = (
    "save it as an ordinary LoRA with PEFT (save_pretrained with "
    "path_initial_model_for_weight_conversion), or merge it (merge_and_unload)"
)

ALLOWED: dict[str, tuple[tuple[object, ...], str]] = {
    "alora_invocation_tokens": ((), TRAIN),
    "arrow_config": ((), TRAIN),
    "bias": (("none", "all", "lora_only"), MERGE),  # those that are in the file are used
    "init_lora_weights": ((True, "gaussian", "eva", "orthogonal", "mica"), CONVERT),
    "kasa_config": ((), MERGE),
    "layer_replication": ((), TRAIN),
    "megatron_config": ((), MERGE),
    "use_bdlora": ((), MERGE),
    "use_qalora": ((), MERGE),
}
"""Key -> its values that change nothing, beside absent, null, false and empty lists (an empty
object is a variant with its defaults); what to do about others."""

PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "XLORA",
)
"""Values of `peft_type` whose adapters are no change of weights."""

DEFAULTS = {"r": 8, "lora_alpha": 8}
"""Of LoraConfig."""

TYPES: dict[str, tuple[type, ...]] = {
    "modules_to_save": (list,),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "target_parameters": (list,),
    "layers_pattern": (list, str),
    "layers_to_transform": (list, int),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "trainable_token_indices": (list, dict),
    "base_model_name_or_path": (str,),
    "revision": (str,),
    **dict.fromkeys(("ensure_weight_tying", "lora_bias", "use_dora", "use_rslora"), (bool,)),
}
"""Key -> types of its values, null apart."""


PATTERNS = (
    "modules_to_save",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_pattern",
)
"""Keys with names or regular expressions."""


def read_settings(path: Path) -> Settings:
    """The adapter_config.json of a folder; empty if there is none.

    Raises:
        InputError: a key that changes what is computed in a way that is not supported, or that is
            not known; a value of a wrong type.
    """
    if not (path / SETTINGS).is_file():
        return Settings()
    settings = {**DEFAULTS, **read_json(path / SETTINGS)}
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise refused(path, "peft_type", kind, "'LORA'", TRAIN if kind in PROMPTS else MERGE)
    for key, value in settings.items():
        if key in (*USED, *IDLE) or value in (None, False, 0, "", []):
            continue
        if key not in ALLOWED:
            fix = f"remove it if PEFT does not read it, or {MERGE}"
            raise refused(path, key, value, "a key of PEFT's LoraConfig", fix)
        values, fix = ALLOWED[key]
        if value not in values:
            raise refused(path, key, value, " or ".join(map(repr, values)) or "none", fix)
    for key, types in TYPES.items():
        value = settings.get(key)
        if value is not None and type(value) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            raise refused(path, key, value, f"a value of type {expected}", "correct it")
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        numbers = {f"{patterns}: {p}": value for p, value in (settings.get(patterns) or {}).items()}
        for name, value in {key: settings[key], **numbers}.items():
            _positive(path, name, value, whole=key == "r")
    tokens = settings.get("trainable_token_indices") or []
    for each in tokens.values() if isinstance(tokens, dict) else [tokens]:
        _numbers(path, "trainable_token_indices", each)
    layers = settings.get("layers_to_transform")
    _numbers(path, "layers_to_transform", layers if isinstance(layers, list) else [])
    for key in PATTERNS:
        value = settings.get(key) or ()
        for pattern in [value] if isinstance(value, str) else value:
            _pattern(path, key, pattern)
    if settings.get("target_modules") is None and not settings.get("target_parameters"):
        raise refused(path, "target_modules", None, "names of modules", MERGE)
    return cast(Settings, settings)


def refused(path: Path, key: str, value: object, expected: str, fix: str = MERGE) -> InputError:
    """The error of a setting."""
    where = f"{path / SETTINGS}: {cut(key)}"
    return InputError(where, found=cut(repr(value), 100), expected=expected, fix=fix)


def _positive(path: Path, key: str, value: object, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1e30:
        raise refused(path, key, value, "a positive whole number" if whole else "a positive number")


def _numbers(path: Path, key: str, given: object) -> None:
    if not isinstance(given, list) or not all(type(x) is int and 0 <= x < 1 << 31 for x in given):
        raise refused(path, key, given, "a list of numbers, from 0", "correct it")


def _pattern(path: Path, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise refused(path, key, pattern, f"names, or expressions of them ({error})") from error


def targeted(settings: Settings, module: str) -> bool:
    """Whether the settings give a module, by its name in the model, factors.

    As check_target_module_exists of peft/tuners/tuners_utils.py.
    """
    if _named(settings.get("exclude_modules") or (), module):
        return False
    if any(
        re.match(rf"(^|.*\.){kept}($|\..*)", module)
        for kept in settings.get("modules_to_save") or ()
    ):
        return False
    targets = settings.get("target_modules") or ()
    if isinstance(targets, str):
        every = targets.lower() == "all-linear" and not module.endswith("lm_head")
        return every or _named(targets, module)
    layers = settings.get("layers_to_transform")
    if not _named(targets, module) or layers in (None, []):
        return _named(targets, module)
    pattern = settings.get("layers_pattern") or ()
    starts = [pattern] if isinstance(pattern, str) else pattern
    starts = [rf"(?:^|.*?\.){one}" for one in starts] or [r".*?\.[^.]*"]
    found = (re.match(rf"{start}\.(\d+)\.", module) for start in starts)
    number = next((int(match[1]) for match in found if match), None)
    return number in (layers if isinstance(layers, list) else [layers])


def parameter_targeted(settings: Settings, parameter: str) -> bool:
    """Whether the settings give a parameter, by its name in the model, factors of its own."""
    return _named(settings.get("target_parameters") or [], parameter)


def _named(names: str | list[str] | tuple[str, ...], module: str) -> bool:
    """Whether a module is one of a list, by the end of its name, or fits an expression."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(f".{module}".endswith(f".{name}") for name in names)


def kept_whole(settings: Settings, module: str) -> bool:
    """Whether a module is, or is in, one of `modules_to_save`, which PEFT finds by their ends."""
    parts = module.split(".")
    wholes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    names = tuple(settings.get("modules_to_save") or ())
    return any(whole.endswith(names) for whole in wholes)


def token_numbers(settings: Settings, module: str) -> tuple[int, ...]:
    """Which tokens a module's rows are of: all modules', or by the end of its name."""
    numbers = settings.get("trainable_token_indices") or ()
    if isinstance(numbers, dict):  # no name fits a head that is tied to an embedding with a name
        named = (value for name, value in numbers.items() if module.endswith(name))
        numbers = next(named, next(iter(numbers.values())))
    return tuple(numbers)


def rank_and_scale(path: Path, settings: Settings, module: str) -> tuple[int, float]:
    """A module's rank, and what its update is multiplied by.

    alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv 2312.03732).
    """
    ranks, alphas = settings.get("rank_pattern"), settings.get("alpha_pattern")
    rank = _by_module(path, "rank_pattern", ranks, module, settings["r"])
    alpha = _by_module(path, "alpha_pattern", alphas, module, settings["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_module(
    path: Path, key: str, values: Mapping[str, Number] | None, module: str, default: Number
) -> Number:
    """A module's value: of the first pattern that its name ends with, in the file's order."""
    for pattern, value in (values or {}).items():
        if _pattern(path, key, rf"(.*\.)?({pattern})").fullmatch(module):
            return value
    return default
