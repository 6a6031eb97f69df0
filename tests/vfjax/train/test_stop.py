"""Signals while a step's program compiles, and those that do not wait."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import jax.stages
import pytest

from tests.vfjax.train.test_loop import folder, kill, losses, run, same, whole
from vfjax.train import Stopped
from vfjax.train.stop import StopSignals, compiling, python_handles

__all__ = ["folder", "whole"]  # fixtures


@pytest.fixture
def slow(monkeypatch):
    """Has the given program, counted from 1, compile until the test's end; sends SIGTERM then."""
    gate, compile_it, count = threading.Event(), jax.stages.Lowered.compile, 0

    def slow(number: int) -> None:
        def held(self: jax.stages.Lowered) -> jax.stages.Compiled:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)
                assert gate.wait(600)
            return compile_it(self)

        monkeypatch.setattr(jax.stages.Lowered, "compile", held)

    yield slow
    gate.set()
    end = time.monotonic() + 600
    while compiling() and time.monotonic() < end:
        time.sleep(0.1)
    assert not compiling()


def wider(batch):
    """A batch of another shape: one more row of padding."""
    return jax.tree.map(lambda x: x.repeat(2, axis=0), batch)


def test_another_shape_that_compiles_long(folder, whole, tmp_path, slow) -> None:
    """The state before it is saved, though it is not the one for a save."""
    slow(2)
    shapes = iter([lambda batch: batch, wider])
    with pytest.raises(Stopped, match="1"):
        run(folder, tmp_path, change=lambda batch: next(shapes)(batch))
    assert compiling()
    model = run(folder, tmp_path, at=0, happens=kill)
    assert losses(tmp_path) == losses(whole[0])
    assert same(model, whole[1])


def test_a_first_compile_of_a_run_that_goes_on(folder, tmp_path, slow) -> None:
    """Its state is there; none is written."""
    with pytest.raises(Stopped, match="1"):
        run(folder, tmp_path, at=1, happens=lambda: os.kill(os.getpid(), signal.SIGTERM))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").rglob("*")}
    slow(1)
    with pytest.raises(Stopped, match="1"):
        run(folder, tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "states").rglob("*")}


def test_a_task_that_ends_in_its_first_compile(folder, tmp_path, slow, monkeypatch) -> None:
    """By its own handler, as in `experiments/signals.py`; what it says is where it goes on."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    slow(1)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            run(folder, tmp_path)
    finally:
        assert signal.signal(signal.SIGTERM, before) == interrupt
    assert caught.value.__notes__ == ["no step is saved: the same command starts anew"]


def test_a_handler_in_c_gives_way_and_is_back() -> None:
    """As JAX's of several processes."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with StopSignals() as stop:
            ctypes.CDLL(None).signal(int(signal.SIGTERM), 1)  # SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert not heard
            with python_handles(stop.before):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["before the first step", "twice"])
def test_a_signal_that_does_not_wait(number, moment) -> None:
    """With nothing to lose, and the second one, while the main thread runs no Python."""
    code = f"""
import os, signal, threading, time
import jax
from vfjax.train.stop import StopSignals
with StopSignals() as stop:
    if {moment == "twice"}:
        assert not stop.asked(1)
        threading.Timer(1, os.kill, (os.getpid(), {int(number)})).start()
    threading.Timer(0, os.kill, (os.getpid(), {int(number)})).start()
    @jax.jit
    def slow(x):
        return jax.lax.while_loop(lambda x: x < 2, jax.numpy.sin, x)
    slow(1.0).block_until_ready()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, timeout=300, check=False, capture_output=True, text=True)
    assert ("the step's state is not saved" in done.stderr) == (moment == "twice")
    assert done.returncode == (128 + number if moment == "twice" else -number)
