"""The one exception a user of vfjax is meant to read."""

LONGEST = 1000
"""Characters that each part of a message has at most."""


class InputError(ValueError):
    """Something the user can mend: a path, a key, a shape, a foreign checkpoint.

    The message is one line: where, what was found, what was expected, what to do. Of parts beyond
    `LONGEST` characters the beginning is said.

    Args:
        where: the file, config key, tensor or argument at fault.
        found: what is there.
        expected: what should be there.
        fix: what the user can do about it.
    """

    def __init__(self, where: object, *, found: object, expected: object, fix: str):
        parts = (cut(str(part), LONGEST) for part in (where, found, expected, fix))
        super().__init__("{}: found {}, expected {}; {}".format(*parts))


def cut(text: str, most: int = 80) -> str:
    """Text in one line, of at most so many characters: the end is left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
