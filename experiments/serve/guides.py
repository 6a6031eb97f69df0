"""Answers in JSON: llguidance says which tokens may come next."""

import functools
import json
from typing import Any, NoReturn

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from vfjax import InputError, Processor

LETTERS = 1 << 16
"""Of a schema at most."""
SPACES = 20
"""Between an answer's words at most; some models would write them for ever."""


class Guide:
    """A row's way through a grammar; a `vfjax.generate.Guide`."""

    def __init__(self, matcher: LLMatcher, stops: tuple[int, ...]):
        self.matcher, self.stops = matcher, stops

    def allowed(self, vocab: int) -> np.ndarray:
        """bool[vocab]: the ids that may come next; the stops where nothing else can."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        found = np.zeros(vocab, bool)
        known = np.unpackbits(bits, bitorder="little", count=min(vocab, 8 * len(bits)))
        found[: len(known)] = known
        if self.matcher.is_error() or not found.any():
            found[:] = False
            found[list(self.stops)] = True
        return found

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)


class Grammars:
    """Grammars over a model's tokens.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: Processor):
        self.processor = processor

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Of the text tokenizer; made once, as it takes a second."""
        engine = getattr(self.processor.require_tokenizer(), "backend_tokenizer", None)
        try:
            if engine is None:
                raise ValueError("a slow tokenizer")
            return LLTokenizer(engine.to_str(), eos_token=list(self.processor.stops))
        except Exception as error:  # ValueError, and panics of its Rust
            raise InputError(
                "response_format",
                found=f"a tokenizer that it can't be kept with ({error})",
                expected="one of bytes, or text",
                fix="ask for the form in words",
            ) from None

    @functools.cached_property
    def able(self) -> bool:
        """Whether the tokenizer is one that answers can be kept to a schema with."""
        try:
            return self._tokenizer is not None
        except InputError:
            return False

    def guide(self, schema: dict[str, Any]) -> Guide:
        """Keeps an answer to JSON of a schema.

        Raises:
            InputError: the schema can't be kept to, by llguidance's words, or is too long.
        """
        text = json.dumps(schema)
        if len(text) > LETTERS:
            self._wrong(f"a schema of {len(text)} letters", f"at most {LETTERS}")
        stops = [stop for stop in self.processor.stop_texts if stop.isspace()]
        spaces = "".join(c for c in " \n\r\t" if not any(c in stop for stop in stops))
        how = {"whitespace_pattern": f"[{spaces}]{{0,{SPACES}}}" if spaces else ""}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({"x-guidance": how} | schema))
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            self._wrong(f"a schema that is not supported ({matcher.get_error()[:200]})", "another")
        guide = Guide(matcher, self.processor.stops)
        matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            self._wrong("a schema that nothing satisfies", "another")
        return guide

    def _wrong(self, found: str, expected: str) -> NoReturn:
        fix = "correct the schema"
        raise InputError("response_format", found=found, expected=expected, fix=fix)
