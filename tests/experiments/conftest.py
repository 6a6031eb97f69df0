"""A server of the shipped family's clip member, in the tests' own process."""

import dataclasses

import pytest
from starlette.testclient import TestClient

import converters
from experiments.serve.app import Service
from experiments.serve.batcher import LENGTHS, Batcher
from experiments.serve.refused import Limits
from tests.experiments.serving import MODEL


@pytest.fixture(scope="module")
def loaded() -> tuple:
    """With the batcher's lengths, so that both run the same programs."""
    model, processor = converters.load(MODEL, dtype="float32")
    return model, dataclasses.replace(processor, lengths=LENGTHS)


@pytest.fixture(scope="module")
def service(loaded):
    batcher = Batcher(*loaded, batch=4, every=2, max_new_tokens=64)
    limits = Limits("clip", body=1 << 20, pixels=200_000, pictures=3)
    yield Service(batcher, limits, queue=8)
    batcher.close()


@pytest.fixture(scope="module")
def client(service):
    with TestClient(service.app(), raise_server_exceptions=False) as client:
        yield client
