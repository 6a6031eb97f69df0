"""The one entry: `python experiments/run.py --config=experiments/configs/NAME.py`.

`config.task` names a module of `experiments/tasks`; its `run(config, workdir)` does the work.
"""

import importlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import signals

if __name__ == "__main__":
    signals.install()  # before the imports, which take seconds
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # tokenizers need no torch

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from converters.files.paths import working
from experiments.values import check_values
from vfjax import InputError, __version__, processes

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "outputs", "Where results are written.")

START = 45
"""Seconds for all processes to start, unless VFJAX_INITIALIZATION_TIMEOUT says otherwise."""
HEARTBEAT = 30
"""Seconds without a sign of life after which one of several processes counts as lost."""
PATIENCE = 3
"""Seconds for which a process that failed waits for the others to fail as well."""


def parse(argv: Sequence[str]) -> list[str]:
    """Flags, with one line in place of a traceback for a config that is absent or misspelt."""
    for flag, _, value in (each.partition("=") for each in argv):
        path = Path(value.partition(":")[0])
        if flag in ("--config", "-config") and path.exists() and not path.is_file():
            fail(f"--config: found {path}, which is no file, expected one; correct the path")
    try:
        return flags.FLAGS(list(argv))
    except (AttributeError, KeyError) as error:
        found = error.args[0]
        found = found.args[0] if isinstance(found, KeyError) else found
        fail(f"--config: found unknown key {found}, expected one of the config file; correct it")
    except (flags.Error, TypeError, ValueError, OSError, SyntaxError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Ends the run with one line on stderr and exit code 2."""
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def read_task() -> tuple[ConfigDict, ModuleType]:
    """The config of --config with its overrides, and the module that it names."""
    config = CONFIG.value
    if config is None:
        fail("--config: found nothing, expected a file; pass --config=experiments/configs/NAME.py")
    try:
        return config, importlib.import_module(f"experiments.tasks.{config.task}")
    except (AttributeError, OSError) as error:  # an absent file fails when its config is read
        found = error.__cause__ or error
        fail(f"--config: found no config ({found}), expected a file with a task; correct the path")
    except ModuleNotFoundError as error:
        fail(f"config.task: found no module {error.name}, expected it; correct or install it")


def join_processes() -> None:
    """The same command runs on every host: connects them, and lets the first one print.

    JAX itself reads JAX_COORDINATOR_ADDRESS, but neither the number of processes nor this one's.
    Python keeps stdout and stderr; what native code writes there goes through `stderr_filter.py`,
    as Gloo greets on file descriptor 1 and XLA aborts a process when another is lost.
    """
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(file), "w", buffering=1, errors="backslashreplace") for file in (1, 2)
    )
    stderr_filter = [sys.executable, str(Path(__file__).with_name("stderr_filter.py"))]
    pipe = subprocess.Popen(stderr_filter, stdin=subprocess.PIPE).stdin
    assert pipe is not None
    for file in (1, 2):
        os.dup2(pipe.fileno(), file)
    pipe.close()
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "VFJAX_INITIALIZATION_TIMEOUT")
    jax.config.update("jax_enable_preemption_service", False)  # training starts it
    try:
        count, index, start = (
            int(os.environ[name]) if name in os.environ else None for name in names
        )
        processes.initialize(
            start or START,
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, IndexError) as error:  # the latter of an address without a port
        fail(f"VFJAX_DISTRIBUTED: found no cluster ({error}), expected one; see BUILD.md")
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave_soon(code: int, said: str = "") -> None:
    """Ends this process, of several, though others run on: JAX would wait minutes for them.

    They end too: by what is said to them, or when they miss its heartbeats. What native code says
    of those that are gone before it is of no use any more.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        os.dup2(nowhere, file)
    if said:
        processes.announce(said)
    timer = threading.Timer(PATIENCE, os._exit, (code,))
    timer.daemon = True
    timer.start()


def follow(line: str) -> None:
    """Ends this process as another one has ended."""
    print("\n".join((line, *signals.leftovers())), file=sys.stderr)
    os._exit(2)


def main(argv: Sequence[str]) -> None:
    sys.setswitchinterval(0.0005)  # a writer should not wait 5 ms for each of its readers
    logging.set_verbosity(logging.WARNING)  # JAX tells of every platform that it does not find
    if len(argv) > 1:
        fail(f"{argv[1]}: found an argument without --, expected flags only; see README.md")
    config, task = read_task()
    alone = not os.environ.get("VFJAX_DISTRIBUTED")
    if not alone:
        join_processes()
        watched = processes.watch(follow)
        signals.before.append(processes.announce)
    try:
        signals.ready.set()
        check_values(config)
        # One process asks JAX for nothing: a plan says how many devices stand for GPUs.
        with processes.agreeing(config.task, (0,) if alone else None) as facts:
            facts |= {"vfjax": __version__, "jax": jax.__version__} | flat("config", config)
        with working(WORKDIR.value, write=alone or not jax.process_index()) as folder:
            task.run(config, folder)
        signals.ready.clear()
        signals.finish()
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        if alone:  # threads that still compute are not waited for
            traceback.clear_frames(error.__traceback__)  # and temporary folders that they hold
            signals.leave(number, getattr(error, "__notes__", ()))
        watched.set()
        leave_soon(128 + number, signals.name(number))
        print("\n".join((signals.name(number), *getattr(error, "__notes__", ()))), file=sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        signals.ready.clear()
        if alone and signals.heard:  # a library made this of the KeyboardInterrupt
            signals.leave(signals.heard[0])
        if not alone:
            if isinstance(error, jax.errors.JaxRuntimeError):
                # For another process, or XLA, to say that one has ended or is lost, if one is.
                time.sleep(1.5 * HEARTBEAT)
            watched.set()
            known = isinstance(error, processes.Disagreement)
            leave_soon(2, "" if known else str(error).partition("\n")[0])
        if isinstance(error, InputError):
            fail(str(error))
        raise


def flat(name: str, config: object) -> dict[str, str]:
    """The values of a config by their dotted keys."""
    if not isinstance(config, ConfigDict):
        return {name: repr(config)}
    return {
        key: value
        for field in config
        for key, value in flat(f"{name}.{field}", config[field]).items()
    }


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
