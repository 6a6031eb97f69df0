"""Paths that hold no model: what they are, in an error's words."""

from pathlib import Path

from converters.files.names import SETTINGS
from converters.files.reader import has_weights
from vfjax import InputError

TOWER = "converters.load_encoder reads it, and towers= takes it for that of a model"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def no_model(path: Path) -> InputError:
    """What to raise for a path that is no folder with a config.json."""
    found, fix = _in_folder(path) if path.is_dir() else _alone(path)
    return InputError(path, found=found, expected="a checkpoint", fix=fix)


def _alone(path: Path) -> tuple[str, str]:
    if not path.exists():
        return "no folder", "check the path"
    return "a file", f"pass its folder, {path.parent}"


def _in_folder(path: Path) -> tuple[str, str]:
    names = sorted(x.name for x in path.iterdir())
    if not names:
        return "an empty folder", "download the checkpoint into it"
    if files := [name for name in names if name.endswith(".gguf")]:
        return f"GGUF weights, {', '.join(files)}", f"pass the file, {path / files[0]}" + (
            ", or an mmproj and base=LLM.gguf" if files[1:] else ""
        )
    if "open_clip_config.json" in names:
        return "a vision tower, of OpenCLIP", TOWER
    if has_weights(path):
        return "weights without config.json", "copy it from the published repository"
    if any(name in TOKENIZERS for name in names):
        return "a tokenizer alone", "download its model, too"
    if adapters := sorted(file.parent.name for file in path.glob(f"*/{SETTINGS}")):
        named = ", ".join(adapters)  # as PEFT saves all but the one called default
        return f"no config.json, and adapters in {named}", f"name one, as {path / adapters[0]}"
    inner = [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")]  # the hub's cache
    if inner:
        return "no config.json", f"pass {sorted(inner)[0].parent}"
    return "no config.json", "check the path"
