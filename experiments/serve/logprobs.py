"""Log-probabilities in OpenAI's form."""

import dataclasses
import functools
import re

from transformers.convert_slow_tokenizer import bytes_to_unicode

from vfjax.atomic import JSON
from vfjax.generate import Logs
from vfjax.text.tokenizer import Tokenizer

TOP = 20
"""Alternatives of a token at most, by OpenAI."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


@dataclasses.dataclass(eq=False)
class Names:
    """What tokens are called.

    Attributes:
        tokenizer: transformers'.
    """

    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self._start = self.tokenizer("a", add_special_tokens=False).input_ids
        self.name = functools.cache(self._name)  # as many as the vocabulary has

    def content(self, logs: Logs, ids: list[int], top: int) -> list[JSON]:
        """A row's new tokens, each with `top` alternatives."""
        return [
            self._entry(token, chosen)
            | {
                "top_logprobs": [
                    self._entry(int(i), logprob)
                    for i, logprob in zip(others[:top], values[:top], strict=True)
                ]
            }
            for token, chosen, values, others in zip(ids, *logs, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, JSON]:
        text, data = self.name(token)
        return {"token": text, "bytes": list(data), "logprob": max(float(logprob), -9999.0)}

    def _name(self, token: int) -> tuple[str, bytes]:
        """A token's text, with the space that it begins with, and its bytes."""
        word = self.tokenizer.convert_ids_to_tokens(token) or ""
        if byte := _BYTE.fullmatch(word):
            data = bytes([int(byte[1], 16)])
            return data.decode(errors="replace"), data
        before, after = (
            self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self._start, [*self._start, token])
        )
        text = after[len(before) :]
        if "\N{REPLACEMENT CHARACTER}" in text and all(letter in _BYTES for letter in word):
            return text, bytes(_BYTES[letter] for letter in word)  # a part of a character
        return text, text.encode(errors="replace")
