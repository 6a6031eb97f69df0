"""A small LLM beside transformers."""

import pytest

import converters
from tests import checkpoints


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> tuple:
    """Torch's plain LLM; model, processor."""
    folder = tmp_path_factory.mktemp("llm")
    return checkpoints.llama_folder(folder, 11), *converters.load(folder)
