"""A picture or video in the text: where its tokens are read, and what text stands between them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """One picture, or video, in the text: k tokens in the order in which they are read.

    Attributes:
        indices: int64[k, p], which tokens of the memory each is made of.
        weights: float32[k, p] of their sum; None: they have the same, or, where p > 1, the largest
            of the values.
        marks: int64[k], ids of tokens that are text (as `<img>`, or ends of rows); -1 at visual
            ones; -2 - i where the tokens of `words[i]` are to stand. None: all are visual.
            `indices` is not read at marks.
        place: int64[k, 3], where each stands from the picture's start: time, row, column, as LLMs
            with M-RoPE count. None: one after another.
        span: positions that the picture takes, if they have places.
        words: texts that are tokenised with the batch, as times of frames. In `place` and `span`
            each counts as one position; `tokenized` moves on what follows it.
    """

    indices: np.ndarray
    weights: np.ndarray | None = None
    marks: np.ndarray | None = None
    place: np.ndarray | None = None
    span: int = 0
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def text(self) -> np.ndarray:
        """`marks`, -1 throughout if there are none."""
        return np.full(len(self), -1) if self.marks is None else self.marks

    def __getitem__(self, where: np.ndarray) -> "Run":
        """Some of the tokens, of a run without places."""
        weights = None if self.weights is None else self.weights[where]
        return Run(self.indices[where], weights)

    def tokenized(self, tokenize: Callable[[str], Sequence[int]]) -> "Run":
        """The same with the ids of its words, which `tokenize` gives, among the marks."""
        marks, counts = self.text, np.ones(len(self), np.int64)
        ids = [np.asarray(tokenize(text), np.int64) for text in self.words]
        places = np.flatnonzero(marks <= -2)
        said = [ids[-2 - mark] for mark in marks[places]]
        counts[places] = [len(each) for each in said]
        at = np.repeat(np.arange(len(self)), counts)
        new = marks[at]
        new[new <= -2] = np.concatenate([np.zeros(0, np.int64), *said])
        weights = None if self.weights is None else self.weights[at]
        place, longer = self.place, np.cumsum(counts - 1) - (counts - 1)
        if place is not None:
            within = np.arange(len(at)) - (np.cumsum(counts) - counts)[at]
            place = place[at] + (longer[at] + within)[:, None]
        return Run(self.indices[at], weights, new, place, self.span + int((counts - 1).sum()))

    def opened(self) -> tuple["Run", tuple[str, str]]:
        """The run without the words that it begins and ends with, and these."""
        first, last = ("" if k > -2 else self.words[-2 - k] for k in self.text[[0, -1]])
        if not first and not last:
            return self, ("", "")
        assert self.place is None, "words at either end have no places"
        kept = slice(1 if first else 0, len(self) - 1 if last else len(self))
        fields = (self.indices, self.weights, self.marks)
        indices, weights, marks = (None if x is None else x[kept] for x in fields)
        assert indices is not None
        return Run(indices, weights, marks, words=self.words), (first, last)

    @classmethod
    def join(cls, runs: Sequence["Run"]) -> "Run":
        """Weighted sums and single tokens one after another, without marks and places."""
        width = max(run.indices.shape[1] for run in runs)
        if width == 1:
            return cls(np.concatenate([run.indices for run in runs]))
        indices, weights = [], []
        for run in runs:
            more = ((0, 0), (0, width - run.indices.shape[1]))
            own = np.ones(run.indices.shape) if run.weights is None else run.weights
            indices.append(np.pad(run.indices, more, mode="edge"))
            weights.append(np.pad(own, more))
        return cls(np.concatenate(indices), np.concatenate(weights))

    @classmethod
    def interleaved(cls, parts: Sequence[str | Sequence[int] | np.ndarray]) -> "Run":
        """Text and visual tokens, one after another.

        Args:
            parts: texts, which become `words`; ids of text; int64[k] visual tokens of the memory.
        """
        words, marks, indices = list[str](), [], []
        for part in parts:
            if isinstance(part, str):
                words.append(part)
                part = (-1 - len(words),)
            seen = isinstance(part, np.ndarray)
            marks.append(np.full(len(part), -1) if seen else np.array(part, np.int64))
            indices.append(part if seen else np.zeros(len(part), np.int64))
        return cls(
            np.concatenate(indices)[:, None], marks=np.concatenate(marks), words=tuple(words)
        )

    @classmethod
    def of(cls, indices: np.ndarray) -> "Run":
        """Tokens as the memory has them, int64[k]."""
        return cls(indices[:, None])

    @classmethod
    def pooled(cls, frames: Sequence[np.ndarray], pool: int) -> "Run":
        """A video's frames, of each of which every `pool` tokens become one; a rest is dropped.

        Args:
            frames: of each int64[k] its tokens.
            pool: 1 keeps all.
        """
        return cls(np.concatenate([x[: len(x) // pool * pool].reshape(-1, pool) for x in frames]))
