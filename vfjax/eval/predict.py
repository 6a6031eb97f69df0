"""A model's answers to a benchmark's questions: batched, resumable, the same however it was cut.

Which questions share a batch is a formula of the questions and the batch size alone. A run that
goes on computes the batches that were not finished, whole, and writes what is missing of them: so
kills, chunks and processes change no answer, not even by rounding.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain

from vfjax.errors import InputError
from vfjax.eval import log
from vfjax.eval.data import Question
from vfjax.generate import Generator, generate
from vfjax.processor import Processor
from vfjax.text import prompts
from vfjax.vision.video import open_video

Batches = Sequence[Sequence[int]]
"""Numbers of the questions of each batch."""
Progress = Callable[[int], object]

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
"""Threads that read pictures, and batches that are ready ahead."""


def prompt_ids(processor: Processor, questions: Sequence[Question]) -> list[list[int]]:
    """Ids of each question in the processor's template, -200 at each picture.

    Raises:
        InputError: a question's words hold the placeholder for a picture, or the model sees none.
    """
    out = []
    for q in questions:
        pictures = 1 if q.video else len(q.images)
        ids = processor.tokenize(processor.chat(q.prompt, images=pictures))
        if ids.count(prompts.IMAGE_ID) != pictures:
            raise InputError(
                f"question {q.id}",
                found=f"{prompts.IMAGE_TOKEN} in its words",
                expected="words; its pictures are put before them",
                fix="correct the file",
            )
        out.append(ids)
    return out


def plan(
    questions: Sequence[Question],
    ids: Sequence[Sequence[int]],
    processor: Processor,
    *,
    batch: int,
    max_new_tokens: int,
) -> Batches:
    """Batches of questions with as many pictures and of like length, so that few shapes compile.

    Args:
        questions: all of the run.
        ids: of each; see `prompt_ids`.
        processor: the model's.
        batch: questions in a batch; the last of a number of pictures may have fewer.
        max_new_tokens: of an answer.

    Raises:
        InputError: no batch size, or a question whose words alone don't fit the context.
    """
    context = processor.config.llm.context
    each = sum(branch.tokens for branch in processor.config.branches)
    if batch < 1 or max_new_tokens < 1:
        raise InputError(
            "batch, max_new_tokens",
            found=f"{batch}, {max_new_tokens}",
            expected="at least 1",
            fix="change them",
        )
    groups: dict[tuple[bool, int], list[tuple[int, int]]] = {}
    for i, (question, row) in enumerate(zip(questions, ids, strict=True)):
        if len(row) + max_new_tokens > context:
            raise InputError(
                f"question {question.id}",
                found=f"{len(row)} tokens of text and {max_new_tokens} new ones",
                expected=f"at most {context}, the LLM's context",
                fix="lower max_new_tokens, or leave the question out",
            )
        pictures = row.count(prompts.IMAGE_ID)
        most = len(row) + pictures * (each - 1)
        groups.setdefault((question.video is not None, pictures), []).append((most, i))
    return [
        [i for _, i in sorted(group)[start : start + batch]]
        for _, group in sorted(groups.items())
        for start in range(0, len(group), batch)
    ]


class _Inputs:
    """Batches as arrays, by number; read by threads."""

    def __init__(
        self,
        batches: Batches,
        questions: Sequence[Question],
        ids: Sequence[Sequence[int]],
        processor: Processor,
        rows: int,
        video: tuple[int, int],
    ):
        self.batches, self.questions, self.ids = batches, questions, ids
        self.processor, self.rows, self.video = processor, rows, video

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        """Number and arrays; a short batch is filled with its first question."""
        picks = list(self.batches[i])
        picks += picks[:1] * (self.rows - len(picks))
        media = {pick: self._media(self.questions[pick]) for pick in dict.fromkeys(picks)}
        return i, self.processor([media[p] for p in picks], input_ids=[self.ids[p] for p in picks])

    def _media(self, question: Question) -> list[Any]:
        if question.video:
            frames, pool = self.video
            return [open_video(question.video, frames=frames, pool=pool)]
        name = f"the picture of question {question.id}"
        return [
            self.processor.open(image, name=name if isinstance(image, bytes) else None)
            for image in question.images
        ]


def predict(
    model: Generator,
    processor: Processor,
    questions: Sequence[Question],
    folder: Path,
    header: log.Header,
    *,
    batch: int = 8,
    max_new_tokens: int = 128,
    chunk: tuple[int, int] = (0, 1),
    writes: bool = True,
    frames: int = 8,
    pool: int = 2,
    progress: Progress = lambda n: None,
    together: Callable[[str], object] = lambda what: None,
) -> None:
    """Asks a model what has not been answered yet, greedily, and appends to a chunk's file.

    Args:
        model: a model, or members side by side.
        processor: the model's.
        questions: all of the run.
        folder: of the files; see `vfjax.eval.log`.
        header: what the answers depend on.
        batch: questions asked together.
        max_new_tokens: of an answer.
        chunk: which of how many shares of the batches is asked here.
        writes: False for a process that only computes, its mesh being shared with others.
        frames: of a video.
        pool: see `vfjax.Video`.
        progress: called with the number of questions whose answers were written or found.
        together: waits for the other processes; called with the name of a point that all pass.

    Raises:
        InputError: as `prompt_ids`, `plan`, `log.Log`, `vfjax.generate`; a picture can't be read.
    """
    ids = prompt_ids(processor, questions)
    batches = plan(questions, ids, processor, batch=batch, max_new_tokens=max_new_tokens)
    known = log.read_parts(folder, header)
    together("answers are read")
    share = batches[chunk[0] :: chunk[1]]
    todo = [picks for picks in share if any(questions[p].id not in known for p in picks)]
    progress(sum(questions[p].id in known for picks in share for p in picks))
    if not todo:
        return
    inputs = _Inputs(todo, questions, ids, processor, batch, (frames, pool))
    ahead = grain.MapDataset.source(inputs).to_iter_dataset(READ)
    file = log.part(folder, *chunk)
    with log.Log(file, header) if writes else contextlib.nullcontext() as out:
        for number, arrays in ahead:
            texts = generate(model, processor, arrays, max_new_tokens=max_new_tokens)
            picks = todo[number]
            for question, text in zip((questions[p] for p in picks), texts, strict=False):
                if question.id not in known:
                    if out is not None:
                        out.write(question.id, text)
                    progress(1)
