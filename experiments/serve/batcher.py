"""Runs requests together: one thread, one batch at a time, sizes from short lists."""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from experiments.serve.logprobs import TOP, Names
from vfjax import InputError, Model, Processor, Sampling, stream_ids
from vfjax.atomic import JSON
from vfjax.generate import Guide, Logs
from vfjax.sampling import GREEDY
from vfjax.text.stream import Text

LOG = logging.getLogger(__name__)
SPARE = Sampling(repetition_penalty=1.0)
"""Of rows that fill a batch up."""
LENGTHS = tuple(64 << k for k in range(14))
"""Sequence lengths of batches: fewer than a processor's, as each is a program to compile."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request gets at a time.

    Attributes:
        text: that is new.
        prompt: tokens of the prompt, visual ones included.
        written: tokens written so far.
        finish: why it ended, "stop" or "length"; None if it goes on.
        logprobs: of the new tokens, as OpenAI has them; None if they are not asked for.
    """

    text: str
    prompt: int
    written: int
    finish: str | None = None
    logprobs: list[JSON] | None = None


Event = Piece | Exception


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way through the batcher.

    Attributes:
        ids: of the prompt, -200 at each picture.
        pictures: in that order; taken out of the list when the job runs.
        deliver: called by the batcher's thread with every piece; the last event is a piece with
            `finish`, or an exception. A cancelled job may end without.
        max_new_tokens: None for as many as the batcher gives.
        sampling: of the one row.
        logprobs: alternatives whose log-probabilities are told, `TOP` at most, beside the chosen
            token's; None: no log-probabilities.
        guide: of its tokens.
        stop: strings that end the answer.
        cancelled: set by whoever does not want the rest.
        ended: set by the batcher.
        pixels: of the pictures.
    """

    ids: list[int]
    pictures: list[Any]
    deliver: Callable[[Event], object]
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    logprobs: int | None = None
    guide: Guide | None = None
    stop: tuple[str, ...] = ()
    cancelled: bool = False
    ended: bool = False
    pixels: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.pixels = sum(picture.width * picture.height for picture in self.pictures)


class Batcher:
    """Takes jobs from any thread and runs them in batches, first come, first served."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        batch: int = 16,
        window: float = 0.005,
        every: int = 8,
        max_new_tokens: int = 1024,
    ):
        """Starts the thread.

        Args:
            model: that answers.
            processor: its own.
            batch: rows at most.
            window: seconds that the first job of a batch waits for others.
            every: tokens from one piece of text to the next.
            max_new_tokens: that any job gets at most.
        """
        self.model, self.batch, self.window, self.every = model, batch, window, every
        self.processor = dataclasses.replace(processor, lengths=LENGTHS)
        self.max_new_tokens = max_new_tokens
        self.names = Names(processor.require_tokenizer())
        self.pending = 0  # jobs that have not ended
        self.pixels = 0  # of their pictures
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Compiles what a picture and a short question take, or for an LLM without eyes a question,
        for every number of rows, sampled and greedy. Penalties, log-probabilities and guides are
        left to the first job that has them: every combination is a program.
        """
        seen = bool(self.processor.config.branches)
        ids, pictures = ([-200, 1], [Image.new("RGB", (336, 336))]) if seen else ([1], [])
        rows = 1
        while True:
            for sampling in (GREEDY, Sampling(temperature=1.0)):
                jobs = [Job(ids, list(pictures), id, sampling=sampling) for _ in range(rows)]
                for job in jobs:
                    job.ended = True  # after its first piece
                self.answer(jobs)
            if rows >= self.batch:
                return
            rows = min(_bucket(rows + 1, 1), self.batch)

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue."""
        with self._lock:
            self.pending += 1
            self.pixels += job.pixels
        self._queue.put(job)

    def close(self) -> None:
        """Ends the thread after all that was submitted."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Runs the next batch, and keeps nothing of it; whether more may come."""
        jobs, going = self._collect()
        wanted = [job for job in jobs if not job.cancelled]
        if wanted:
            self._try(wanted)
        for job in jobs:
            self._end(job)
        return going

    def _try(self, jobs: list[Job]) -> None:
        """One batch; an error of ours is its own jobs' alone."""
        try:
            self.answer(jobs)
        except Exception as error:
            LOG.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                self._deliver(job, error)

    def _deliver(self, job: Job, event: Event) -> None:
        if job.ended:
            return
        if isinstance(event, Exception) or event.finish:
            self._end(job)  # first: whoever gets the answer may come back at once
        job.deliver(event)

    def _end(self, job: Job) -> None:
        with self._lock:
            if not job.ended:
                self.pending -= 1
                self.pixels -= job.pixels
            job.ended = True

    def _collect(self) -> tuple[list[Job], bool]:
        """The next batch, and whether more may come."""
        jobs: list[Job] = []
        until = None
        while len(jobs) < self.batch:
            try:
                wait = None if until is None else max(0.0, until - time.monotonic())
                job = self._queue.get(timeout=wait)
            except queue.Empty:
                break
            if job is None:
                return jobs, False
            jobs.append(job)
            until = until or time.monotonic() + self.window
        return jobs, True

    def answer(self, jobs: list[Job]) -> None:
        """One batch; where the pictures or prompts of one are at fault, it is halved."""
        spare = min(_bucket(len(jobs), 1), self.batch) - len(jobs)  # rows that fill the shape up
        try:
            batch = self.processor(
                [job.pictures for job in jobs] + [[]] * spare,
                input_ids=[job.ids for job in jobs] + [[0]] * spare,
            )
            prompt = batch.mask.sum(axis=1).tolist()
            for job, length in zip(jobs, prompt, strict=False):
                self._fits(job, length)
        except InputError as error:
            if len(jobs) == 1:
                self._deliver(jobs[0], error)
                return
            half = len(jobs) // 2
            self._try(jobs[:half])
            self._try(jobs[half:])
            return
        for job in jobs:
            job.pictures.clear()  # the batch has them
        limit = [self._limit(job, n) for job, n in zip(jobs, prompt, strict=False)] + [1] * spare
        pieces = stream_ids(
            self.model,
            batch,
            every=self.every,
            max_new_tokens=limit,
            room=_bucket(max(limit), 64),
            stop=self.processor.stops,
            sampling=Sampling.stack([*(job.sampling for job in jobs), *[SPARE] * spare]),
            settings=self.processor.settings,
            logprobs=None if all(job.logprobs is None for job in jobs) else TOP,
            guides=[*(job.guide for job in jobs), *[None] * spare],
        )
        live = {i: Text(self.processor, job.stop) for i, job in enumerate(jobs)}
        for new in pieces:
            for i, text in list(live.items()):
                first, top = text.count, jobs[i].logprobs
                piece = _piece(text, new.ids[i], new.ended[i], prompt[i], limit[i])
                if new.logs and top is not None:
                    ids = text.ids[first : text.count]
                    logs = Logs(*(x[: len(ids)] for x in new.logs[i]))
                    content = self.names.content(logs, ids, top)
                    piece = dataclasses.replace(piece, logprobs=content)
                self._deliver(jobs[i], piece)
                if jobs[i].ended or jobs[i].cancelled:
                    del live[i]
            if not live:
                return

    def _fits(self, job: Job, length: int) -> None:
        if length >= self.model.context:
            raise InputError(
                "messages",
                found=f"{length} tokens, visual ones included",
                expected=f"fewer than {self.model.context}, the LLM's context",
                fix="shorten the conversation or send fewer pictures",
            )

    def _limit(self, job: Job, length: int) -> int:
        """New tokens that a job gets; as many as fit, whatever it asks for."""
        asked = job.max_new_tokens or self.max_new_tokens
        return min(asked, self.max_new_tokens, self.model.context - length)


def _piece(text: Text, new: Sequence[int], ended: bool, prompt: int, limit: int) -> Piece:
    more = text.add(new, ended)
    written = text.count
    finish = None
    if text.stopped or ended:
        finish = "stop" if text.stopped or written < limit else "length"
    return Piece(more, prompt, written, finish)


def _bucket(n: int, first: int) -> int:
    """The first of `first`, 4 x `first`, 16 x ... that is at least n."""
    while first < n:
        first *= 4
    return first
