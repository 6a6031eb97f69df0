"""What several processes of one run agree on before they compute, and that the end of one is all's.

They talk through the key-value store of `jax.distributed`: nothing is compiled for it, it answers
while the devices wait, and one that waits for another can be interrupted. A single process pays
nothing.
"""

import contextlib
import functools
import hashlib
import json
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import distributed  # the store has no public name
from jax._src.lib import _jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vfjax.errors import InputError, cut, shown

Facts = dict[str, Any]
"""What must be the same on all processes: JSON values under the names that a user knows."""

PATIENCE = 1800
"""Seconds that a process which lives may be behind another, as where it still reads from a disk.
JAX ends all when one does not live, by `jax.distributed.initialize`'s `heartbeat_timeout_seconds`.
"""

SHARING = 20
"""Seconds after which a file that one process wrote is seen by all that share its folder."""

ENDED = "vfjax/ended"

STAY = 5
"""Seconds that the first process, which has the store, goes on when another one has ended."""
HEARD = 1.5
"""Seconds after which all others have heard of its own end."""

_rounds = Counter[str]()


def initialize(
    seconds: int,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """`jax.distributed.initialize`, which ends all processes if some do not come in `seconds`.

    JAX alone has all wait for 300 s, then end without saying for whom. Its service, in process 0,
    names the missing ones to all others; here it is told to do so in time.

    Args:
        seconds: for the last process to come after the first.
        num_processes: of the run; None: as the cluster says.
        process_id: of this one, from 0; None: as the cluster says.
        heartbeat_timeout_seconds: after which a process that is not heard of is taken for dead.

    Raises:
        ValueError: as `jax.distributed.initialize`. A process that waits in vain is aborted.
    """
    service = functools.partial(
        _jax.get_distributed_runtime_service, cluster_register_timeout=seconds
    )
    more = seconds + 2  # so that a client hears from the service before it gives up
    with mock.patch.object(_jax, "get_distributed_runtime_service", service):
        jax.distributed.initialize(
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=more,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )


def together(what: str) -> AbstractContextManager[Facts]:
    """A block that all processes leave together, however long one of them works in it.

    They wait at the store, as JAX's collectives on CPU (Gloo) give the last one 30 seconds.
    """
    return agreeing(what, patience=math.inf)


class Disagreement(InputError):
    """Of processes; all of them raise it."""


def owners(mesh: Mesh | None) -> tuple[int, ...]:
    """The processes of a mesh's devices; this one alone where there is no mesh."""
    if mesh is None or jax.process_count() == 1:
        return (jax.process_index(),)
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


@contextlib.contextmanager
def agreeing(
    what: str,
    members: Sequence[int] | None = None,
    folder: Path | None = None,
    patience: float = PATIENCE,
) -> Iterator[Facts]:
    """Yields a dict to fill; once all processes have left the block, theirs must be the same.

    Args:
        what: they are doing.
        members: the processes, by number; None: all.
        folder: one that they must share; it is made. One that stands for a bucket's is another on
            each; they must have the same name for it.
        patience: seconds that they wait for one another, where one may have work of its own.

    Raises:
        Disagreement: a process has other facts, does something else, failed in its block (which
            raises its own error), does not come, or does not see the first one's folder.
    """
    members = tuple(range(jax.process_count()) if members is None else members)
    facts: Facts = {}
    if folder is not None and (name := shown(folder)) != str(folder):
        facts, folder = {"working folder": name}, None
    if len(members) == 1:
        yield facts
        return
    name, index = f"vfjax/{'-'.join(map(str, members))}", jax.process_index()
    number, _rounds[name] = _rounds[name], _rounds[name] + 1
    key = f"{name}/{number}"
    own = f"{key}/verdict" if index == members[0] else f"{key}/{index}"
    try:
        yield facts
        facts = {"task": what, **facts}
        if index == members[0]:
            with _probe(key, folder):
                verdict = _compare(key, members, facts, patience)
            _set(own, verdict)
            _client().key_value_delete(f"{name}/{number - 1}/")  # which all have read
        else:
            if folder is not None:
                facts |= _seen(key, members[0], folder)
            _set(own, facts)
            told = _get(f"{key}/verdict", patience=patience)
            verdict = told if isinstance(told, dict) else _silent(members[0], patience)
    except BaseException as error:
        ended = isinstance(error, KeyboardInterrupt)
        said = "interrupted" if ended else type(error).__name__
        said = str(error) if isinstance(error, InputError) else said
        _set(own, {"failed": _failed(index, said)} if index != members[0] else _failed(index, said))
        raise
    if verdict:
        raise Disagreement(**verdict)


def _compare(key: str, members: Sequence[int], first: Facts, patience: float) -> Facts:
    """What is wrong, as arguments of InputError; empty if nothing is."""
    for index in members[1:]:
        other = _get(f"{key}/{index}", patience=patience)
        if not isinstance(other, dict):
            return _silent(index, patience)
        if "failed" in other:
            return dict(other["failed"])
        first = json.loads(json.dumps(first))
        for name in {**first, **other}:
            found, expected = (json.dumps(x[name]) if name in x else "none" for x in (other, first))
            if found != expected:
                return {
                    "where": f"process {index}: {name}",
                    "found": cut(found),
                    "expected": f"{cut(expected)}, as on process {members[0]}",
                    "fix": "start the same command, with the same files, on all hosts",
                }
    return {}


def _failed(index: int, said: str) -> Facts:
    return {
        "where": f"process {index}",
        "found": f"an end ({said})",
        "expected": "all processes to go on",
        "fix": "mend that, and start the same command on all hosts again",
    }


def _silent(index: int, patience: float) -> Facts:
    return {
        "where": f"process {index}",
        "found": f"no word in {patience:g} s",
        "expected": "all processes to come here",
        "fix": "run the same program on all hosts",
    }


@contextlib.contextmanager
def _probe(key: str, folder: Path | None) -> Iterator[None]:
    """A file in a folder, for the other processes to look for; what is made is removed."""
    if folder is None:
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = folder / f".vfjax-{secrets.token_hex(8)}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise InputError(
                folder,
                found=error.strerror or error,
                expected="a folder to write to",
                fix="pass another one",
            ) from error
        _set(f"{key}/probe", file.name)
        yield
    finally:
        file.unlink(missing_ok=True)
        for each in made:
            with contextlib.suppress(OSError):  # no longer empty
                each.rmdir()


def _seen(key: str, first: int, folder: Path) -> Facts:
    """A fact that the first process lacks, if its file is not in this one's folder."""
    name = _get(f"{key}/probe", f"{key}/verdict")
    end = time.monotonic() + SHARING
    while isinstance(name, str) and not (folder / name).exists():
        if time.monotonic() > end:
            return {f"working folder {folder}": f"another folder than process {first}'s"}
        time.sleep(0.1)
    return {}


def _client() -> _jax.DistributedRuntimeClient:
    return distributed.global_state.client


def _set(key: str, value: object) -> None:
    _client().key_value_set(key, json.dumps(value), allow_overwrite=True)


def _get(*keys: str, patience: float = PATIENCE) -> Facts | str | None:
    """The value that another process sets under one of the keys; None if it does not."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for key in keys:
            try:  # in turns, between which Python handles signals
                return json.loads(_client().blocking_key_value_get(key, 500))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
    return None


def preempted(step: int) -> bool:
    """Whether SIGTERM came to a process and this is the step at which all agree to stop.

    JAX's handler takes SIGTERM over at the first call, if it has not before.
    """
    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()
    return multihost_utils.reached_preemption_sync_point(step)


def digest(*arrays: object) -> str:
    """Some hex digits of SHA-256 of arrays that this process has whole."""
    total = hashlib.sha256()
    for x in arrays:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            value = np.ascontiguousarray(x)
            total.update(f"{value.dtype} {value.shape}".encode())
            total.update(value.reshape(-1).view(np.uint8).data)
    return total.hexdigest()[:16]


def announce(said: str) -> None:
    """Tells the other processes that this one ends, and why; see `watch`."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _set(ENDED, _failed(jax.process_index(), said))
        if jax.process_index() == 0:  # with which the store ends
            time.sleep(HEARD)


def watch(end: Callable[[str], None]) -> threading.Event:
    """Calls `end` with a line, on a thread, when another process has announced its end.

    Returns:
        What stops it, once it is set.
    """
    stop, client = threading.Event(), _client()

    def look() -> None:
        while not stop.wait(1):
            try:
                found = json.loads(client.key_value_try_get(ENDED))
            except jax.errors.JaxRuntimeError:  # nothing yet, or a store that is slow or has ended
                continue
            if jax.process_index() == 0:
                stop.wait(STAY)  # all look there, every second
            if not stop.is_set():
                end(str(InputError(**found)))
            return

    threading.Thread(target=look, name="vfjax-processes", daemon=True).start()
    return stop
