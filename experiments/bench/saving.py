"""What pruned visual tokens, int8 weights and cache save and change, beside the same model without.

    python experiments/bench/saving.py [--quick] --out=FILE.json

Times and memory of a model of two branches, of 576 tokens each and with random weights; answers of
the shipped family's clip and dino, fused, on held-out pictures.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.basic import FULL, QUICK, STEPS, Notes, copies, load_ours, write_folder
from experiments.bench.common import Row, arguments, cores, interleaved, report, row
from experiments.family import scenes
from experiments.family.members import Quiz, next_logits
from experiments.family.study import copied, fuse
from experiments.tasks.common import FAMILY
from vfjax import Model, Processor, Prune, generate_ids
from vfjax.fusion.prune import RULES
from vfjax.nn.int8 import int8
from vfjax.sharding import nbytes

WHOLE = "all"
SHARES = (0.75, 0.5, 0.25)
PACKAGES = ("jax", "jaxlib", "flax", "vfjax")


def main(args: argparse.Namespace) -> None:
    """Measures everything, prints the tables, writes the file."""
    notes: Notes = {"threads": cores(), "load average before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        rows = bench_cost(Path(name), args.quick)
        notes["family"] = answers(Path(name) / "family", 8 if args.quick else 200)
    report(rows, notes, PACKAGES, args.out)
    print(f"\n{'':<32} {'agree (%)':>10} {'right (%)':>10}")
    for label, found in notes["family"].items():
        print(f"{label:<32} {found['agree']:>10.1f} {found['right']:>10.1f}")


def with_prune(model: Model, processor: Processor, prune: Prune) -> tuple[Model, Processor]:
    """The same arrays, tokens pruned."""
    other = copied(model)
    other.config = dataclasses.replace(model.config, prune=prune)
    return other, dataclasses.replace(processor, config=other.config)


def bench_cost(folder: Path, quick: bool) -> list[Row]:
    """First token, each token after it, bytes of the LLM and of its cache, by what is saved."""
    sizes = QUICK if quick else FULL
    write_folder(folder, sizes)
    one, processor = load_ours(folder)
    model = copies(one, 2)
    rng = np.random.default_rng(0)
    side = sizes.vision["image_size"]
    picture = rng.integers(0, 256, (side, side, 3), np.uint8)
    ids = [[1, -200, *rng.integers(3, sizes.text["vocab_size"] - 1, sizes.words).tolist()]]
    kinds = {WHOLE: with_prune(model, processor, Prune(1.0))}
    for by, share in itertools.product(RULES, SHARES):
        kinds[f"{by}, {share} kept"] = with_prune(model, processor, Prune(share, by))
    narrow, its = kinds[WHOLE]
    kinds["int8 weights"] = int8(copied(narrow)), its
    cached = copied(narrow)
    cached.llm.int8_cache = True
    kinds["int8 cache"] = cached, its
    runs: dict[str, Callable[[], object]] = {}
    held = {}
    for label, (each, its) in kinds.items():
        batch = its([picture], input_ids=ids)
        for n in (1, 1 + STEPS):
            runs[f"{label} {n}"] = functools.partial(generate_ids, each, batch, max_new_tokens=n)
        cache = jax.eval_shape(lambda m=each, b=batch: m.prefill(b, b.read + STEPS)[1])
        held[label] = nbytes((cache.k, cache.v)) / 2**20, nbytes(nnx.state(each.llm)) / 2**20
    seconds = interleaved(runs, sizes.repeats)
    first = {label: seconds[f"{label} 1"].rest for label in kinds}
    after = {
        label: [
            1e3 * (b - a) / STEPS
            for a, b in zip(first[label], seconds[f"{label} {1 + STEPS}"].rest, strict=True)
        ]
        for label in kinds
    }
    rows = []
    for label in list(kinds)[1:]:
        (cache, llm), (whole_cache, whole_llm) = held[label], held[WHOLE]
        rows += [
            row(f"{label}: first token", first[label], first[WHOLE], WHOLE),
            row(f"{label}: each token", after[label], after[WHOLE], WHOLE, "ms"),
            row(f"{label}: cache", [cache], [whole_cache], WHOLE, "MiB"),
            row(f"{label}: LLM", [llm], [whole_llm], WHOLE, "MiB"),
        ]
    return rows


def answers(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """What is saved -> answers that are those of the whole, and right ones, in per cent."""
    members = {name: FAMILY / name for name in ("clip", "dino")}
    scenes.write(folder / "scenes", "test", count, 0, turns=1)
    test = Quiz.read(folder / "scenes")
    model, processor, _ = fuse(FAMILY / "base", members, test, folder / "fused")
    kinds = {WHOLE: (model, processor)}
    pairs = [(s, s) for s in SHARES] + [(s, 1.0) for s in SHARES] + [(1.0, s) for s in SHARES]
    for by, keep in itertools.product(RULES, pairs):
        shares = ", ".join(f"{name} {s:g}" for name, s in zip(members, keep, strict=True))
        kinds[f"{by}: {shares}"] = with_prune(model, processor, Prune(keep, by))
    kinds["int8 weights"] = int8(copied(model)), processor
    right = np.array([[a for _, a in asked] for asked in test.questions.values()])
    found = {label: said(*kind, test) for label, kind in kinds.items()}
    return {
        label: {
            "agree": 100 * float((answers == found[WHOLE]).mean()),
            "right": 100 * float((answers == right).mean()),
        }
        for label, answers in found.items()
    }


def said(model: Model, processor: Processor, test: Quiz) -> np.ndarray:
    """The likeliest word, str[kinds, pictures]."""
    words = {i: word for word, i in processor.require_tokenizer().get_vocab().items()}
    pictures: list = list(test.pictures)
    out = []
    for asked in test.questions.values():
        batch = processor(pictures, [processor.chat(question) for question, _ in asked])
        out.append([words[int(i)] for i in np.asarray(next_logits(model, batch)).argmax(axis=-1)])
    return np.array(out)


if __name__ == "__main__":
    main(arguments(__doc__.splitlines()[0]))
