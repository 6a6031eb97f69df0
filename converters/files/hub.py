"""Hugging Face's hub: `org/name[@revision]` where a folder may stand.

All that knows huggingface_hub is here and in `converters.files.push`: names, the cache, which files
are downloaded, what the hub refuses. The library is imported when the first name is met.
"""

import dataclasses
import errno
import glob
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from converters.files import gguf
from converters.files.names import (
    ADAPTER,
    EXTRA,
    KINDS,
    PREPROCESSOR,
    PROCESSOR_FILES,
    PROJECTOR,
    README,
    SETTINGS,
    SLOT,
    TOKENIZER_FILES,
)
from converters.files.reader import INDEX, first_line, weight_map, weights_file
from vfjax import InputError
from vfjax.atomic import findable
from vfjax.errors import SHOWN

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

TOWER_FILES = (*KINDS, PREPROCESSOR)
TEXTS = (
    *(*KINDS, *TOKENIZER_FILES, *PROCESSOR_FILES, SETTINGS, README),
    *(f"{SLOT}*{between}{name}" for between in "/_" for name in TOWER_FILES),
)
"""Patterns of the files beside weights that a folder is read from."""

WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".ckpt")
"""What names of weights end in, those that are not read among them."""

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers after which the hub is asked again."""

PAUSES: Sequence[float] = (1, 2, 4, 8, 16)
"""Seconds before each time, unless the hub says how many."""

LONGEST = 60
"""Seconds that are waited at most."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Why a disk may refuse."""

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.ASCII)


class Absent(InputError):
    """What is on no disk, or not whole, and cannot be had from the hub; `found` says why."""

    def __init__(self, where: object, *, found: str, expected: object, fix: str):
        super().__init__(where, found=found, expected=expected, fix=fix)
        self.found = found


@dataclasses.dataclass(frozen=True)
class Repo:
    """A repository of models, `org/name`, and a branch, tag or commit of it; None: its main one."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


@dataclasses.dataclass(frozen=True)
class Access:
    """How huggingface_hub is asked, where that is not as its settings say.

    Attributes:
        cache_dir: in place of its cache.
        token: in place of its login; False: none.
        force_download: get files that are in the cache, too.
    """

    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    force_download: bool = False


def parse(text: str | os.PathLike[str]) -> Repo | None:
    """The repository that a text of the form `org/name[@revision]` names; None of any other."""
    found = _NAME.fullmatch(os.fspath(text))
    if found is None or "--" in found[1] or ".." in found[1] or found[1].endswith(".git"):
        return None
    return Repo(found[1], found[2])


def folder(
    path: str | os.PathLike[str],
    where: object = "path",
    *,
    weights: bool = True,
    more: Sequence[str] = (),
) -> Path:
    """The folder that a path or `org/name[@revision]` means; what is on the disk comes first.

    Of a repository the files that are read here are downloaded to huggingface_hub's cache, unless
    they are there. Without a network what is there is taken.

    Args:
        path: as a user, or a file, names it.
        where: what to call it in errors.
        weights: whether its weights are needed too.
        more: patterns of other files that are.

    Returns:
        The path itself where nothing has that name, and it has not that form.

    Raises:
        InputError: see `findable`, `gguf.opened` and `fetch`.
    """
    found = gguf.opened(findable(path, where))
    repo = parse(path)
    return (
        found
        if repo is None or found.exists()
        else fetch(repo, str(repo), weights=weights, more=more)
    )


def by_names(items: Sequence[str], where: str) -> dict[str, str]:
    """("name=folder", "folder", ...) -> name -> folder; a bare folder is named by its last part.

    Of a name on the hub that is without the revision.

    Args:
        items: as a user names them.
        where: what to call them in errors.

    Raises:
        InputError: two have the same name.
    """
    out: dict[str, str] = {}
    for item in items:
        name, equals, folder = item.rpartition("=")
        repo = parse(folder)
        last = (repo.name if repo else folder.rstrip("/")).split("/")[-1]
        name = name if equals else last.replace(".", "-")
        if name in out:
            raise InputError(
                where,
                found=f"two items named {name!r}",
                expected="different names",
                fix="write a=FOLDER b=FOLDER, with names of your own",
            )
        out[name] = folder
    return out


def named(path: Path) -> str | None:
    """`org/name@commit` of a folder in a cache of huggingface_hub, None of any other."""
    for inner in (path.absolute(), *path.absolute().parents):
        home = inner.parent.parent.name
        if inner.parent.name == "snapshots" and home.startswith("models--"):
            return f"{home.removeprefix('models--').replace('--', '/')}@{inner.name}"
    return None


def fetch(
    repo: Repo,
    where: str,
    *,
    weights: bool = True,
    local: bool = False,
    more: Sequence[str] = (),
    access: Access = Access(),
) -> Path:
    """The folder of a repository in the cache, completed by what it lacks.

    Of several processes on one machine one downloads a file, and the others wait for it.

    Args:
        repo: which.
        where: what to call it in errors.
        weights: whether its weights are needed; else the files beside them.
        local: take what is in the cache, and ask nobody.
        more: patterns of other files that are needed.
        access: see `Access`.

    Raises:
        Absent: there is no such repository, or neither a network nor a whole copy.
        InputError: it is gated, has no such revision, no weights that are read here or lacks one
            of their files; the hub does not answer, or the disk is full.
    """
    from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download

    def ask(call: Callable[[], Result]) -> Result:
        return asked(repo, where, call, token=access.token)

    local = local or constants.HF_HUB_OFFLINE
    api = HfApi(library_name="vfjax", token=access.token)
    place: dict[str, Any] = {"cache_dir": access.cache_dir}
    asking = {**place, "local_files_only": local}
    revision = ask(lambda: api.resolve_revision(repo.name, revision=repo.revision, **asking))

    def get(patterns: Collection[str]) -> Path:
        options = {**asking, "revision": revision, "token": access.token}
        options |= {"force_download": access.force_download and not local}
        options |= {"allow_patterns": list(patterns), "library_name": "vfjax"}
        return Path(ask(lambda: snapshot_download(repo.name, **options)))

    home = get((*TEXTS, *more))
    SHOWN[str(home)] = f"{repo.name}@{home.name}"
    if not weights:
        return home
    try:
        tree = get_cached_repo_tree(repo.name, revision=revision, **place)
        names = {file.path for file in tree}
    except errors.CachedRepoTreeNotFoundError:  # an older cache
        names = {path.relative_to(home).as_posix() for path in home.rglob("*")}
    chosen = list(_weights(names))
    if not chosen:
        other = sorted(name for name in names if name.endswith(WEIGHTS))
        raise InputError(
            where,
            found=f"weights in {other[0]} alone" if other else "no weights",
            expected="safetensors, or .bin, as transformers names them",
            fix=f"hf download {repo.name} {other[0]}, and name that file"
            if other and other[0].endswith(".gguf")
            else "take the repository that it was made from",
        )
    if indices := [glob.escape(name) for name in chosen if name.endswith(INDEX)]:
        get(indices)
    shards = [file for name in chosen for file in _shards(home, name)]
    if missing := sorted(set(shards) - names):
        raise InputError(
            where,
            found=f"no file {missing[0]}",
            expected="all shards that its index names",
            fix="take another revision, or tell its authors",
        )
    return get([glob.escape(name) for name in shards])


def _weights(names: Collection[str]) -> Iterator[str]:
    """Those of a repository's files that weights are read from, or their indices."""
    towers = sorted(name for name in names if name.startswith(SLOT))
    groups: list[tuple[str, Sequence[str]]] = [
        ("", (stem,)) for stem in (ADAPTER, EXTRA, PROJECTOR)
    ]
    for inner in ("", *dict.fromkeys(x.partition("/")[0] + "/" for x in towers if "/" in x)):
        config = next((file for file in KINDS if inner + file in names), None)
        groups += [(inner, KINDS[config])] if config else []
    for config in KINDS:
        ends = [name.removesuffix(f"_{config}") for name in towers if name.endswith(f"_{config}")]
        groups += [("", (slot,)) for slot in ends]
    for inner, stems in groups:
        there = {name.removeprefix(inner) for name in names if name.startswith(inner)}
        if (found := weights_file(there.__contains__, stems)) is not None:
            yield inner + found


def _shards(home: Path, name: str) -> list[str]:
    """The files of an index, in the folder where it is; a file that is none by itself."""
    if not name.endswith(INDEX):
        return [name]
    inner = name.rpartition("/")[0]
    return [f"{inner}/{x}" if inner else x for x in sorted(set(weight_map(home / name).values()))]


def asked(
    repo: Repo,
    where: str,
    call: Callable[[], Result],
    more: str = "",
    token: str | bool | None = None,
) -> Result:
    """What a call of huggingface_hub returns; it is repeated while the hub is busy.

    Args:
        repo: what it is about.
        where: what to call that in errors.
        call: what is called.
        more: what else to do if it fails.
        token: see `Access`.

    Raises:
        InputError: it is refused, see `fetch`.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:  # of several libraries, which share no class
            status, said = _answer(error)
            if pause is None or status not in BUSY:
                raise refusal(repo, where, error, more, token) from error
            seconds = min(float(said) if said.isdigit() else pause, LONGEST)
            LOG.warning("%s: the hub is busy (%s), asked again in %g s", repo, status, seconds)
            time.sleep(seconds)
    raise AssertionError


def _answer(error: BaseException | None) -> tuple[int, str]:
    """The hub's status, 0 if it gave none, and the seconds that it asks to wait."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code, response.headers.get("Retry-After", "")
        error = error.__cause__
    return 0, ""


def refusal(
    repo: Repo, where: str, error: Exception, more: str = "", token: str | bool | None = None
) -> InputError:
    """What to tell a user of an error of huggingface_hub; arguments as of `asked`."""
    from huggingface_hub import constants, errors, get_token

    anonymous = not (token if isinstance(token, str) or token is False else get_token())
    page = f"{constants.ENDPOINT}/{repo.name}"
    status, _ = _answer(error)
    expected, absent = "an answer of the hub", False
    match error:
        case errors.GatedRepoError():
            expected = "access to it"
            if anonymous:
                found = "a gated repository, and no login"
                fix = f"accept its conditions at {page}, then run hf auth login"
            else:
                found = "a gated repository, which this login may not read"
                fix = f"accept its conditions at {page} with the account of hf auth login"
        case errors.LocalTokenNotFoundError():
            found, expected = "no login, which token=True asks for", "one"
            fix = "run hf auth login"
        case errors.RepositoryNotFoundError():
            absent, found = True, f"no folder, and no such repository at {constants.ENDPOINT}"
            expected = "one of the two"
            fix = "check the spelling; a private repository needs hf auth login" + (
                "" if anonymous else " with an account that may read it"
            )
        case errors.RevisionNotFoundError():
            found, expected = f"no revision {repo.revision!r}", f"one of {repo.name}"
            fix = f"take a branch, tag or commit that {page}/commits/main shows"
        case errors.RemoteEntryNotFoundError():
            found, expected = "a file of its list that it lacks", "all of them"
            fix = "take another revision, or tell its authors"
        case errors.IncompleteSnapshotError():
            absent = True
            found = "a part of it in the cache, of a download that was broken off"
            expected = "all of it, or a network"
            fix = f"run it again with a network, and without HF_HUB_OFFLINE, or hf download {repo}"
        case _ if status == 401:
            found, expected = "a token that the hub does not know", "a valid one, or none"
            fix = "run hf auth login, or unset HF_TOKEN"
        case _ if status == 403:
            found = "a repository that is closed to this login"
            expected = "access to it"
            fix = f"see {page}, and what the token may do at {constants.ENDPOINT}/settings/tokens"
        case _ if status:
            found = f"status {status}" + f" after {len(PAUSES) + 1} tries" * (status in BUSY)
            fix = "try again later; files that are whole are kept"
        case errors.LocalEntryNotFoundError() | errors.RevisionResolutionError():
            absent, expected = True, "one of the two"
            found = "no folder, and nothing of it in the hub's cache, " + (
                "with HF_HUB_OFFLINE set" if constants.HF_HUB_OFFLINE else _unreached(error)
            )
            fix = "check the spelling, or get it with a network: hf download " + str(repo)
        case OSError(errno=number) if number in FULL:
            found, expected = f"{error.strerror} in {constants.HF_HUB_CACHE}", "room for it"
            fix = "free some space, or set HF_HOME to a folder on another disk"
        case _:
            found = f"a transfer that broke off ({type(error).__name__}: {first_line(error)})"
            expected = "all of it"
            fix = "run it again; files that are whole are kept"
    fix = "; ".join(filter(None, (fix, more)))
    return (Absent if absent else InputError)(where, found=found, expected=expected, fix=fix)


def _unreached(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"without a network ({type(cause).__name__}: {first_line(cause)})"
