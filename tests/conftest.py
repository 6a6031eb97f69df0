"""Eight CPU devices, one thread for PyTorch, no network, one cache of compiled programs for all
processes of a run; set before jax and torch are imported.
"""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_use_fusion_emitters": "false",  # they take half the time that compiling takes
    "--xla_cpu_parallel_codegen_split_count": 1,
}

for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # GPU and TPU default to less
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the reference outputs were recorded on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, and a shell's &, have children ignore
signal.signal(signal.SIGINT, signal.default_int_handler)  # these

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else of pytest-xdist's controller
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vfjax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault(
    "JAX_DISABLE_MOST_OPTIMIZATIONS", "1"
)  # LLVM took a third of the suite's time

import jax  # noqa: E402 - reads the environment
import jax._src.compiler as compiler  # noqa: E402 - options of all programs have no public name

hypothesis.settings.register_profile("vfjax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vfjax")


def pytest_collection_finish() -> None:
    """The collector passes over what was imported, which stays anyway."""
    gc.freeze()


MOST = 3 << 29
"""Bytes of a process above which it lets go of what it compiled; where it has more without that,
they may grow by a sixth of them.
"""

_most = MOST


def let_go() -> None:
    """Bounds a process's memory: the programs of the whole suite are 6 GB.

    The C library would keep what is freed.
    """
    global _most
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _most = max(MOST, resident() + MOST // 6)


def resident() -> int:
    """Bytes of this process's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """After each test."""
    if resident() > _most:
        let_go()


@pytest.fixture(scope="module")
def room() -> None:
    """For models of true size, as little of other tests' as possible."""
    let_go()


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Programs as users run them, where bits are compared, not those that compile fast."""
    made = compiler.get_compile_options

    def users(*args: Any, **kwargs: Any) -> Any:
        options = made(*args, **kwargs)
        options.env_option_overrides = [
            *options.env_option_overrides,
            ("xla_cpu_use_fusion_emitters", True),
        ]
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", users)
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
        yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs, data and tokenizers: `../shared`, or $VFJAX_SHARED."""
    named = os.environ.get("VFJAX_SHARED")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        if named:
            pytest.fail(f"VFJAX_SHARED: found no folder {named}; name one that exists, or unset it")
        pytest.skip(f"no folder {path}; name another in VFJAX_SHARED")
    return path
