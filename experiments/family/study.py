"""The controlled experiment: a fusion beside its members and what else could explain its gain."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

import converters
from experiments.family.members import Quiz, load, score
from vfjax import CacheFusion, LogitsFusion, MemberProcessors, Model, Processor, Prune
from vfjax.eval import stats
from vfjax.eval.stats import ratio
from vfjax.generate import Generator
from vfjax.llm import Llama
from vfjax.processor import LENGTHS

Scores = dict[str, dict[str, np.ndarray]]
"""Who answers -> kind of question -> bool[n], right or wrong."""


Keep = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]
"""Who answers, and what makes the scores -> them; from a file, where they were made before."""


def make_all(_: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Keeps nothing."""
    return make()


class How(TypedDict, total=False):
    """What of `converters.fuse` may be asked for."""

    method: str
    params: Mapping[str, Any]
    rules: Sequence[tuple[str, Mapping[str, Any]]]
    positions: str
    mask: str
    family: bool


FUSED = "fused: tokens"
WAYS = {
    FUSED: ("running", "causal"),
    "fused: tokens, block mask": ("running", "block"),
    "fused: tokens, parallel positions": ("parallel", "causal"),
    "fused: tokens, parallel and block": ("parallel", "block"),
}
"""One merged LLM reads all branches; the first is VisionFuse as its paper has it."""


def fuse(
    base: Path,
    members: Mapping[str, Path],
    test: Quiz,
    folder: Path,
    *,
    prune: Prune | None = None,
    **recipe: Unpack[How],
) -> tuple[Model, Processor, dict[str, np.ndarray]]:
    """A fusion, written and read again, and its scores.

    Args:
        base: folder of the base LLM.
        members: name -> folder, in the order of their tokens.
        test: the questions.
        folder: to write.
        prune: of its visual tokens.
        recipe: of `converters.fuse`; by default task arithmetic with equal weights.
    """
    params: dict[str, Any] = {"weights": (1 / len(members),) * len(members)}
    how: How = {"params": params, **recipe}
    converters.fuse(members, folder, base=base, **how)
    model, processor = load(folder, prune)
    return model, processor, score(model, processor, test)


def study(
    base: Path,
    members: Mapping[str, Path],
    test: Quiz,
    folder: Path,
    ways: Mapping[str, tuple[str, str]] = WAYS,
    *,
    keep: Keep = make_all,
    who: Collection[str] = (),
    rows: int = 250,
    lengths: tuple[int, ...] = LENGTHS,
) -> Scores:
    """Fuses members with equal weights and asks everybody the same questions.

    Args:
        base: folder of the base LLM.
        members: name -> folder, in the order of their tokens.
        test: the questions.
        folder: where the fused model is written, unless it is there.
        ways: name -> positions and mask of the merged LLM's tokens, beside the first of `WAYS`.
        keep: gives each one's scores.
        who: is asked; (): everybody.
        rows: of a batch.
        lengths: that prompts are padded to, see `Processor.lengths`.

    Returns:
        Scores of the members, "fused: ..." in all ways, and the controls.
    """
    out: Scores = {}

    def ask(name: str, model: Generator, processor: Processor | MemberProcessors) -> None:
        if not who or name in who:
            out[name] = keep(name, lambda: score(model, processor, test, rows=rows))

    def read(path: Path) -> tuple[Model, Processor]:
        model, processor = load(path)
        return model, dataclasses.replace(processor, lengths=lengths)

    loaded = {name: read(path) for name, path in members.items()}
    for name, pair in loaded.items():
        ask(name, *pair)
    if not folder.is_dir():
        equal: dict[str, Any] = {"weights": (1 / len(members),) * len(members)}
        converters.fuse(members, folder, base=base, params=equal)
    fused, processor = read(folder)
    for name, (positions, mask) in {FUSED: WAYS[FUSED], **ways}.items():
        ask(name, arranged(fused, positions, mask), processor)
    theta, _ = load(base)
    ask("base LLM, all branches", with_llm(fused, theta.llm), processor)
    models = [model for model, _ in loaded.values()]
    ask("fused: cache", CacheFusion(fused, [model.llm for model in models]), processor)
    processors = MemberProcessors(tuple(own for _, own in loaded.values()))
    ask("fused: logits", LogitsFusion(models), processors)
    for name, (model, own) in loaded.items():
        ask(f"LLM of {name}, all branches", with_llm(fused, model.llm), processor)
        ask(f"merged LLM, {name} alone", with_llm(model, fused.llm), own)
    return out


def arranged(model: Model, positions: str, mask: str) -> Model:
    """The same parameters, tokens at other positions."""
    other = copied(model)
    other.config = dataclasses.replace(model.config, positions=positions, mask=mask)
    return other


def with_llm(model: Model, llm: Llama) -> Model:
    """The same branches before another LLM."""
    other = copied(model)
    other.llm = llm
    return other


def copied(model: Model) -> Model:
    """Another model of the same arrays."""
    return jax.tree.map(lambda x: x, model)


def paired(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], seed: int = 0) -> dict:
    """Difference of the means (per cent), its 95 % interval, and p, by paired bootstrap.

    Pictures are drawn again, all kinds of a picture together; see `vfjax.eval.paired`.

    Args:
        a: kind of question -> bool[n], or shares of right answers.
        b: the same questions.
        seed: of the draws, 10,000.
    """
    one, other = (ratio(np.mean([scores[kind] for kind in a], axis=0)) for scores in (a, b))
    pictures = [f"{i:06}" for i in range(len(next(iter(a.values()))))]
    both = stats.paired({"mean": one}, {"mean": other}, pictures, draws=10_000, seed=seed)
    found = both["mean"]
    return {
        "difference": found["difference"],
        "interval": [found["low"], found["high"]],
        "p": found["p"],
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Per cent right as text: a row an answerer, a column a kind of question."""
    kinds = list(next(iter(rows.values())))
    width = max(map(len, rows))
    head = " " * width + "".join(f"{kind:>9}" for kind in kinds)
    lines = [
        f"{name:{width}}" + "".join(f"{row[k]:9.1f}" for k in kinds) for name, row in rows.items()
    ]
    return "\n".join([head, *lines])
