"""The load on the server: what its clients print is read, and their requests are right."""

import shutil
import subprocess
from pathlib import Path

import pytest

import converters
from experiments.bench import serve
from experiments.serve.refused import Limits
from experiments.serve.request import read
from vfjax import InputError

SUMMARY = """
Summary:
  Total:\t31.0109 secs
  Slowest:\t5.1084 secs
  Requests/sec:\t7.7392

Latency distribution:
  10% in 1.6639 secs
  99% in 5.1000 secs

Status code distribution:
  [200]\t240 responses
  [429]\t3 responses

Error distribution:
  [2]\tPost "http://127.0.0.1:1/": read tcp 127.0.0.1:5->127.0.0.1:1: connection reset by peer
"""


def printed(text: str) -> subprocess.Popen:
    return subprocess.Popen(["printf", "%s", text], stdout=subprocess.PIPE, text=True)


def test_what_hey_prints_is_read() -> None:
    found = serve.read(printed(SUMMARY))
    assert found.answers == 240 and found.statuses == {"200": 240, "429": 3}
    assert list(found.errors.values()) == [2] and "reset by peer" in next(iter(found.errors))
    assert found.seconds == 31.0109 and found.percentiles == {"10": 1.6639, "99": 5.1}
    with pytest.raises(InputError, match="expected a summary"):
        serve.read(printed("no such host"))


def test_its_requests_are_right(tmp_path: Path) -> None:
    _, processor = converters.load(serve.MODEL)
    asked = [
        read(file.read_bytes(), Limits("clip"), processor)
        for file in serve.write(tmp_path).values()
    ]
    sizes = [next(((p.width, p.height) for p in each.pictures), None) for each in asked]
    assert sizes == [(48, 48), (640, 480), (2000, 1500), None]
    assert [each.stream for each in asked] == [False, False, False, True]


@pytest.mark.skipif(shutil.which("hey") is None, reason="hey is not installed")
def test_a_server_under_load(tmp_path: Path) -> None:
    """A few requests by hey to a server of its own."""
    file = serve.write(tmp_path)["48x48"]
    with serve.server() as (process, address):
        found = serve.load(address, file, clients=2, count=4)
        assert serve.status(process.pid, "VmRSS") > 100
    assert found.statuses == {"200": 4} and found.errors == {}
    assert process.returncode == 0
