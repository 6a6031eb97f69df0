"""What a request may hold, and the answer to one that holds something else."""

import dataclasses
import json
from collections.abc import Mapping
from typing import NoReturn


class Refused(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP's.
        code: a word for programs.
        param: the key at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(" ".join(message.split()))
        self.status, self.code, self.param, self.headers = status, code, param, headers


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Attributes:
        model: name of the model, which requests must give.
        body: bytes of a body, and of a picture that is fetched.
        pixels: of all pictures of a request.
        pictures: of a request.
        choices: answers to a request.
        hosts: "host" or "host:port" from which pictures may be fetched.
        fetch_timeout: seconds for each read from there.
    """

    model: str
    body: int = 20 << 20
    pixels: int = 32_000_000
    pictures: int = 16
    choices: int = 16
    hosts: tuple[str, ...] = ()
    fetch_timeout: float = 10.0


def bad(where: str, found: object, expected: str) -> NoReturn:
    """Refuses a request by the key at fault.

    Raises:
        Refused: always, status 400.
    """
    text = f"{where}: found {found}, expected {expected}; correct the request"
    raise Refused(400, text, param=where.split("[")[0])


def cut(value: object) -> str:
    """JSON of a value, of 40 letters at most."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
