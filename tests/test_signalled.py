"""Signals end tasks at once, with their line and code; see signalled.py for random moments."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from converters.__main__ import end
from experiments import signals
from experiments.serve.server import server
from vfjax import atomic

ROOT = Path(__file__).resolve().parents[1]

SLOW = """
import hashlib, signal, sys, time
sys.path.insert(0, {root!r})
from experiments import signals
signals.install()
try:
    if {ready}:
        signals.ready.set()
    print("runs", flush=True)
    if {python}:
        time.sleep(60)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # where Python runs no handler
except KeyboardInterrupt as error:
    signals.leave(error.args[0], ["cleaned"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("ready", "python", "notes"), [(True, True, ["cleaned"]), (True, False, []), (False, True, [])]
)
def test_a_signal_ends(number: int, ready: bool, python: bool, notes: list[str]) -> None:
    """In Python, in native code, before there is anything to clean up."""
    code = SLOW.format(root=str(ROOT), ready=ready, python=python)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "runs\n"
        time.sleep(0 if python else 1)  # until it is there
        sent = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=30)[1].splitlines()
    assert time.monotonic() - sent < 10
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.strsignal(number)}"
    assert said == [what, *notes] and process.returncode == 128 + number


NOBODY = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from experiments import signals
signals.install()
print("runs", flush=True)
if {full}:
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(65536))
    except BlockingIOError:
        os.set_blocking(2, True)
    print("full", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nobody_reads(number: int, full: bool) -> None:
    """Where stderr has no reader any more, as of a closed terminal, or one that does not read."""
    code = NOBODY.format(root=str(ROOT), full=full)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "runs\n"
        if full:
            assert process.stdout.readline() == "full\n"
        else:
            process.stderr.close()
        process.send_signal(number)
        try:
            assert process.wait(10) == 128 + number
        finally:
            process.kill()


def test_what_is_left_is_named(tmp_path: Path) -> None:
    """While it has its temporary name, and not after it."""
    before = signals.left()  # folders of GGUF files that other tests opened
    with atomic.temporary(tmp_path, ".made") as folder, atomic.replacing(tmp_path / "x") as part:
        part.write_text("half")
        assert sorted(signals.left()) == sorted([*before, str(folder), str(part)])
    assert signals.left() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_inspect_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with atomic.temporary(tmp_path) as folder:
        end(signal.SIGTERM, None)
        assert not folder.exists()
    assert codes == [143] and capsys.readouterr().err == "ended by Terminated\n"


def test_a_server_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal ends it at once; the first what still runs when its time is over."""
    left: list[int] = []

    def leave(number: int, notes: Sequence[str] = ()) -> None:
        left.append(number)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit

    monkeypatch.setattr(signals, "leave", leave)
    runs = server(None, timeout=1)
    runs.handle_exit(signal.SIGTERM, None)
    assert runs.should_exit and not left
    with pytest.raises(SystemExit):
        runs.handle_exit(signal.SIGINT, None)
    assert left.pop(0) == signal.SIGINT
    end = time.monotonic() + 10
    while not left and time.monotonic() < end:
        time.sleep(0.1)
    assert left == [signal.SIGTERM]


def test_an_interrupt_that_nobody_can_catch() -> None:
    """In a destructor, as in the garbage collector's callbacks of JAX."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from experiments import signals
signals.install()
signals.ready.set()
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
Slow()
print("goes on")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, timeout=30, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "ended by Terminated\n")


def test_a_task_that_stopped_while_a_program_compiled() -> None:
    """Nobody waits for the program."""
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from experiments import signals
from vfjax.train import stop
signals.finish()
threading.Thread(target=time.sleep, args=(600,), name=stop.THREAD).start()
print("stopped")
signals.finish()
print("goes on")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, timeout=300, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
