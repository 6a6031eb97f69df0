"""Pictures at the addresses that a request gives: data, or hosts that the operator named."""

import base64
import binascii
from urllib.parse import urlsplit

import httpx2

from experiments.serve.pictures import read_picture
from experiments.serve.refused import Limits, Refused, bad
from vfjax import InputError
from vfjax.vision.images import File


class Budget:
    """Decodes pictures while a request has room for them; limits: of the request."""

    def __init__(self, limits: Limits):
        self.limits, self.pictures, self.pixels = limits, limits.pictures, limits.pixels

    def picture(self, address: str, where: str) -> File:
        """The picture at an address.

        Args:
            address: "data:..." with base64, or one that the limits let be fetched.
            where: what to call it in errors.

        Raises:
            Refused: there is none, or no room for it.
        """
        self.pictures -= 1
        if self.pictures < 0:
            bad(where, "another picture", f"at most {self.limits.pictures} in a request")
        scheme = address.split(":", 1)[0].lower()
        if scheme == "data":
            data = _data(address, where)
        elif scheme in ("http", "https"):
            data = fetch(address, where, self.limits)
        else:
            bad(where, "an address of another kind", "data: with base64, or http(s):")
        try:
            image = read_picture(data, where, self.pixels)
        except InputError as error:
            raise Refused(400, str(error), param="messages") from None
        self.pixels -= image.width * image.height
        return image


def _data(address: str, where: str) -> bytes:
    head, comma, text = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        bad(where, "a data address without base64", "data:image/...;base64,...")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        bad(where, f"broken base64 ({error})", "base64")


def fetch(address: str, where: str, limits: Limits) -> bytes:
    """A picture from a host that the operator named; redirections are not followed.

    Raises:
        Refused: another host, or it doesn't answer as it should.
    """
    try:
        url = urlsplit(address)
        host = url.netloc
    except ValueError:
        host = ""
    if not host or host.lower() not in limits.hosts:
        bad(where, f"an address at {host[:60]!r}", "data:, or a host that allow_hosts names")
    parts = []
    try:
        with httpx2.stream("GET", address, timeout=limits.fetch_timeout) as answer:
            if answer.status_code != 200:
                bad(where, f"status {answer.status_code} at {host}", "200")
            for part in answer.iter_bytes(1 << 16):
                parts.append(part)
                if sum(map(len, parts)) > limits.body:
                    bad(where, f"more than {limits.body} bytes at {host}", "fewer")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        bad(where, f"no answer from {host} ({type(error).__name__})", "a picture")
    return b"".join(parts)
