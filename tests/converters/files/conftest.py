"""Servers of buckets."""

from collections.abc import Iterator

import pytest

from converters.files import output
from tests.buckets import serving


@pytest.fixture(scope="session")
def servers() -> Iterator[None]:
    """Moto's S3 server and a GCS emulator; a run that writes there says often that it lives."""
    with serving("s3", "gs"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "BEAT", 0.2)
        yield
