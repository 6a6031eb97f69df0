"""Pictures that are fetched, from named hosts alone."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from experiments.serve.addresses import fetch
from experiments.serve.refused import Limits, Refused


def test_fetching_is_for_named_hosts(tmp_path: Path):
    files = {"/a.png": b"picture", "/large": bytes(5000)}

    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    path = connection.recv(4096).split()[1].decode()
                    body = files.get(path)
                    if body is None:
                        head = (
                            b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\nContent-Length: 0\r\n\r\n"
                        )
                    else:
                        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
                    connection.sendall(head + (body or b""))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        limits = Limits("clip", body=1000, hosts=(host,))
        assert fetch(f"http://{host}/a.png", "here", limits) == b"picture"
        for address, words in {
            f"http://{host}/large": "more than 1000 bytes",
            f"http://{host}/moved": "status 302",
            f"http://{host}.other/a.png": "an address at",
            f"http://{host}@other/a.png": "an address at",
            "http://127.0.0.1/a.png": "an address at",
            "http://[/a.png": "an address at",
        }.items():
            with pytest.raises(Refused, match=words):
                fetch(address, "here", limits)
