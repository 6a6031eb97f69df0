"""The chat template of a folder."""

from pathlib import Path

from converters.reader import read_json
from vfjax import InputError

FILES = ("chat_template.json", "chat_template.jinja", "tokenizer_config.json")
"""Files that may hold one, beside processor_config.json."""


def read_chat_template(folder: Path) -> str:
    """The chat template, Jinja, that transformers' processor of a folder takes, or its tokenizer.

    "" if there is none. It is the first of those in processor_config.json, the old
    chat_template.json, chat_template.jinja and tokenizer_config.json (transformers
    processing_utils.py, get_processor_dict).

    Raises:
        InputError: several templates, none of them the default.
    """
    for name in ("processor_config.json", *FILES):
        file = folder / name
        if not file.is_file():
            continue
        if name.endswith(".jinja"):
            return file.read_text("utf-8")
        found = read_json(file).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}
        if isinstance(found, dict):
            found = found.get("default", found)
        if found is not None and not isinstance(found, str):
            raise InputError(
                f"{file}: chat_template",
                found=repr(found)[:60],
                expected="a template, or several by name, one of them 'default'",
                fix="keep the one that the model was trained with",
            )
        if found is not None:
            return found
    return ""
