"""Text as it is written: `generate` in pieces, none of which changes afterwards."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from vfjax.fusion.modes import MemberProcessors
from vfjax.generate import Batches, Generator, stream_ids
from vfjax.processor import Processor
from vfjax.sampling import GREEDY, Sampling
from vfjax.text.tokenizer import Tokenizer


def stream(
    model: Generator,
    processor: Processor | MemberProcessors,
    batch: Batches,
    *,
    every: int = 8,
    max_new_tokens: int | Sequence[int] = 64,
    sampling: Sampling = GREEDY,
) -> Iterator[list[str]]:
    """What is new of each row's text, as it is written; joined, the texts of `generate`.

    What may yet change waits: the first bytes of a character, the first letters of a stop, spaces
    at the end.

    Args:
        model: a model, or members side by side (`vfjax.generate`).
        processor: its processor.
        batch: of the processor.
        every: tokens from one time to the next.
        max_new_tokens: for all rows, or one number a row.
        sampling: how tokens are chosen.

    Raises:
        InputError: what `vfjax.generate` raises, at the call; or `every` is below 1.
    """
    pieces = stream_ids(
        model,
        batch,
        every=every,
        max_new_tokens=max_new_tokens,
        stop=processor.stops,
        sampling=sampling,
        settings=processor.settings,
    )

    def texts() -> Iterator[list[str]]:
        rows: list[Text] = []
        for ids, ended, _ in pieces:
            rows = rows or [Text(processor) for _ in ids]
            yield [row.add(new, last) for row, new, last in zip(rows, ids, ended, strict=True)]

    return texts()


@dataclasses.dataclass
class Text:
    """A row's text while its ids arrive.

    Attributes:
        processor: whose tokenizer, and whose template's stop strings, it takes.
        stop: more strings that end it.
        ids: that have arrived.
        count: how many of them it has; a stop string's last one is the last.
        text: of them, as far as it is certain.
        stopped: a stop string or id has ended it.
    """

    processor: Processor | MemberProcessors
    stop: Sequence[str] = ()
    ids: list[int] = dataclasses.field(default_factory=list)
    count: int = 0
    text: str = ""
    stopped: bool = False
    _ends: frozenset[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.processor, MemberProcessors):
            self.processor = self.processor.processors[0]
        self._ends = frozenset(self.processor.stops)  # looked up once: it takes 0.1 ms

    def add(self, ids: Sequence[int], last: bool) -> str:
        """Takes new ids; what has become certain of the text.

        Args:
            ids: new ones.
            last: no more will come.

        Raises:
            InputError: there is no tokenizer.
        """
        if self.stopped:
            return ""
        processor = self.processor
        assert isinstance(processor, Processor)
        tokenizer = processor.require_tokenizer()
        end = next((i for i, new in enumerate(ids) if new in self._ends), len(ids))
        kept, ended = [*self.ids, *ids[:end]], end < len(ids)
        before, self.count = self.count, len(kept)
        self.ids += ids
        last = last or ended
        text = tokenizer.decode(
            kept if last else _settled(tokenizer, kept), skip_special_tokens=True
        )
        if not last:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character's first bytes
            if tokenizer.clean_up_tokenization_spaces:  # the last word may lose its space
                text = text[: max(text.rfind(" "), len(self.text))]
        stops = (*processor.stop_texts, *self.stop)
        found = [text.index(stop) for stop in stops if stop in text]
        self.stopped = ended or bool(found)
        if found:
            text = text[: min(found)]
            parts = range(before + 1, len(kept))
            self.count = next((n for n in parts if _holds(tokenizer, kept[:n], stops)), len(kept))
        elif not last:
            text = text[: len(text) - max((_begun(stop, text) for stop in stops), default=0)]
        text = text.strip()
        if len(text) <= len(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def _holds(tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str]) -> bool:
    said = tokenizer.decode(ids, skip_special_tokens=True)
    return any(text in said for text in texts)


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _settled(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    """Without the byte tokens at the end: if their run turns out wrong, all of it does."""
    special, n = set(tokenizer.all_special_ids), len(ids)
    while n and (
        ids[n - 1] in special or _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(ids[n - 1]) or "")
    ):
        n -= 1
    return ids[:n]


def _begun(stop: str, text: str) -> int:
    """How many letters at the end of the text begin the stop."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
