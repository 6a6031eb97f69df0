"""Files that are written whole or not at all, and folders that may be emptied."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from vfjax.errors import InputError, cut

if TYPE_CHECKING:
    import tensorstore

JSON: TypeAlias = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]
"""What JSON can hold."""

MARK = ".vfjax"
"""A file that says of its folder that vfjax made it, and may empty it."""

UNFINISHED: set[Path] = set()
"""What has a temporary name just now, for whoever must end the process at once to name it."""


class Store(NamedTuple):
    """What has files elsewhere, for which local ones stand.

    Attributes:
        local: URL, or path of a local folder that stands for one -> that folder, as it is now.
        read: local file -> the bytes of what it stands for.
        publish: copies a local file to where what it stands for should be.
        objects: local folder -> where training states are written, if Orbax can't write there.
    """

    local: Callable[[str], Path]
    read: Callable[[Path], bytes]
    publish: Callable[[Path], None]
    objects: "Callable[[Path], tensorstore.KvStore] | None" = None


STORES: dict[str, Store] = {}
"""Start of a URL ("s3://"), or of the local paths that stand for some -> its store; `converters`
knows some."""


def store_of(path: str | os.PathLike[str]) -> Store | None:
    """What has the file; None for a file of its own."""
    text = str(path)
    return next((store for start, store in STORES.items() if text.startswith(start)), None)


def contents(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file; pipes and devices, which may never end, are not opened.

    Raises:
        OSError: no such file, or another thing than a file; a name that no file can have.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte, half a character
        raise OSError(errno.EINVAL, f"no name of a file ({error})") from None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "no regular file")
    store = store_of(path)
    return Path(path).read_bytes() if store is None else store.read(Path(path))


def read_json(path: Path, fix: str = "download it again") -> dict[str, Any]:
    """A JSON object.

    Args:
        path: the file.
        fix: what to do if it is damaged.

    Raises:
        InputError: no such file, or not a JSON object.
    """
    try:
        value = json.loads(contents(path).decode())
    except FileNotFoundError as error:
        raise InputError(
            path, found="no file", expected="a JSON file", fix="check the path"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        found = f"no readable JSON ({str(error) or type(error).__name__})"
        raise InputError(path, found=found, expected="JSON", fix=fix) from error
    if not isinstance(value, dict):
        raise InputError(path, found=type(value).__name__, expected="a JSON object", fix=fix)
    return value


def findable(path: str | os.PathLike[str], where: object = "path") -> Path:
    """A path that can be looked up, whether there is something or not.

    Args:
        path: as a user, or a file, names it; a URL of `STORES`.
        where: what to call that in errors.

    Raises:
        InputError: a name that no file can have, links in a circle, or a folder that is closed to
            us; a URL whose server refuses.
    """
    if store := store_of(path):
        path = store.local(str(path))
    shown = cut(repr(os.fspath(path)))
    try:
        closed = not os.access(path, os.R_OK)
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Path(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            where, found=f"{shown} ({reason})", expected="a path", fix="correct it"
        ) from None
    if stat.S_ISDIR(mode) and (closed or not os.access(path, os.X_OK)):
        raise InputError(
            where, found=f"{shown}, which may not be read", expected="a folder", fix="open it to us"
        )
    return Path(path)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file`, which takes its name, in its `Store` too, if the block ends
    well.

    Raises:
        InputError: the temporary file's name is taken by a link or folder.
    """
    part = file.with_name(f".{file.name}.part")
    if os.path.lexists(part):
        if part.is_symlink() or not part.is_file():
            raise _taken(part, "a link" if part.is_symlink() else "a folder")
        part.unlink()  # what a killed run left; not written into, as it may have other names
    UNFINISHED.add(part)
    try:
        yield part
        os.replace(part, file)
        publish(file)
    finally:
        part.unlink(missing_ok=True)
        UNFINISHED.discard(part)


def publish(file: Path) -> None:
    """Copies a file to where what it stands for should be, if it stands for something."""
    if store := store_of(file):
        store.publish(file)


@contextlib.contextmanager
def temporary(parent: Path | None = None, prefix: str | None = None) -> Iterator[Path]:
    """A new folder, which is removed with all that is in it when the block ends.

    Args:
        parent: where; by default where the system has such folders.
        prefix: of its name.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as name:
        UNFINISHED.add(Path(name))
        try:
            yield Path(name)
        finally:
            UNFINISHED.discard(Path(name))


def lock(handle: int, path: Path) -> None:
    """Keeps other runs from a file or folder until its handle is closed.

    Args:
        handle: an open file descriptor of it.
        path: what to call it in errors.

    Raises:
        InputError: another run has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            path,
            found="another run that is writing it",
            expected="one at a time",
            fix="wait for it, or choose another output",
        ) from error


def refuse_link(path: Path) -> None:
    """Raises InputError if a name that is written to is a link, which leads elsewhere."""
    if path.is_symlink():
        raise _taken(path, "a link")


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
