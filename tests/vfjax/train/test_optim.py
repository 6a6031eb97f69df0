"""Options of training that are out of range."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.test_bad_input import refused
from vfjax.nn.lora import LoRAConfig
from vfjax.train import Group, Optim, Options


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Group("llm/", -1.0), "group 'llm/': found rate -1.0"),
        (lambda: Group("llm/", 1.0, -0.1), "group 'llm/': found decay -0.1"),
        (lambda: Optim(3, warmup=1.5), "warmup: found 1.5"),
        (lambda: Optim(3, clip=0.0), "clip: found 0.0"),
        (lambda: Options(save_every=0), "save_every: found 0"),
        (lambda: Options(keep=-1), "keep: found -1"),
        (lambda: Options(log_every=0), "log_every: found 0"),
        (lambda: Options(profile=(5, 2)), "profile: found (5, 2)"),
        (lambda: Options(dtype="abc"), "dtype: found abc"),
        (lambda: Options(dtype="int8"), "dtype: found int8"),
        (lambda: Options(dtype="\udcff"), "dtype: found \\udcff"),
        (lambda: LoRAConfig(rank=-1), "lora.rank: found -1"),
        (lambda: LoRAConfig(pattern="("), "lora.pattern: found '('"),
    ],
)
def test_out_of_range(make: Callable[[], Any], words: str):
    refused(make, words)
