"""MERGE.md: what was merged, how, from which files, and what the members had done to the base.

README.md, where a model is sent to the hub: what it is made of, and how to run it.
"""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from converters.files import hub
from converters.files.names import README
from vfjax.atomic import contents
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
    """MERGE.md, Markdown with the front matter that the Hugging Face hub reads.

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


USAGE = {
    "jax": """import converters
import vfjax

model, processor = converters.load("{name}")
""",
    "jax sees": """question = processor.chat("What is on the sofa?")
batch = processor(images=["cat.jpg"], prompts=[question])
""",
    "jax llm": """batch = processor(prompts=["The cat sat on"])
""",
    "jax end": """print(vfjax.generate(model, processor, batch, max_new_tokens=64))
""",
    "llm": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
inputs = tokenizer("The cat sat on", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64)))
""",
    "transformers": """from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}")
model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
""",
    "authors": """from converters.hf import VisionFuseForConditionalGeneration, VisionFuseProcessor

processor = VisionFuseProcessor.from_pretrained("{name}")
model = VisionFuseForConditionalGeneration.from_pretrained("{name}", dtype="auto")
""",
    "asked": """picture = {{"type": "image", "path": "cat.jpg"}}
question = {{"type": "text", "text": "What is on the sofa?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [picture, question]}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.tokenizer.batch_decode(answer, skip_special_tokens=True))
""",
}
"""Pieces of the programs on a card."""

LICENSE = ("license", "license_name", "license_link")
"""Keys of a card's front matter."""


def readme(
    name: str,
    kind: str,
    folders: Sequence[Path],
    recipe: Mapping[str, Any] | None,
    remote_code: bool,
) -> bytes:
    """The model card that the hub shows: YAML front matter, how to run the model in JAX and torch.

    Args:
        name: `org/name`.
        kind: see `Source.kind`.
        folders: what it was made of; those from the hub are named, and their license is its, if all
            have the same.
        recipe: of a merge, as in config.json.
        remote_code: whether the folder holds code with which transformers alone runs it.
    """
    places = (recipe or {}).get("repositories")
    if isinstance(places, Mapping):
        parts = [x for part, x in places.items() if "/branches." not in part]
    else:
        parts = [x for folder in folders if (x := hub.named(folder)) is not None]
    known = list(dict.fromkeys(str(x).partition("@")[0] for x in parts))
    licenses = [_license(folder) for folder in folders]
    ours = ["vfjax"] + ["merge"] * (recipe is not None) + ["visionfuse"] * (kind == "fused")
    head: dict[str, Any] = {"base_model": known} if known else {}
    head |= {"base_model_relation": "merge"} if known and recipe is not None else {}
    head |= {
        "library_name": "transformers" if kind in ("llm", "transformers") else "vfjax",
        "pipeline_tag": "text-generation" if kind == "llm" else "image-text-to-text",
        "tags": ours,
    }
    head |= licenses[0] if licenses and all(x == licenses[0] for x in licenses) else {}
    jax = USAGE["jax"] + USAGE["jax llm" if kind == "llm" else "jax sees"] + USAGE["jax end"]
    torch = {
        "llm": USAGE["llm"],
        "transformers": USAGE["transformers"] + USAGE["asked"],
        "authors": USAGE["authors"] + USAGE["asked"],
        "fused": "import converters.hf\n" + USAGE["transformers"] + USAGE["asked"],
    }[kind]
    alone = remote_code or kind in ("llm", "transformers")
    how = "" if alone else " (`pip install 'vfjax[hf]'`)"
    if remote_code:
        torch = torch.removeprefix("import converters.hf\n")
        torch = torch.replace('("{name}"', '("{name}", trust_remote_code=True')
    made = f"Made by vfjax from {', '.join(known)}" if known else "Made by vfjax"
    said = f"{made}; {CARD} says how." if recipe is not None else f"{made}."
    text = f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {name.rpartition("/")[2]}

{said}

In JAX (`pip install vfjax`):

```python
{jax.format(name=name)}```

In PyTorch{how}:

```python
{torch.format(name=name)}```
"""
    return text.encode(errors="backslashreplace")


def _license(folder: Path) -> dict[str, str]:
    """What the front matter of a folder's card says of its license; empty if it says nothing."""
    try:
        text = contents(folder / README).decode()
        front = text.partition("---\n")[2].partition("\n---")[0] if text[:4] == "---\n" else ""
        found = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # no card, or none of the hub's
        return {}
    known = found if isinstance(found, Mapping) else {}
    return {key: x for key in LICENSE if isinstance(x := known.get(key), str)}


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
