"""The one exception a user of vfjax is meant to read."""


class InputError(ValueError):
    """Something the user can mend: a path, a key, a shape, a foreign checkpoint.

    The message is one line: where, what was found, what was expected, what to do.

    Args:
        where: the file, config key, tensor or argument at fault.
        found: what is there.
        expected: what should be there.
        fix: what the user can do about it.
    """

    def __init__(self, where: object, *, found: object, expected: object, fix: str):
        text = f"{where}: found {found}, expected {expected}; {fix}"
        super().__init__(" ".join(text.split()))
