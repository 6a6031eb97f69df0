"""A socket that is had before anything slow, and a server that ends what runs before it ends."""

import asyncio
import ctypes
import socket
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiments import signals
from vfjax import InputError

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; called before a model is loaded, so that a port in use is told at once.

    Args:
        host: name or address, of IPv6 if it has a colon.
        port: 0 for any free one.

    Raises:
        InputError: it can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(
            "config.port",
            found=f"{host}:{port}, which can't be had ({error})",
            expected="a free port of this machine",
            fix="pass another --config.port, or 0",
        ) from None


def address(listener: socket.socket) -> str:
    """Of a listening socket, as a client writes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def share_memory() -> None:
    """Has glibc's threads share two arenas of memory; other C libraries are left as they are.

    By default there are eight a core, and each keeps the most that was ever taken from it:
    gigabytes after a few hundred photographs.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_ARENA_MAX, 2)


class Impatient(H11Protocol):
    """A connection that is closed where the head of a request takes longer than keep-alive does.

    uvicorn's own lets one that never asks anything stay for good.
    """

    late: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as uvicorn's own
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.late:
            self.late.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        if self.late:
            self.late.cancel()
        self.late = self.loop.call_later(self.timeout_keep_alive, self._end)

    def _end(self) -> None:
        if not self.transport.is_closing() and (not self.cycle or self.cycle.response_complete):
            self.transport.close()


class _Server(uvicorn.Server):
    """One that SIGTERM and SIGINT end within its timeout, and a second signal at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signals.leave(sig)
        self.should_exit = True
        patience = (self.config.timeout_graceful_shutdown or 0) + 1
        end = threading.Timer(patience, signals.leave, (sig, ["what still ran is cut off"]))
        end.daemon = True  # what ends in time ends with code 0
        end.start()


def server(
    app: ASGIApp, timeout: float, log_level: str = "warning", rest: int = 75
) -> uvicorn.Server:
    """A server of an ASGI application.

    Args:
        app: the application.
        timeout: seconds that what runs may still take when it is to end.
        log_level: of uvicorn.
        rest: seconds that a connection may wait for a request; longer than clients keep one.
    """
    return _Server(
        uvicorn.Config(
            app,
            http=Impatient,
            ws="none",
            access_log=False,
            log_level=log_level,
            timeout_keep_alive=rest,
            timeout_graceful_shutdown=max(1, int(timeout)),
        )
    )


def serve(
    app: ASGIApp, listener: socket.socket, timeout: float, log_level: str = "warning"
) -> None:
    """Runs an ASGI application until SIGTERM or SIGINT; arguments as in `server`."""
    share_memory()
    server(app, timeout, log_level).run(sockets=[listener])
