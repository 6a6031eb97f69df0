"""The one exception a user of vfjax is meant to read."""

from collections.abc import Collection, Hashable, Iterable

LONGEST = 1000
"""Characters that a message stays below."""

PART = 230
"""Characters of each of its parts that are always said."""


SHOWN: dict[str, str] = {}
"""Start of a path -> what its user knows it by: a local folder may stand for one in a bucket."""


class InputError(ValueError):
    """Something the user can mend: a path, a key, a shape, a foreign checkpoint.

    The message is one line: where, what was found, what was expected, what to do. So that it stays
    below `LONGEST` characters, of what was found, or else of the other parts, the beginning is said
    alone, of a place its end, too.

    Args:
        where: the file, config key, tensor or argument at fault.
        found: what is there.
        expected: what should be there.
        fix: what the user can do about it.
    """

    def __init__(self, where: object, *, found: object, expected: object, fix: str):
        texts = [" ".join(_said(part).split()) for part in (found, expected, fix, where)]
        over = sum(map(len, texts)) + len(": found , expected ; ") - LONGEST + 1
        for i, text in enumerate(texts):
            left = max(len(text) - max(over, 0), min(len(text), PART))
            over -= len(text) - left
            texts[i] = cut(text, left) if i < 3 else _ends(text, left)
        super().__init__("{3}: found {0}, expected {1}; {2}".format(*texts))


Check = tuple[str, object, object, str]
"""Where something stands, what was found, whether that is right, what was expected."""


def check(rules: Iterable[Check], fix: str = "correct it") -> None:
    """Raises InputError for the first that is not right."""
    for where, found, right, expected in rules:
        if not right:
            raise InputError(where, found=found, expected=expected, fix=fix)


def one_of(where: str, value: object, allowed: Collection[object]) -> Check:
    """That a value is one of a few."""
    right = isinstance(value, Hashable) and value in allowed
    return where, cut(repr(value)), right, " or ".join(map(repr, allowed))


def _said(part: object) -> str:
    """Its text; what no file can hold, as the halves of characters, escaped."""
    return shown(str(part).encode(errors="backslashreplace").decode())


def shown(text: object) -> str:
    """Text whose paths are called what their user calls them."""
    out = str(text)
    for path, name in SHOWN.items():
        out = out.replace(path, name)
    return out


def _ends(text: str, most: int) -> str:
    """The beginning and the end of a text."""
    half = most // 2 - 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def cut(text: str, most: int = 80) -> str:
    """Text in one line, of at most so many characters: the end is left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def require(ok: bool, where: str, found: object, expected: str) -> None:
    """Raises InputError if an argument is not ok."""
    if not ok:
        raise InputError(where, found=found, expected=expected, fix="change the argument")
