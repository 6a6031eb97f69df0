"""Signals that end training: at a step, and while a step's program compiles.

Python handles no signal while the main thread is in XLA's compiler, for minutes: programs compile
on a thread, for which the main one waits in Python.
"""

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import jax
from flax import nnx
from jax.stages import Compiled, Wrapped

from vfjax.model import Batch
from vfjax.processes import preempted
from vfjax.train.step import State

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK = 0.1
"""Seconds between two looks at what compiles."""
THREAD = "vfjax-compile"
"""Name of the thread that compiles; Python's own end waits for it."""


class Stopped(Exception):
    """The run was asked to end by a signal and saved its state; the step is its argument."""


class StopSignals:
    """Whether SIGTERM, SIGHUP or Ctrl-C came, on several processes SIGTERM.

    As a context, which puts back the handlers that were there. Until there is a state to save
    (`saves`) signals do what they did before it, or end the process: nothing is lost. A second one
    ends it at once, whatever is going on: the thread that counts them does not wait for the main
    one.
    """

    def __init__(self) -> None:
        self.alone = jax.process_count() == 1
        self.came: list[int] = []
        before = {each: signal.getsignal(each) for each in NUMBERS}
        # Ignored ones, as by nohup, stay so.
        self.before = {k: old for k, old in before.items() if old not in (None, signal.SIG_IGN)}
        self.undo: list[Callable[[], object]] = []

    def __enter__(self) -> "StopSignals":
        for each, old in self.before.items():
            if self.alone and old in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(each, signal.SIG_DFL)
        return self

    def __exit__(self, *error: object) -> None:
        for call in self.undo:
            call()
        for each, old in self.before.items():
            if self.alone:
                signal.signal(each, old)

    def saves(self) -> None:
        """From now on there is a state to save: a first signal is kept for `asked`."""
        if self.alone and not self.undo:
            self.undo.append(_second_ends(tuple(self.before)))
            for each in self.before:
                signal.signal(each, lambda number, _: self.came.append(number))

    def asked(self, step: int) -> bool:
        """Whether to stop behind a step; on several processes, at one that all agree on."""
        if self.alone:
            self.saves()
            return bool(self.came)
        if stop := preempted(step):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one waits for no save
        return stop


class Programs:
    """A step's programs, one for each shape of its batches, compiled on a thread.

    On several processes, which could not agree on a step before all have compiled, signals do
    meanwhile what they did before `StopSignals`.
    """

    def __init__(self, step: Wrapped, stop: StopSignals):
        self.step, self.stop = step, stop
        self.known: dict[Hashable, Compiled] = {}

    def find(self, state: State, frozen: nnx.State, batches: Batch) -> Compiled | None:
        """The program that takes these, or None if it is to stop before it is there."""
        leaves, tree = jax.tree.flatten(batches)
        kind = (tree, *((x.shape, x.dtype) for x in leaves))
        if kind not in self.known and not self.stop.came:
            with contextlib.nullcontext() if self.stop.alone else python_handles(self.stop.before):
                self._compile(kind, state, frozen, batches)
        return None if self.stop.came else self.known[kind]

    def _compile(self, kind: Hashable, *given: object) -> None:
        lowered = self.step.lower(*given)
        done: Future[Compiled] = Future()

        def work() -> None:
            try:
                done.set_result(lowered.compile())
            except BaseException as error:  # raised where it is waited for
                done.set_exception(error)

        if not self.stop.came:
            threading.Thread(target=work, name=THREAD).start()
        while not self.stop.came:
            if wait_for([done], timeout=LOOK).done:
                self.known[kind] = done.result()
                return


@contextlib.contextmanager
def resumes(saved: Callable[[], int | None]) -> Iterator[None]:
    """Notes on a KeyboardInterrupt where the next run goes on; `saved` tells the last step."""
    try:
        yield
    except KeyboardInterrupt as error:
        step = saved()
        error.add_note(
            "no step is saved: the same command starts anew"
            if step is None
            else f"step {step} is saved: the same command goes on from there"
        )
        raise


def compiling() -> bool:
    """Whether a program still compiles that nobody waits for any more."""
    return any(thread.name == THREAD for thread in threading.enumerate())


@contextlib.contextmanager
def python_handles(before: Mapping[signal.Signals, object]) -> Iterator[None]:
    """SIGTERM as it was before JAX took it, by a handler written in C, which gets it back."""
    if signal.SIGTERM not in before:
        yield
        return
    libc, kept = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # beyond a struct sigaction
    libc.sigaction(int(signal.SIGTERM), None, kept)
    signal.signal(signal.SIGTERM, before[signal.SIGTERM])  # type: ignore[arg-type]
    yield  # an error ends the run: a second signal then does what this one did
    libc.sigaction(int(signal.SIGTERM), kept, None)


def _second_ends(numbers: Sequence[int]) -> Callable[[], object]:
    """Has the second of these signals end the process; returns what undoes it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def count() -> None:
        seen = 0
        while number := os.read(reader, 1):
            seen += number[0] in numbers
            if seen == 2:
                what = signal.strsignal(number[0])
                line = f"ended by {what}: the step's state is not saved; the one before is\n"
                if select.select([], [2], [], 0)[1]:  # else nobody reads it
                    os.write(2, line.encode())
                os._exit(128 + number[0])
        os.close(reader)

    threading.Thread(target=count, name="vfjax-signals", daemon=True).start()
    others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def undo() -> None:
        signal.set_wakeup_fd(others)
        os.close(writer)

    return undo
