"""Signals end tasks at once, with their line and code; see signalled.py for random moments."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
