"""Folders to be: on a disk, where a rename makes them whole, or in a bucket, where none is.

In a bucket all objects have their names at once. `paths.UNWRITTEN` is put there before the first of
them and removed behind the last, and with it no reader opens the folder; config.json comes behind
all other files, for readers of other libraries. A run that is killed leaves that mark.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from converters.files.buckets import asking, file_system
from converters.files.direct import Write, new_file
from converters.files.paths import UNWRITTEN, url_of
from converters.files.shards import Shard
from vfjax import InputError
from vfjax.atomic import UNFINISHED, claim, empty, lock

PART = 16 << 20
"""Bytes of a part of an object on its way to a bucket, of which one is in memory."""
PARTS = 9000
"""Parts of an object, at most: S3 takes 10,000."""

BEAT = 5.0
"""Seconds after which a run that writes to a bucket says again that it does."""


class Stage(Protocol):
    """A folder that is being written."""

    def has(self, path: str, size: int) -> bool:
        """Whether a killed run left this file whole."""

    def check_room(self, need: int) -> None:
        """Raises InputError if so many bytes have no room."""

    def file(self, path: str, size: int) -> AbstractContextManager[Write]:
        """A file of the folder, which is there when the block has ended well."""

    def finish(self) -> None:
        """Gives the whole folder its name."""


def open_stage(
    out: Path, shards: Iterable[Shard], key: str, resume: bool
) -> AbstractContextManager[Stage]:
    """The folder `out` to be, locked; what was written of it is removed if the block fails, but not
    after Ctrl-C or a signal with `resume`.

    Args:
        out: the folder, or `paths.stand_in` of a URL.
        shards: its weights files.
        key: says what they are made of.
        resume: keep what a killed run of the same key and shards left.

    Raises:
        InputError: `out` exists, another run is writing it, or there is a killed run to resume but
            of other tensors.
    """
    digest = hashlib.sha256(key.encode())
    for shard in shards:
        digest.update(shard.path.encode() + shard.header)
    opened = _in_bucket if url_of(out) else _on_disk
    return opened(out, digest.hexdigest(), resume)


def check_new(out: Path) -> None:
    """Raises InputError if something, be it a link to nowhere, has this name; in a bucket, if there
    is an object below it, and no killed run left it.
    """
    if url := url_of(out):
        name = url.partition("://")[2]
        files = file_system(url.partition(":")[0], url)
        with asking(url):
            taken = bool(files.find(name)) and not files.exists(f"{name}/{UNWRITTEN}")
    else:
        taken = os.path.lexists(out)
    if taken:
        raise InputError(
            out,
            found="an existing path",
            expected="a new folder",
            fix="remove it or choose another",
        )


def stage_of(out: Path) -> Path:
    """The folder beside `out` that is written to before it takes that name."""
    return out.parent / f".{out.name}.part"


@contextlib.contextmanager
def _on_disk(out: Path, digest: str, resume: bool) -> Iterator[Stage]:
    stage = stage_of(out)
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    handle = _lock(out, stage)
    try:
        check_new(out)  # which another run may have written since
        found = stage / "key"
        if resume and found.is_file() and found.read_text() != digest:
            made = []  # what was found is left as it is
            raise _of_others(out, stage)
        try:
            with writing(out):
                if not resume or not found.is_file():
                    empty(stage)
                found.write_text(digest)
                (stage / out.name).mkdir(exist_ok=True)
            UNFINISHED.add(stage)
            yield _Folder(out, stage / out.name)
        except BaseException as error:
            if resume and isinstance(error, KeyboardInterrupt):
                error.add_note(f"{stage} keeps what is whole; the same command goes on from there")
            else:
                shutil.rmtree(stage, ignore_errors=True)
            raise
        shutil.rmtree(stage, ignore_errors=True)
    finally:
        UNFINISHED.discard(stage)
        os.close(handle)
        if not out.exists():
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


class _Folder:
    """On a disk; `root` is in another folder, as nothing there looks like a checkpoint's name."""

    def __init__(self, out: Path, root: Path):
        self.out, self.root = out, root

    def has(self, path: str, size: int) -> bool:
        return (self.root / path).is_file()

    def check_room(self, need: int) -> None:
        near = next(folder for folder in self.out.absolute().parents if folder.exists())
        free = shutil.disk_usage(near).free
        if free < need:
            raise InputError(
                self.out,
                found=f"{free:,} bytes free",
                expected=f"{need:,}",
                fix="free some space or choose another output",
            )

    @contextlib.contextmanager
    def file(self, path: str, size: int) -> Iterator[Write]:
        place = self.root / path
        with writing(self.out / path, size):
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(place.name + ".part")
            with new_file(part, size) as write:
                yield write
            sync(part)
            part.rename(place)  # which says that it is whole

    def finish(self) -> None:
        with writing(self.out):
            for made in [*self.root.rglob("*"), self.root]:
                sync(made)
            self.root.rename(self.out)
            sync(self.out.parent)


def _lock(out: Path, stage: Path) -> int:
    """The stage folder, claimed and opened; closing it gives the lock back."""
    while True:
        with writing(out):
            claim(stage)
            handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            lock(handle, out)
        except InputError:
            os.close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(stage)):
                return handle
        os.close(handle)  # another run removed this one at its end


@contextlib.contextmanager
def _in_bucket(out: Path, digest: str, resume: bool) -> Iterator[Stage]:
    bucket = _Bucket(out, digest)
    check_new(out)
    found = bucket.claim()
    if resume and found not in ("", digest):
        raise _of_others(out, f"{bucket.url}/{UNWRITTEN}")
    bucket.begin(keep=resume and found == digest)
    try:
        yield bucket
    except BaseException as error:
        bucket.stop()
        if resume and isinstance(error, KeyboardInterrupt):
            error.add_note(f"{bucket.url} keeps what is whole; the same command goes on from there")
        else:
            with contextlib.suppress(InputError):  # what is left has the mark, and is not opened
                bucket.remove()
        raise
    finally:
        bucket.stop()


class _Bucket:
    """In a bucket; the mark there holds digest, number of the run, and a count that grows."""

    def __init__(self, out: Path, digest: str):
        self.out, self.url, self.digest = out, url_of(out), digest
        scheme, _, self.name = self.url.partition("://")
        self.files, self.run = file_system(scheme, self.url), secrets.token_hex(8)
        self.mark, self.sizes = f"{self.name}/{UNWRITTEN}", dict[str, int]()
        self.ended = threading.Event()
        self.beats = threading.Thread(target=self._beat, name="vfjax-bucket", daemon=True)

    def read_mark(self) -> list[str]:
        """What is in the mark; nothing without one."""
        with asking(self.url):
            try:
                return str(self.files.cat_file(self.mark).decode()).split()
            except FileNotFoundError:
                return []

    def claim(self) -> str:
        """The digest of a killed run, "" without one.

        Raises:
            InputError: it lives.
        """
        if not (before := self.read_mark()):
            return ""
        time.sleep(2 * BEAT)
        if (now := self.read_mark()) and now != before:
            raise self._another()
        return before[0]

    def begin(self, keep: bool) -> None:
        """Puts the mark there, and removes all else but what is to be kept."""
        with asking(self.url):
            try:
                self._say(0, "overwrite" if self.read_mark() else "create")
            except FileExistsError:
                raise self._another() from None
        time.sleep(BEAT / 50)
        if not self._own():  # of two that began at the same time
            raise self._another()
        with asking(self.url):
            found = self.files.find(self.name, detail=True)
            found = {name: x["size"] for name, x in found.items() if name != self.mark}
            if not keep and found:
                self.files.rm(list(found))
                found = {}
        self.sizes = found
        self.beats.start()

    def _say(self, count: int, mode: str = "overwrite") -> None:
        self.files.pipe_file(self.mark, f"{self.digest} {self.run} {count}".encode(), mode=mode)

    def _beat(self) -> None:
        count = 0
        while not self.ended.wait(BEAT):
            count += 1
            with contextlib.suppress(Exception):  # a refusal here is one of the writing, too
                if self._own():
                    self._say(count)

    def _own(self) -> bool:
        return self.read_mark()[1:2] == [self.run]

    def stop(self) -> None:
        """Ends the thread that says that this run lives."""
        self.ended.set()
        if self.beats.is_alive():
            self.beats.join()

    def remove(self) -> None:
        """Removes all that was written, the mark last."""
        if self._own():
            with asking(self.url):
                found = [name for name in self.files.find(self.name) if name != self.mark]
                for names in (found, [self.mark]):
                    if names:
                        self.files.rm(names)

    def has(self, path: str, size: int) -> bool:
        return self.sizes.get(f"{self.name}/{path}") == size

    def check_room(self, need: int) -> None:
        pass

    @contextlib.contextmanager
    def file(self, path: str, size: int) -> Iterator[Write]:
        part = -(-max(PART, size // PARTS) // PART) * PART
        where = f"{self.url}/{path}"
        with asking(where):
            file = self.files.open(f"{self.name}/{path}", "wb", block_size=part)

        def write(data: memoryview) -> None:
            with asking(where):
                file.write(data)

        try:
            yield write
            if not self._own():
                raise self._another()
            with asking(where):
                file.close()
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()
            file.closed = True  # else what there is of it gets its name
            raise

    def finish(self) -> None:
        self.stop()
        if not self._own():
            raise self._another()
        with asking(self.url):
            self.files.rm_file(self.mark)

    def _another(self) -> InputError:
        return InputError(
            self.url,
            found="another run that is writing it",
            expected="one at a time",
            fix="wait for it, or choose another output",
        )


def _of_others(out: Path, stage: object) -> InputError:
    return InputError(
        out,
        found="a killed run of another recipe, or of sources that have changed since",
        expected="the same",
        fix=f"run it without resume, or remove {stage}",
    )


@contextlib.contextmanager
def writing(path: Path, need: int = 0) -> Iterator[None]:
    """Turns the system's refusals into InputErrors."""
    try:
        yield
    except OSError as error:
        raise InputError(
            path,
            found=f"{error.strerror or error} while writing",
            expected=f"permission, and room for {need:,} bytes" if need else "permission and room",
            fix="free some space or choose another output",
        ) from error


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
