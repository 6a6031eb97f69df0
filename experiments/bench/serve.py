"""The server under load: 64 clients for ten minutes beside one at a time, and its memory.

    python experiments/bench/serve.py [--quick] [--seconds=600] --out=FILE.json

The clients are those of `hey` (Debian's package of that name), four kinds of request, 16 clients
each, on this machine's loopback. The model is a small one of the shipped family, so this is about
the server, not about the speed of models.
"""

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.common import report, row
from vfjax import InputError
from vfjax.atomic import JSON

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "experiments" / "family" / "models" / "clip"
PACKAGES = ("jax", "jaxlib", "starlette", "uvicorn", "vfjax")
CLIENTS = 16
"""Of each kind."""
PERIOD = 1.0
"""Seconds between two looks at the memory."""


@dataclasses.dataclass
class Load:
    """What clients of one kind saw.

    Attributes:
        statuses: HTTP status -> answers.
        errors: what no answer came for -> times.
        seconds: of the whole, as the clients count.
        percentiles: share of the answers in per cent -> seconds.
    """

    statuses: dict[str, int]
    errors: dict[str, int]
    seconds: float
    percentiles: dict[str, float]

    @property
    def answers(self) -> int:
        return self.statuses.get("200", 0)


def main(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the file."""
    if shutil.which("hey") is None:
        raise InputError("PATH", found="no hey", expected="it", fix="apt-get install hey")
    alone_seconds = 1 if args.quick else 10
    with tempfile.TemporaryDirectory() as name:
        bodies = write(Path(name))
        with server() as (process, address):
            for kind, body in bodies.items():  # compiles
                for clients in (1, 4, CLIENTS):
                    load(address, body, clients, count=4 * clients)
                print(f"ready for {kind}", flush=True)
            before = alone(address, bodies, alone_seconds)
            start = time.perf_counter()
            found, memory = together(process, address, bodies, args.seconds)
            wall = time.perf_counter() - start
            after = alone(address, bodies, alone_seconds)
            peak = status(process.pid, "VmHWM")
    answers = sum(each.answers for each in found.values())
    single = {kind: (before[kind] + after[kind]) / 2 for kind in bodies}
    mixed = sum(each.answers * single[kind] for kind, each in found.items()) / answers
    minutes = memory[int(60 / PERIOD) - 1 :: int(60 / PERIOD)] or memory[-1:]
    rows = [
        row("an answer of 64 clients' mix", [1e3 * wall / answers], [1e3 * mixed], "alone", "ms"),
        row("memory at the end", [memory[-1]], [minutes[0]], "minute 1", "MiB"),
    ]
    notes = {
        "clients": CLIENTS * len(bodies),
        "seconds": wall,
        "answers": answers,
        "answers a second": answers / wall,
        "answers a second, one at a time": 1 / mixed,
        "kinds": {kind: dataclasses.asdict(each) for kind, each in found.items()},
        "one at a time, seconds": {kind: [before[kind], after[kind]] for kind in bodies},
        "memory by minute, MiB": minutes,
        "largest memory, MiB": peak,
    }
    print(json.dumps(notes, indent=2))
    report(rows, notes, PACKAGES, args.out)


def write(folder: Path) -> dict[str, Path]:
    """Bodies of requests, by kind."""
    rng = np.random.default_rng(0)

    def picture(width: int, height: int, kind: str) -> JSON:
        small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((width, height)).save(out, kind)
        url = f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def body(text: str, *pictures: JSON, **how: JSON) -> dict[str, JSON]:
        content: JSON = [*pictures, {"type": "text", "text": text}]
        greedy = {"temperature": 0, "max_tokens": 16}
        said: JSON = [{"role": "user", "content": content}]
        return {"model": "clip", "messages": said, **greedy, **how}

    question = "how many digits ?"
    bodies = {
        "48x48": body(question, picture(48, 48, "PNG")),
        "640x480": body(question, picture(640, 480, "JPEG")),
        "2000x1500": body(question, picture(2000, 1500, "JPEG")),
        "text, streamed": body("red", temperature=3, max_tokens=48, stream=True),
    }
    out = {}
    for i, (kind, found) in enumerate(bodies.items()):
        out[kind] = folder / f"{i}.json"
        out[kind].write_text(json.dumps(found))
    return out


@contextlib.contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and the address of its chat completions; it must end well."""
    run = [sys.executable, "experiments/run.py", "--config=experiments/configs/serve.py"]
    settings = [f"--config.model={MODEL}", "--config.port=0", "--config.dtype=float32"]
    process = subprocess.Popen([*run, *settings], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise InputError("server", found="no address", expected="one", fix="see above")
        yield process, f"{line.split()[-1]}/chat/completions"
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise InputError(
                "server", found=f"exit code {process.returncode}", expected="0", fix="see above"
            )
    finally:
        process.kill()


def start(address: str, body: Path, clients: int, limit: list[str]) -> subprocess.Popen[str]:
    request = ["-m", "POST", "-T", "application/json", "-D", str(body), "-t", "120"]
    command = ["hey", "-c", str(clients), *limit, *request, address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def load(address: str, body: Path, clients: int, count: int) -> Load:
    """A fixed count of requests."""
    return read(start(address, body, clients, ["-n", str(count)]))


def read(process: subprocess.Popen[str]) -> Load:
    """What `hey` prints at its end."""
    text, _ = process.communicate()
    total = re.search(r"Total:\s+([\d.]+) secs", text)
    if process.returncode or total is None:
        raise InputError("hey", found=text.strip()[-80:], expected="a summary", fix="see above")
    _, _, errors = text.partition("Error distribution:")
    statuses = re.findall(r"\[(\d+)\]\s+(\d+) responses", text)
    return Load(
        statuses={status: int(count) for status, count in statuses},
        errors={what.strip(): int(count) for count, what in re.findall(r"\[(\d+)\](.+)", errors)},
        seconds=float(total[1]),
        percentiles={k: float(v) for k, v in re.findall(r"(\d+)% in ([\d.]+) secs", text)},
    )


def alone(address: str, bodies: Mapping[str, Path], seconds: int) -> dict[str, float]:
    """Seconds of an answer, one request at a time."""
    out = {}
    for kind, body in bodies.items():
        found = read(start(address, body, 1, ["-z", f"{seconds}s"]))
        out[kind] = found.seconds / found.answers
    return out


def together(
    process: subprocess.Popen[str], address: str, bodies: Mapping[str, Path], seconds: int
) -> tuple[dict[str, Load], list[float]]:
    """All kinds at once, and the server's memory in MiB, a value a second."""
    limit = ["-z", f"{seconds}s"]
    running = {kind: start(address, body, CLIENTS, limit) for kind, body in bodies.items()}
    memory: list[float] = []
    began = time.perf_counter()
    while any(each.poll() is None for each in running.values()):
        time.sleep(max(0.0, began + PERIOD * (len(memory) + 1) - time.perf_counter()))
        memory.append(status(process.pid, "VmRSS"))
    return {kind: read(each) for kind, each in running.items()}, memory


def status(pid: int, key: str) -> float:
    """A size of a process in MiB, as Linux tells it."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    if found is None:
        raise InputError("server", found=f"no {key}", expected="a running process", fix="see above")
    return int(found[1]) / 1024


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="the server under load")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--seconds", type=int, help="of the load; default: 600, quick 5")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if args.seconds is None:
        args.seconds = 5 if args.quick else 600
    return args


if __name__ == "__main__":
    try:
        main(arguments())
    except InputError as error:
        sys.exit(str(error))
