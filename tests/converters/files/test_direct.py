import errno
import fcntl
import os

import numpy as np
import pytest

from converters.files import direct

BUFFER = 1 << 13


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(direct, "BUFFER", BUFFER)


def write(path, size, piece=1000):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    with direct.new_file(path, size) as append:
        for start in range(0, size, piece):
            append(data[start : start + piece].data)
    return data.tobytes()


def is_direct(file):
    return bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("size", [0, 5, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER, 29_999])
@pytest.mark.parametrize("piece", [1000, 4096, 20_000])
def test_a_file_has_the_bytes_that_were_appended(tmp_path, size, piece):
    (tmp_path / "x").write_bytes(b"of an earlier run" * 4096)
    assert write(tmp_path / "x", size, piece) == (tmp_path / "x").read_bytes()


def test_full_buffers_are_written_past_the_cache_and_the_rest_by_it(tmp_path, monkeypatch):
    """On the file systems that have direct writes; tmp_path's may have none."""
    try:
        os.close(os.open(tmp_path / "try", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct writes here")
    seen, plain = [], direct.write_all

    def told(file, data):
        seen.append((is_direct(file), len(data)))
        plain(file, data)

    monkeypatch.setattr(direct, "write_all", told)
    write(tmp_path / "x", 2 * BUFFER + 100)
    assert seen == [(True, BUFFER), (True, BUFFER), (False, 100)]
    seen.clear()
    write(tmp_path / "y", BUFFER - 1, BUFFER)
    assert seen == [(False, BUFFER - 1)]


def test_a_file_system_without_direct_writes(tmp_path, monkeypatch):
    opened = os.open

    def refusing(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(direct.os, "open", refusing)
    assert write(tmp_path / "x", 29_999) == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("cut", [0, 700])
def test_a_direct_write_that_is_refused_or_cut_short_goes_on_by_the_cache(
    tmp_path, monkeypatch, cut
):
    plain, calls = direct.write_all, []

    def refusing(file, data):
        if is_direct(file):
            calls.append(len(data))
            handle, flags = file.fileno(), fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            plain(file, data[:cut])
            fcntl.fcntl(handle, fcntl.F_SETFL, flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(file, data)

    monkeypatch.setattr(direct, "write_all", refusing)
    assert write(tmp_path / "x", 29_999) == (tmp_path / "x").read_bytes()
    assert len(calls) <= 1  # then never again


def test_a_full_disk_is_no_reason_to_try_again(tmp_path, monkeypatch):
    calls = []

    def full(file, data):
        calls.append(len(data))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", 29_999)
    assert calls == [BUFFER]


def test_a_folder_that_is_absent(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none/x", 29_999)
