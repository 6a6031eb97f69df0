"""Batches of a mixture of conversations, in an order that is a formula of the step.

Step k's rows depend on nothing but the mixture, the seed, the batch size and how rows are grouped,
so that a run resumes from a number and comes out the same on any number of processes, threads and
prefetched batches.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grain
import jax
import numpy as np

from vfjax.data.conversations import Conversations
from vfjax.errors import InputError, check, counted
from vfjax.fusion.shard import Shard
from vfjax.model import Batch
from vfjax.processor import Processor
from vfjax.text import prompts as text
from vfjax.vision.images import File
from vfjax.vision.video import Video, open_video

Row = tuple[int, int]
"""Number of a row's `Conversations` in the mixture, and of the row in them."""

T = TypeVar("T")

READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
"""Threads and batches that are read ahead by default; Grain's own 500 batches fill a memory."""

_CHARACTERS = 4
"""Of a token, about; only the order of rows by length is made of it."""


MOST = 1 << 24
"""Rows of a step, whose order is held in memory."""


@dataclasses.dataclass(frozen=True)
class _Talk:
    """A row as ids; labels are as long."""

    row: Row
    ids: list[int]
    labels: list[int]
    pictures: tuple[Path, ...]
    videos: frozenset[int]


class Batches:
    """Training batches by step: `batches[k]`, or `to_iter()` for threads that read ahead.

    Each epoch shuffles all rows anew and shows each of them: its last step, if the rows do not fill
    it, is filled with the epoch's first rows, as accelerate does for transformers' Trainer. Only a
    mixture whose weights are not as its data's numbers of rows has no such epochs: its rows are
    drawn without end, by weight.

    Rows are drawn uniformly unless they are grouped:

    - `by_modality`, LLaVA's `group_by_modality_length` (llava/train/llava_trainer.py): the rows of
      a step all have pictures, or none has; what is left of either kind comes at the epoch's end.
      LLaVA also balances the lengths of a step's rows over its ranks; here all ranks are padded to
      one length, so that it would change nothing.
    - `window`: the rows of so many steps are sorted by length, those without pictures together, cut
      into steps, and the steps shuffled. That saves padding, at the price of steps that are not a
      uniform draw: rows meet only others of about their length.

    In a question with several pictures they stand at its front, one after another.

    Attributes:
        epoch_size: steps in which every row is drawn.
    """

    def __init__(
        self,
        mixture: Sequence[tuple[Conversations, float]],
        processor: Processor,
        *,
        batch: int,
        seed: int,
        accumulate: int = 1,
        steps: int | None = None,
        length: int | None = None,
        frames: int = 8,
        by_modality: bool = False,
        window: int = 1,
        endless: bool = False,
        process_index: int = 0,
        process_count: int = 1,
        multiple: int = 1,
    ):
        """No row is read yet.

        Args:
            mixture: data and how often their rows come, relative to the others'. With weights
                that are as the numbers of rows, all data are shuffled as one.
            processor: makes the arrays; its template is what the turns are rendered in.
            batch: rows of a step, or of each of its parts, over all processes.
            seed: of the order, at least 0.
            accumulate: parts of a step, whose gradients are added.
            steps: of the whole run; by default one epoch.
            length: rows are cut to this many tokens; by default the LLM's context.
            frames: of a video, see `vfjax.open_video`.
            by_modality: whether rows with and without pictures are kept apart.
            window: steps over which rows are sorted by length; 1 does not sort.
            endless: whether a step may reach from one epoch into the next, which then has no step
                that is filled up.
            process_index: of this process, which makes its part of each batch's rows only.
            process_count: of the processes.
            multiple: of a part's pictures, see `Processor.shard`; heeded where parts or processes
                share out a batch.

        Raises:
            InputError: an empty mixture, a number out of range, a template without a training
                form, no tokenizer, pictures for a model without a visual branch, or videos in
                a step of several parts or processes.
        """
        self.mixture, self.processor = list(mixture), processor
        self.batch, self.parts, self.seed = batch, accumulate, seed
        self.frames, self.by_modality, self.window = frames, by_modality, window
        self.size = batch * accumulate
        self.length = processor.config.llm.context if length is None else length
        self.process_index, self.process_count = process_index, process_count
        self.multiple = multiple
        rows = sum(len(data) for data, _ in self.mixture)
        self.epoch_size = max(-(-rows // max(self.size, 1)), 1)
        self.steps = self.epoch_size if steps is None else steps
        self._check()
        processor.require_tokenizer()
        processor.labels([(text.IMAGE_TOKEN, "a")])  # has the template a form?
        self._lock = threading.Lock()
        self._broken: set[str] = set()
        shares = [weight / max(len(data), 1) for data, weight in self.mixture]
        together = np.allclose(shares, shares[0], rtol=1e-6)
        self._epochs = together and not endless
        # Steps that are grouped together, and the rows that they are made of.
        self._block = self.epoch_size if self._epochs or by_modality else self.steps
        self._drawn = rows if self._epochs else self._block * self.size
        self._stream = None if self._epochs else self._mix()
        self._block_rows = functools.lru_cache(maxsize=2)(self._ordered_block)
        self._window_rows = functools.lru_cache(maxsize=4)(self._sorted_window)

    def _check(self) -> None:
        context = self.processor.config.llm.context
        rules: list[tuple[str, object, bool, str]] = [
            ("mixture", "no data", bool(self.mixture), "at least one data set"),
            ("batch", self.batch, self.batch >= 1, "at least 1 row"),
            ("accumulate", self.parts, self.parts >= 1, "at least 1 part"),
            ("seed", self.seed, self.seed >= 0, "at least 0"),
            ("steps", self.steps, 1 <= self.steps < 1 << 31, "at least 1"),
            ("length", self.length, 1 <= self.length <= context, f"1 to {context}, the context"),
            ("frames", self.frames, self.frames >= 1, "at least 1"),
            ("window", self.window, self.window >= 1, "at least 1 batch"),
            ("batch, accumulate", self.size, self.size <= MOST, f"at most {MOST} rows a step"),
            (
                "window",
                self.window,
                min(self.window, self.steps) * self.size <= 16 * MOST,
                f"at most {16 * MOST} rows sorted together",
            ),
            ("prune", "a rule", self.processor.config.prune is None, "none: training reads all"),
            (
                "process_index",
                self.process_index,
                0 <= self.process_index < self.process_count,
                f"0 to {self.process_count - 1}",
            ),
            (
                "batch",
                counted(self.batch, "row"),
                self.batch % self.process_count == 0,
                f"a multiple of {self.process_count}, the number of processes",
            ),
        ]
        for data, weight in self.mixture:
            rules.append((f"weight of {data.path}", weight, weight > 0, "more than 0"))
            seen = bool(self.processor.config.branches) or not data.pictures.any()
            rules.append((str(data.path), "pictures", seen, "none: the model is a plain LLM"))
            whole = self.parts * self.process_count == 1 or not data.videos.any()
            rules.append((str(data.path), "videos", whole, "none in steps of parts or processes"))
        check(rules, fix="change it")

    def _mix(self) -> grain.MapDataset:
        """The order of rows by weight: each data set's shuffles, one after another without end."""
        sources = []
        for k, (data, _) in enumerate(self.mixture):
            seed = int(np.random.SeedSequence([self.seed, k]).generate_state(1)[0])
            source = grain.MapDataset.range(len(data)).seed(seed).shuffle().repeat()
            sources.append(source.map(functools.partial(_pair, k)))
        return grain.MapDataset.mix(sources, weights=[weight for _, weight in self.mixture])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step: this process's rows of it, as numpy arrays.

        If it has several parts, they agree on their shapes and every array has a leading axis of
        them.

        Raises:
            InputError: a row that can't be trained on or a picture that can't be decoded, by file
                and row, unless its data skip broken rows. Then the next row of the same data
                comes in its place: for a picture, the next with as many pictures, cut to the
                broken one's words, so that other processes need not know.
        """
        talks, shard = [self._talk(row) for row in self.rows(step)], None
        if self.parts * self.process_count > 1:
            shares = self.parts * self.process_count
            ids = [talk.ids for talk in talks]
            agreed = self.processor.shard(
                ids, 0, shares, truncate=self.length, multiple=self.multiple
            )
            shard = dataclasses.replace(agreed, index=self.process_index, count=self.process_count)
        share = self.batch // self.process_count
        starts = range(self.process_index * share, self.size, self.batch)
        parts = [self._batch(talks[start : start + share], shard) for start in starts]
        return parts[0] if self.parts == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)

    def _batch(self, talks: Sequence[_Talk], shard: Shard | None) -> Batch:
        """Rows as arrays."""
        loaded = [self._loaded(talk) for talk in talks]
        return self.processor(
            [pictures for _, pictures in loaded],
            input_ids=[talk.ids for talk, _ in loaded],
            labels=[talk.labels for talk, _ in loaded],
            truncate=self.length,
            shard=shard,
        )

    def rows(self, step: int) -> list[Row]:
        """The rows of a step, over all processes, before any is found broken."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        block, step = divmod(step, self._block)
        number, step = divmod(step, self.window)
        with self._lock:  # one thread sorts a window, others wait for it
            return self._window_rows(block, number)[step * self.size : (step + 1) * self.size]

    def _sorted_window(self, block: int, number: int) -> list[Row]:
        """The rows of one of a block's windows, step after step."""
        first = number * self.window
        steps = min(self.window, self._block - first)
        places = np.arange(first * self.size, (first + steps) * self.size) % self._drawn
        if self._stream is None or self.by_modality:
            rows = [(int(k), int(i)) for k, i in self._block_rows(block)[places]]
        else:
            rows = [self._stream[block * self._drawn + int(place)] for place in places]
        if self.window == 1:
            return rows
        each = np.array(sorted(rows, key=self._size)).reshape(steps, self.size, 2)
        order = np.random.default_rng((self.seed, block, number)).permutation(steps)
        return [(int(k), int(i)) for k, i in each[order].reshape(-1, 2)]

    def _ordered_block(self, block: int) -> np.ndarray:
        """The rows of an epoch, or of a part of the stream as long, int[n, 2] of (data, row)."""
        rng = np.random.default_rng((self.seed, block))
        if self._stream is None:
            every = [
                np.stack([np.full(len(data), k), np.arange(len(data))], axis=1)
                for k, (data, _) in enumerate(self.mixture)
            ]
            rows = rng.permutation(np.concatenate(every))
        else:
            first = block * self._drawn
            rows = np.array([self._stream[first + place] for place in range(self._drawn)])
        return self._steps_by_modality(rows, rng) if self.by_modality else rows

    def _steps_by_modality(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Steps of one modality in random order, then what they leave, in the data's order."""
        seen = np.zeros(len(rows), bool)
        for k, (data, _) in enumerate(self.mixture):
            seen[rows[:, 0] == k] = data.pictures[rows[rows[:, 0] == k, 1]] > 0
        kinds = rows[seen], rows[~seen]
        ends = [len(kind) // self.size * self.size for kind in kinds]
        steps = [
            kind[:end].reshape(-1, self.size, 2) for kind, end in zip(kinds, ends, strict=True)
        ]
        whole = rng.permutation(np.concatenate(steps)).reshape(-1, 2)
        rest = np.concatenate([kind[end:] for kind, end in zip(kinds, ends, strict=True)])
        return np.concatenate([whole, rest[np.lexsort((rest[:, 1], rest[:, 0]))]])

    def _size(self, row: Row) -> tuple[bool, int]:
        """Whether a row has pictures, and about how many tokens."""
        data, i = self.mixture[row[0]][0], row[1]
        pictures = int(data.pictures[i])
        each = sum(branch.tokens for branch in self.processor.config.branches)
        return pictures > 0, int(data.characters[i]) // _CHARACTERS + pictures * each

    def to_iter(self, start: int = 0, options: grain.ReadOptions = READ) -> grain.DatasetIterator:
        """Batches from step `start` to the last, read ahead by threads.

        Args:
            start: the first step.
            options: number of threads, and of batches that are ready ahead.

        Returns:
            Grain's iterator, whose `get_state` and `set_state` Orbax stores; the state is the
            step.
        """
        batches = iter(grain.MapDataset.source(self).to_iter_dataset(options))
        batches.set_state({**batches.get_state(), "next_index": start})
        return batches

    @property
    def broken(self) -> list[str]:
        """Rows that were replaced so far, one line each. (Those dropped on opening: the data's.)"""
        with self._lock:
            return sorted(self._broken)

    def _talk(self, row: Row) -> _Talk:
        """A row's ids and labels, or the next row's that can be trained on."""
        return self._first(row, self._rendered)

    def _loaded(self, talk: _Talk) -> tuple[_Talk, list[File | Video]]:
        """A row and its pictures, or the next such row whose pictures can be decoded."""
        return self._first(talk.row, functools.partial(self._decoded, talk))

    def _first(self, row: Row, read: Callable[[Row], T | None]) -> T:
        """What `read` makes of the first row, from this one on, that is of use and not broken."""
        k, i = row
        data = self.mixture[k][0]
        for step in range(len(data)):
            try:
                found = read((k, (i + step) % len(data)))
            except InputError as error:
                if not data.skip_broken:
                    raise
                with self._lock:
                    self._broken.add(str(error))
            else:
                if found is not None:
                    return found
        raise InputError(
            data.where(i),
            found="a broken row, and no other in the file to replace it",
            expected="rows that can be read",
            fix="replace the file",
        )

    def _rendered(self, row: Row) -> _Talk:
        data, i = self.mixture[row[0]][0], row[1]
        sample = data[i]
        try:
            with self._lock:  # tokenizers may not be used by two threads at once
                ids, labels = self.processor.labels(sample.turns)
        except InputError as error:
            raise InputError(
                data.where(i),
                found=f"turns that can't be trained on ({error})",
                expected=f"turns that template {self.processor.template!r} can hold",
                fix="correct or drop the row",
            ) from None
        counts = [q.count(text.IMAGE_TOKEN) for q, _ in sample.turns if text.IMAGE_TOKEN in q]
        if ids.count(text.IMAGE_ID) < sum(counts):
            ids, labels = _widened(ids, labels, counts)
        return _Talk(row, ids, labels, sample.pictures, sample.videos)

    def _decoded(self, wanted: _Talk, row: Row) -> tuple[_Talk, list[File | Video]] | None:
        """A row and its pictures; None if it can't stand where `wanted` was."""
        talk = wanted
        if row != wanted.row:
            room, count = len(wanted.ids), len(wanted.pictures)
            data, i = self.mixture[row[0]][0], row[1]
            if data.pictures[i] != count:
                return None
            talk = self._rendered(row)
            if talk.ids[:room].count(text.IMAGE_ID) != count:
                return None
            talk = dataclasses.replace(talk, ids=talk.ids[:room], labels=talk.labels[:room])
        where = self.mixture[row[0]][0].where(row[1])
        return talk, [
            self._video(path, where)
            if i in talk.videos
            else self.processor.open(path, name=f"{where}: {path}")
            for i, path in enumerate(talk.pictures)
        ]

    def _video(self, path: Path, where: str) -> Video:
        try:
            return open_video(path, frames=self.frames)
        except InputError as error:
            raise InputError(
                where,
                found=f"video {error}",
                expected="a video that can be read",
                fix="drop the row",
            ) from None


def _pair(k: int, i: int) -> Row:
    return k, i


def _widened(
    ids: list[int], labels: list[int], counts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """One placeholder a picture: `vfjax.text.labels` leaves one for all pictures of a question."""
    repeats = np.ones(len(ids), np.int64)
    repeats[[i for i, token in enumerate(ids) if token == text.IMAGE_ID]] = counts
    return np.repeat(ids, repeats).tolist(), np.repeat(labels, repeats).tolist()
