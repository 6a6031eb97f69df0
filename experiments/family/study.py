"""The controlled experiment: a fusion beside its members and what else could explain its gain."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

import converters
from experiments.family.members import Quiz, load, score
from vfjax import CacheFusion, LogitsFusion, MemberProcessors, Model, Processor, Prune
from vfjax.eval import stats
from vfjax.eval.stats import ratio
from vfjax.llm import Llama

Scores = dict[str, dict[str, np.ndarray]]
"""Who answers -> kind of question -> bool[n], right or wrong."""


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
) -> Scores:
    """Fuses members with equal weights and asks everybody the same questions.

    Args:
        base: folder of the base LLM.
        members: name -> folder, in the order of their tokens.
        test: the questions.
        folder: where the fused model is written.
        ways: name -> positions and mask of the merged LLM's tokens, beside the first of `WAYS`.

    Returns:
        Scores of the members, "fused: ..." in all ways, and the controls.
    """
    loaded = {name: load(path) for name, path in members.items()}
    out = {name: score(*pair, test) for name, pair in loaded.items()}
    fused, processor, out[FUSED] = fuse(base, members, test, folder)
    for name, (positions, mask) in ways.items():
        if name != FUSED:
            out[name] = score(arranged(fused, positions, mask), processor, test)
    models = [model for model, _ in loaded.values()]
    llms = [model.llm for model in models]
    out["fused: cache"] = score(CacheFusion(fused, llms), processor, test)
    processors = MemberProcessors(tuple(own for _, own in loaded.values()))
    out["fused: logits"] = score(LogitsFusion(models), processors, test)

    for name, (model, own) in loaded.items():
        out[f"merged LLM, {name} alone"] = score(with_llm(model, fused.llm), own, test)
        out[f"LLM of {name}, all branches"] = score(with_llm(fused, model.llm), processor, test)
    theta, _ = load(base)
    out["base LLM, all branches"] = score(with_llm(fused, theta.llm), processor, test)
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
