"""A training step of vfjax beside the same model in torch; the loop's own cost; the data's.

    python experiments/bench/train.py [--quick] --out=FILE.json

Weights are random, float32; sizes as in basic.py with a smaller tower, and of SmolLM2-135M with a
small one. Torch runs transformers' LlavaForConditionalGeneration, PEFT's adapters and
torch.optim.AdamW on the same rows. Beside each step is one with the logits of all positions.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import converters
from experiments.bench.basic import FULL, QUICK, Sizes, load_peer, write_folder
from experiments.bench.common import Row, arguments, cores, interleaved, report, row
from experiments.configs.train import ADAPTERS, CONNECTOR, LLM
from vfjax import Batch, InputError
from vfjax.architectures import Inputs
from vfjax.data import Batches, Conversations
from vfjax.text.tokenizer import Tokenizer
from vfjax.train import (
    Group,
    LoRAConfig,
    Optim,
    Options,
    add_lora,
    fit,
    init,
    make_step,
    split,
)
from vfjax.train import step as steps

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "torch", "transformers", "peft", "vfjax")


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: what trains, the adapters' rank (0: none), rows, and labelled words of each."""

    groups: tuple[Group, ...]
    rank: int = 0
    rows: int = 2
    answer: int | None = None


ALIGN = Case((Group(CONNECTOR, 1e-3),))
TUNE = Case((Group(CONNECTOR, 2e-5), Group(LLM, 2e-5)))
CASES = {"connector": ALIGN, "connector and LLM": TUNE}
SMOL = Sizes(
    vision={
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "image_size": 112,
        "patch_size": 14,
    },
    text={
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    words=90,
    repeats=3,
)
SMOL_CASES = {
    "SmolLM2-135M, adapters": Case(
        (Group(CONNECTOR, 1e-3), Group(ADAPTERS, 1e-3)), rank=16, rows=8, answer=25
    ),
    "SmolLM2-135M, connector and LLM": dataclasses.replace(TUNE, rows=8, answer=25),
}


def main(args: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(cores())
    sizes, smol = (QUICK, QUICK) if args.quick else (smaller(FULL), SMOL)
    notes: dict[str, object] = {"threads": cores(), "load average before": os.getloadavg()[0]}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, size, cases in (("llava", sizes, CASES), ("smol", smol, SMOL_CASES)):
            write_folder(folder / kind, size)
            notes[kind] = dataclasses.asdict(size)
            for what, case in cases.items():
                rows += bench_step(folder / kind, what, case, size, notes)
        rows += bench_loop(folder, notes)
        rows += bench_data(folder, sizes, rows[0], notes)
    report(rows, notes, PACKAGES, args.out)


def smaller(sizes: Sizes) -> Sizes:
    """A tower of 12 layers and 224 pixels: a step takes seconds."""
    vision = sizes.vision | {"num_hidden_layers": 12, "image_size": 224}
    return dataclasses.replace(sizes, vision=vision, repeats=3)


def bench_step(
    folder: Path, what: str, case: Case, sizes: Sizes, notes: dict[str, object]
) -> list[Row]:
    """One step: forward, backward, clipping, AdamW."""
    model, processor = converters.load(folder, dtype="float32")
    (branch,) = model.config.branches
    rng = np.random.default_rng(0)
    side = sizes.vision["image_size"]
    pictures = list(rng.integers(0, 256, (case.rows, side, side, 3), np.uint8))
    words = rng.integers(3, sizes.text["vocab_size"] - 1, (case.rows, sizes.words)).tolist()
    asked = max(0, sizes.words - case.answer) if case.answer else 0
    answers = [[-100] * asked + row[asked:] for row in words]
    ids = [[1, -200, *row] for row in words]
    batch = processor(pictures, input_ids=ids, labels=[[-100, -100, *row] for row in answers])
    if case.rank:
        add_lora(model, LoRAConfig(case.rank, 2.0 * case.rank))
    graph, params, frozen = split(model, case.groups)
    tx = Optim(1000, warmup=0.0, schedule="constant").build(case.groups)
    batches = jax.tree.map(lambda x: x[None], batch)

    def stepping() -> Callable[[], float]:
        state = init(jax.tree.map(jnp.copy, params), tx, None)
        step = make_step(graph, tx, state)

        def once() -> float:
            nonlocal state
            state, metrics = step(state, frozen, batches)
            return float(metrics["loss"])

        return once

    peer = load_peer(folder)
    peer.requires_grad_(False)
    peer.model.multi_modal_projector.requires_grad_(True)
    if case.rank:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=names)
        peft.inject_adapter_in_model(lora, peer.model.language_model)
    elif len(case.groups) > 1:
        peer.model.language_model.requires_grad_(True)
        peer.lm_head.requires_grad_(True)
    trained = [p for p in peer.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=case.groups[-1].learning_rate, weight_decay=0.0)
    marks = [peer.config.image_token_id] * branch.tokens
    inputs = torch.tensor([[1, *marks, *row] for row in words])
    targets = torch.tensor([[-100] * (1 + len(marks)) + row for row in answers])
    (seen,) = batch.images.values()
    assert isinstance(seen.given, Inputs)
    pixels = seen.given.pixels
    pixels = torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2).contiguous()

    def theirs() -> float:
        adamw.zero_grad()
        loss = peer(input_ids=inputs, pixel_values=pixels, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        return loss.item()

    ours, whole = stepping(), stepping()
    a, b = ours(), theirs()
    with mock.patch.multiple(steps, CHUNKS=1, ROWS=2**30):
        whole()
    if abs(a / b - 1) > 1e-3:
        raise InputError(
            "bench", found=f"losses {a} and {b}", expected="the same", fix="report your versions"
        )
    times = interleaved({"ours": ours, "whole": whole, "peer": theirs}, sizes.repeats)
    notes[f"{what}: loss of the first step"] = [a, b]
    notes[f"{what}: rows, tokens of each, labelled"] = [
        case.rows, inputs.shape[1], sizes.words - asked,
    ]  # fmt: skip
    peers = times["peer"].rest
    return [
        row(f"step, {what}", times["ours"].rest, peers, "torch"),
        row(f"step, {what}, all logits", times["whole"].rest, peers, "torch"),
    ]


def bench_loop(folder: Path, notes: dict[str, object]) -> list[Row]:
    """What `fit` adds to a step: its wall time beside the bare step's, at toy size."""
    write_folder(folder / "toy", QUICK)
    groups, count = ALIGN.groups, 300
    model, processor = converters.load(folder / "toy", dtype="float32")
    picture = np.zeros((28, 28, 3), np.uint8)
    ids = [[1, -200, 5, 6, 7]]
    batch: Batch = processor([picture], input_ids=ids, labels=ids)
    graph, params, frozen = split(model, groups)
    tx = Optim(count).build(groups)
    state = init(params, tx, None)
    step = make_step(graph, tx, state)
    batches = jax.device_put(jax.tree.map(lambda x: x[None], batch))
    bare = []
    for _ in range(count):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batches)
        jax.block_until_ready(metrics)
        bare.append(time.perf_counter() - start)

    times: list[float] = []

    def data(start: int) -> Iterator[Batch]:
        for _ in itertools.count(start):
            times.append(time.perf_counter())
            yield batch

    model, _ = converters.load(folder / "toy", dtype="float32")
    options = Options(dtype=jnp.float32, remat=False, save_every=10**6, log_every=50)
    fit(model, data, groups, Optim(count), folder / "loop", options=options)
    looped = np.diff(times)[10:]
    notes["loop: median milliseconds of a step, with fit and bare"] = [
        1e3 * float(np.median(looped)),
        1e3 * float(np.median(bare[10:])),
    ]
    return [row("step of fit beside the bare step", list(looped), bare[10:], "bare step")]


def bench_data(folder: Path, sizes: Sizes, step: Row, notes: dict[str, object]) -> list[Row]:
    """Seconds a picture of the input pipeline, beside what a step takes a picture."""
    rng, count = np.random.default_rng(0), 64
    talks = []
    (folder / "pictures").mkdir()
    for i in range(count):
        noise = rng.integers(0, 256, (30, 40, 3), np.uint8)
        picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{i}.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
        talks.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(talks))
    _, processor = converters.load(folder / "llava", dtype="float32")
    processor.tokenizer = cast(Tokenizer, Words())  # templates ask for no more of it
    processor.image_token = ""  # which only a tokenizer with special tokens has
    data = Conversations(folder / "rows.json", folder / "pictures")
    batches = Batches([(data, 1.0)], processor, batch=8, seed=0, steps=40, window=1)
    stream = iter(batches.to_iter())
    for _ in range(8):
        next(stream)
    start = time.perf_counter()
    for _ in range(24):
        next(stream)
    each = (time.perf_counter() - start) / (24 * 8)
    notes["data: pictures a second"] = 1 / each
    need = step["ours"] / ALIGN.rows
    return [row("data of a picture beside its step", [each], [need], "the step")]


class Words:
    """A tokenizer that counts characters: the benchmark is of pictures."""

    bos_token_id = 1

    def __call__(self, text: str) -> argparse.Namespace:
        return argparse.Namespace(input_ids=[1, *(3 + ord(c) % 200 for c in text)])


if __name__ == "__main__":
    main(arguments(__doc__ or ""))
