"""MERGE.md: what was merged, how, from which files, and what the members had done to the base."""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from vfjax.merge import Account
from vfjax.merge.recipe import LAYER

CARD, PLOT = "MERGE.md", "merge.png"


def by_layer(accounts: Iterable[tuple[str, str, Account]]) -> dict[str, Account]:
    """Adds up the accounts of a layer's tensors; tensors outside the layers keep their names.

    Args:
        accounts: (what the module is called, "" for the LLM; tensor name; account).
    """
    out: dict[str, Account] = {}
    for module, name, one in accounts:
        found = LAYER.fullmatch(name)
        key = f"{module} layer {found[2]}".strip() if found else name.removesuffix(".weight")
        out[key] = out[key] + one if key in out else one
    return out


@dataclasses.dataclass(frozen=True)
class Listed:
    """A folder that was merged.

    Attributes:
        path: its name.
        files: each weights file's SHA-256, None if not taken.
        quantised: how its tensors were, those that were.
    """

    path: str
    files: Mapping[str, str | None]
    quantised: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.quantised:
            return f"`{self.path}`"
        kinds = ", ".join(self.quantised)
        return f"`{self.path}`, quantised ({kinds}): what was merged are the values left by that"


def card(
    recipe: Mapping[str, Any],
    sources: Mapping[str, Listed],
    layers: Mapping[str, Account],
    labels: Sequence[str],
    *,
    fused: bool,
) -> bytes:
    """The model card, Markdown with the front matter that the Hugging Face hub reads.

    Args:
        recipe: what `fuse` was asked for, JSON.
        sources: label -> the folder.
        layers: rows of the table, from `by_layer`; none if the method reads no base.
        labels: the members'.
        fused: whether the folder's `model_type` is "visionfuse", no plain LLM or member's layout.
    """
    head = {"library_name": "vfjax", "tags": ["vfjax", "merge", *(["visionfuse"] if fused else [])]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += ["# Merged model", "", "Made by vfjax from", ""]
    lines += [f"- `{label}`: {source}" for label, source in sources.items()]
    shown = {key: value for key, value in recipe.items() if key != "vocabulary"}
    lines += ["", "## Recipe", "", "```json", json.dumps(shown, indent=2), "```", ""]
    if vocabulary := recipe.get("vocabulary"):
        lines += ["## Vocabulary", "", *(f"- {line}" for line in vocabulary), ""]
    lines += ["## Sources", "", "| model | file | SHA-256 |", "| --- | --- | --- |"]
    for label, source in sources.items():
        lines += [f"| {label} | {n} | {h or 'not taken'} |" for n, h in source.files.items()]
    lines += ["", "## What the members did to the base", ""]
    if layers:
        lines += _table(layers, labels)
        lines += ["", f"![The same by layer]({PLOT})"] if find_spec("matplotlib") else []
    else:
        lines += ["Not counted: the method reads no base, or it was not asked for."]
    return ("\n".join(lines) + "\n").encode(errors="backslashreplace")  # names may be no UTF-8


def _table(layers: Mapping[str, Account], labels: Sequence[str]) -> list[str]:
    pairs = _pairs(len(labels))
    names = [f"moved {label}" for label in labels]
    names += [f"cos {labels[i]}, {labels[j]}" for i, j in pairs]
    names += ["conflicts"] if pairs else []
    lines = [
        "Length of each delta as a share of the base's, cosine of two deltas, and the share of the "
        "weights that one member moved up and another down.",
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " --: |" * len(names),
    ]
    for key, one in layers.items():
        cells = [f"{x:.4%}" for x in one.moved]
        cells += [f"{one.cosine(i, j):.4f}" for i, j in pairs]
        cells += [f"{one.conflicts / max(1, one.count):.2%}"] if pairs else []
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def plot(layers: Mapping[str, Account], labels: Sequence[str]) -> bytes:
    """The table as a PNG, layers along x; with matplotlib (the extra `plot`)."""
    from matplotlib.figure import Figure

    rows = [(key, one) for key, one in layers.items() if key.startswith("layer ")]
    x = [int(key.split()[1]) for key, _ in rows]
    pairs = _pairs(len(labels))
    figure = Figure(figsize=(10, 3.2 if pairs else 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if pairs else 1, squeeze=False)[0]
    for i, label in enumerate(labels):
        axes[0].plot(x, [one.moved[i] * 100 for _, one in rows], label=label)
    axes[0].set_title("length of delta, % of base")
    if pairs:
        for i, j in pairs:
            cosines = [one.cosine(i, j) for _, one in rows]
            axes[1].plot(x, cosines, label=f"{labels[i]}, {labels[j]}")
        axes[1].set_title("cosine of deltas")
        axes[2].plot(x, [100 * one.conflicts / max(1, one.count) for _, one in rows])
        axes[2].set_title("conflicts of sign, %")
    for one in axes:
        one.set_xlabel("layer")
        one.grid(alpha=0.3)
    axes[0].legend()
    if pairs:
        axes[1].legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
