"""Files that are written whole or not at all, and folders that may be emptied."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vfjax.errors import InputError

MARK = ".vfjax"
"""A file that says of its folder that vfjax made it, and may empty it."""


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file`, which takes its name if the block ends well.

    Raises:
        InputError: the temporary file's name is taken by a link or folder.
    """
    part = file.with_name(f".{file.name}.part")
    if os.path.lexists(part):
        if part.is_symlink() or not part.is_file():
            raise _taken(part, "a link" if part.is_symlink() else "a folder")
        part.unlink()  # what a killed run left; not written into, as it may have other names
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def claim(folder: Path) -> Path:
    """A folder that vfjax may empty: new, or empty, or made by an earlier run; it is marked.

    Raises:
        InputError: it is a link, no folder, or holds files without the mark of vfjax; or a link
            lies in it.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise _taken(folder, "a link" if folder.is_symlink() else "a file")
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK
    found = sorted(folder.iterdir())
    if found and (mark.is_symlink() or not mark.is_file()):
        raise _taken(folder, f"a folder with {found[0].name} that vfjax did not make")
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise _taken(link, "a link")
    mark.touch()
    return folder


def empty(folder: Path) -> Path:
    """A claimed folder, with nothing in it but the mark; raises InputError as `claim`."""
    for path in claim(folder).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    return folder


def _taken(path: Path, found: str) -> InputError:
    return InputError(
        path,
        found=found,
        expected="nothing, or what an earlier run left",
        fix="nothing in it was touched; move it away, or choose another output",
    )
