"""SIGTERM, SIGINT and SIGHUP end a task at any moment, even while Python runs no handlers.

The main thread is asked first, by a KeyboardInterrupt that holds the signal; it may clean up. A
thread, which reads the signals' numbers from a pipe as they come, ends the process if that takes
too long, or at a second signal.
"""

import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOMENT = 1.0
"""Seconds for the main thread to hear of a signal while nothing is being written."""
GRACE = 7.0
"""Seconds for it to clean up."""

heard: list[int] = []
"""The signal that the main thread was asked to end by."""
ready = threading.Event()
"""Set while there is somebody to catch the KeyboardInterrupt."""


def name(number: int) -> str:
    """What a signal did, in words."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.strsignal(number)}"


def raise_it(number: int, _: object) -> None:
    """The handler."""
    if not ready.is_set():
        leave(number)
    if not heard:
        heard.append(number)
        raise KeyboardInterrupt(number)


def install() -> None:
    """Handles all three, but for one that is ignored, as by nohup; has stdout written by lines."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for each in NUMBERS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, raise_it)
    sys.unraisablehook = _uncaught
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    if isinstance(sys.stdout, io.TextIOWrapper):  # else a pipe would lose what is not flushed
        sys.stdout.reconfigure(line_buffering=True)


def _uncaught(error: "sys.UnraisableHookArgs") -> None:
    """Ends the process if the KeyboardInterrupt came where none is caught, as in a destructor."""
    if heard and issubclass(error.exc_type, KeyboardInterrupt):
        leave(heard[0])
    sys.__unraisablehook__(error)


def _watch(reader: int) -> None:
    first, came = 0, 0.0
    while True:
        if select.select([reader], [], [], 0.1 if first else None)[0]:
            number = os.read(reader, 1)[0]
            if number not in NUMBERS or signal.getsignal(number) is not raise_it:
                continue  # another handler, such as a server's, ends its work as it likes
            if first:
                leave(number)
            first, came = number, time.monotonic()
        if time.monotonic() - came > (GRACE if heard or left() else MOMENT):
            leave(first)


def left() -> list[str]:
    """Files and folders that are being written under a name that nothing loads."""
    atomic = sys.modules.get("vfjax.atomic")
    return [str(path) for path in tuple(getattr(atomic, "UNFINISHED", ())) if path.exists()]


def leftovers() -> list[str]:
    """A line for each of them that a process leaves."""
    return [f"{path} is left; nothing loads it" for path in left()]


before: list[Callable[[str], object]] = []
"""Called with what is said before the process ends."""


def leave(number: int, notes: Iterable[str] = ()) -> NoReturn:
    """Ends the process at once, with a line and the shell's exit code."""
    lines = [name(number), *notes, *leftovers()]
    say("\n".join(lines) + "\n")
    if before:  # which may wait for another process
        timer = threading.Timer(2 * MOMENT, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()
    for call in before:
        call(name(number))
    os._exit(128 + number)


def finish() -> None:
    """Ends the process well if it stopped while a program compiled: Python would wait for that."""
    stop = sys.modules.get("vfjax.train.stop")
    if stop is not None and stop.compiling():
        sys.stdout.flush()
        for line in leftovers():
            say(line + "\n")
        os._exit(0)


def say(text: str) -> None:
    """Writes to stderr, whoever holds its lock, unless that would wait for a reader or has none."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # none, a terminal that is gone
        file = sys.stderr.fileno()
        if select.select([], [file], [], 0)[1]:
            os.write(file, text.encode()[: select.PIPE_BUF])
