"""The chat template of a folder."""

from pathlib import Path

from vfjax import InputError
from vfjax.atomic import contents, read_json
from vfjax.errors import cut

FILES = ("chat_template.json", "chat_template.jinja", "tokenizer_config.json")
"""Files that may hold one, beside processor_config.json."""


def _is_text(value: object) -> bool:
    """Text that a file can hold: JSON may have half a character."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def read_chat_template(folder: Path) -> str:
    """The chat template, Jinja, that transformers' processor of a folder takes, or its tokenizer.

    "" if there is none. It is the first of those in processor_config.json, the old
    chat_template.json, chat_template.jinja and tokenizer_config.json (transformers
    processing_utils.py, get_processor_dict).

    Raises:
        InputError: several templates, none of them the default; or a file that is no text.
    """
    for name in ("processor_config.json", *FILES):
        file = folder / name
        if not file.is_file():
            continue
        if name.endswith(".jinja"):
            try:
                return contents(file).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    file, found=f"no text ({error})", expected="Jinja in UTF-8", fix="copy it again"
                ) from None
        given = found = read_json(file).get("chat_template")
        if isinstance(found, list):
            named = [one for one in found if isinstance(one, dict)]
            found = {str(one.get("name")): one.get("template") for one in named}
        if isinstance(found, dict):
            found = found.get("default", found)
        if found is not None and not _is_text(found):
            raise InputError(
                f"{file}: chat_template",
                found=cut(repr(given), 60),
                expected="a template, or several by name, one of them 'default'",
                fix="keep the one that the model was trained with",
            )
        if found is not None:
            return found
    return ""
