"""Batches of the server's jobs: programs compiled before, rows that leave one another alone."""

import dataclasses
import queue
import time

import converters
import vfjax
from experiments.serve.batcher import Batcher, Job
from tests.experiments.serving import MODEL, QUESTIONS, direct, picture
from vfjax.generate import decode, first_tokens, prefill


def programs() -> tuple[int, ...]:
    return tuple(each._cache_size() for each in (prefill, first_tokens, decode))


def test_a_warm_batcher_compiles_no_more(loaded):
    """Neither for greedy answers nor for sampled ones."""
    batcher = Batcher(*loaded, batch=2, max_new_tokens=200)
    before = programs()
    batcher.warm_up()
    warm = programs()
    assert warm[0] >= before[0] + 2 and warm[2] >= before[2] + 4  # of one row, and of two
    events: queue.SimpleQueue = queue.SimpleQueue()
    ids = batcher.processor([picture()], [batcher.processor.chat(QUESTIONS[0])]).tokens
    for temperature in (0.0, 1.0, 0.3):
        job = Job([-200, *ids[0][ids[0] > 0].tolist()], [picture()], events.put)
        batcher.submit(dataclasses.replace(job, sampling=vfjax.Sampling(temperature)))
        while not events.get(timeout=60).finish:
            pass
    batcher.close()
    assert programs() == warm
    assert batcher.pending == 0 and batcher.pixels == 0


def test_an_llm_without_eyes_is_warmed_up():
    model, processor = converters.load(MODEL.parent / "base", dtype="float32")
    batcher, before = Batcher(model, processor, batch=1, max_new_tokens=64), programs()
    batcher.warm_up()
    batcher.close()
    assert programs()[0] == before[0] + 1


def test_a_bad_row_leaves_its_batch_alone(service, loaded):
    """Jobs of one batch: one too long, one cancelled, two as if alone."""
    model, processor = loaded
    found: dict[int, list] = {}
    lone = [vfjax.text.prompts.tokenize(processor.tokenizer, processor.chat(q)) for q in QUESTIONS]
    jobs = []
    for i, ids in enumerate([lone[0], [5] * 600, lone[1], lone[2]]):
        found[i] = []
        pictures = [] if i == 1 else [picture(i)]
        jobs.append(Job(ids, pictures, found[i].append, max_new_tokens=8, cancelled=i == 3))
    for job in jobs:
        service.batcher.submit(job)
    wait_for(lambda: service.batcher.pending == 0)
    assert isinstance(found[1][-1], vfjax.InputError)
    assert found[3] == []
    for i, question in ((0, QUESTIONS[0]), (2, QUESTIONS[1])):
        text = "".join(piece.text for piece in found[i])
        assert text == direct(loaded, question, picture(i), max_new_tokens=8)


def wait_for(true, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)
