"""Compares vfjax with outputs recorded from other code, stage by stage."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors.numpy import load_file

from converters.files import hub
from converters.folder import open_source
from converters.load import load
from converters.source import Source
from vfjax import Batch, InputError, Model, Processor, generate_ids
from vfjax.atomic import read_json

Stage = TypeVar("Stage")

BRANCH: Mapping[str, float] = {
    "pixel_values": 2e-6,
    "pixel_values_aux": 2e-6,
    "vision_features": 1e-4,
    "aux_features_strided": 1e-4,
    "mined": 1e-4,
    "mined_local": 1e-4,
    "mined_global": 1e-4,
    "gates": 2e-5,
    "global_features": 1e-4,
    "local_compressed": 1e-4,
    "local_projected_raster": 1e-4,
    "router_scores": 2e-5,
    "selected_local": 0,
    "connector_features": 1e-4,
    "image_features": 1e-4,
}
"""Stage of a branch -> largest absolute difference from the recording, float32 on CPU; 0 is
equality."""

LLM: Mapping[str, float] = {"inputs_embeds": 1e-4, "logits": 2e-4, "generated": 0}
"""So too of the LLM."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One stage of one case.

    Attributes:
        case: name of the folder.
        stage: name of the output.
        error: largest absolute difference over all samples; inf where shapes differ or the stage
            is recorded but unknown here; None where it is not recorded.
        worst: the sample with that difference.
        count: samples compared.
        limit: what the error may be at most.
    """

    case: str
    stage: str
    error: float | None
    worst: str
    count: int
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the stage holds; an absent one neither holds nor fails."""
        return self.error is None or self.error <= self.limit

    def __str__(self) -> str:
        name = f"{self.case:<20} {self.stage:<18}"
        if self.error is None:
            return f"{name} {'absent':>10}  not recorded in this case"
        verdict = "ok" if self.ok else f"FAILED at {self.worst}"
        limit = f"{self.limit:.0e}" if self.limit else "equal"
        return f"{name} {self.error:>10.2e}  limit {limit:<6} samples {self.count}  {verdict}"


MARKS = ("case.json", "config.json")
"""Files that a case has; a folder with neither was not meant as one."""


CASE = ("case.json", "inputs.safetensors", "outputs.safetensors")
"""What it must hold."""


def verify(case: str | Path) -> list[Row]:
    """Runs a recorded case by the path that users run: the processor, `Model` and `generate_ids`.

    The folder format is that of `golden/README.md`. Of a model of several branches a branch's
    stages are recorded under its name: `s0.NAME.image_features` beside `s0.logits`.

    Args:
        case: a checkpoint folder that also holds case.json, inputs.safetensors and
            outputs.safetensors; or such a repository, `org/name[@revision]`, of the hub.

    Raises:
        InputError: the folder is no such case or cannot be loaded.
    """
    case = hub.folder(case, "case", more=CASE)
    for name in CASE:
        if not (case / name).is_file():
            raise InputError(
                case / name, found="no file", expected="a recorded case", fix="check the path"
            )
    read_json(case / "case.json")
    inputs, recorded = (
        load_file(case / "inputs.safetensors"),
        load_file(case / "outputs.safetensors"),
    )
    source = open_source(case)
    model, processor = load(case, dtype="float32")
    errors: dict[str, list[tuple[float, str]]] = {}
    limits = _limits(source)
    computed: set[str] = set()
    longest = source.config.get("tokenizer_model_max_length")  # where upstream cuts
    with jax.default_matmul_precision("highest"):
        samples = sorted({name.split(".")[0] for name in inputs})
        batches = [_batch(processor, inputs, sample, longest) for sample in samples]
        processor.lengths = (max(b.tokens.shape[1] for b in batches),)  # one compilation for all
        for sample in samples:
            start = f"{sample}."
            wanted = {k.removeprefix(start): v for k, v in recorded.items() if k.startswith(start)}
            batch = _batch(processor, inputs, sample, longest)
            found = _stages(model, source, batch, wanted)
            computed |= set(found) & set(limits)
            for stage, value in wanted.items():
                errors.setdefault(stage, []).append((_error(found.get(stage), value), sample))
    rows = []
    for stage in [*(s for s in limits if s in computed), *sorted(set(errors) - computed)]:
        error, worst = max(errors.get(stage, [(None, "")]))
        count = len(errors.get(stage, []))
        rows.append(Row(case.name, stage, error, worst, count, limits.get(stage, 0)))
    return rows


def _limits(source: Source) -> dict[str, float]:
    """Stage -> its limit, in the order of computing; a connector's table may set its own."""
    out: dict[str, float] = {"attention_mask": 0}
    for branch in source.branches:
        own = {**BRANCH, **source.table(f"branches.{branch.name}.connector").limits}
        out |= _named(source, branch.name, own)
    return {**out, **LLM}


def _named(source: Source, branch: str, stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """A branch's stages under the names that a recording has for them."""
    start = f"{branch}." if len(source.branches) > 1 else ""
    return {f"{start}{stage}": value for stage, value in stages.items()}


def _batch(
    processor: Processor, inputs: Mapping[str, np.ndarray], sample: str, limit: int | None
) -> Batch:
    ids = np.atleast_2d(inputs[f"{sample}.input_ids"])
    real = np.atleast_2d(inputs[f"{sample}.attention_mask"]).astype(bool)
    names = [n for n in inputs if n.startswith(f"{sample}.image")]
    names.sort(key=lambda n: (len(n), n))
    rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
    return processor([inputs[n] for n in names], input_ids=rows, truncate=limit)


def _stages(
    model: Model, source: Source, batch: Batch, wanted: dict[str, np.ndarray]
) -> dict[str, np.ndarray | None]:
    """Our tensors under the names that the recording gives them, cut to what it holds.

    `wanted` is brought to the same form: rows at padding are undefined, so they are cut from both.
    """
    outputs = jax.tree.map(np.asarray, _outputs(model, batch))
    out: dict[str, Any] = {}
    for name, stages in outputs["stages"].items():
        table = source.table(f"branches.{name}.connector")
        connector = model.config.branch(name).architecture.connector
        inputs = jax.tree.map(np.asarray, batch.images[name].given)
        out |= _named(source, name, table.recorded(connector, inputs, stages))
    for stage in set(out) & set(wanted):  # the batch holds black pictures up to its bucket
        if _axis(wanted, stage) != 0:
            out[stage] = out[stage][: len(wanted[stage])]
    mask = outputs["mask"]
    real = wanted.get("attention_mask", np.True_).astype(bool)
    for stage in ("inputs_embeds", "logits"):
        out[stage] = outputs[stage][mask]
        if stage in wanted:
            wanted[stage] = wanted[stage][real].reshape(-1, wanted[stage].shape[-1])
    if "attention_mask" in wanted:
        out["attention_mask"] = mask[:, : wanted["attention_mask"].shape[1]]
    if "generated" in wanted:
        (ids,) = generate_ids(model, batch, max_new_tokens=wanted["generated"].size)
        out["generated"] = np.asarray(ids)
    for stage in [name.removesuffix(".rows") for name in wanted if name.endswith(".rows")]:
        axis = _axis(wanted, stage)
        out[stage] = out[stage].take(wanted.pop(f"{stage}.rows"), axis=axis)
    return out


def _axis(wanted: Mapping[str, np.ndarray], stage: str) -> int | None:
    """The axis of which only the rows in `stage.rows` are recorded, None if all is."""
    if f"{stage}.rows" not in wanted:
        return None
    return wanted[stage].shape.index(len(wanted[f"{stage}.rows"]))


@jax.jit
def _outputs(model: Model, batch: Batch) -> dict[str, Any]:
    """What the model computes of a batch, and on the way."""
    names = [branch.name for branch in model.config.branches]
    memories = zip(names, model.memories(batch.images), strict=False)  # none without pictures
    x, mask = model.embed(batch)
    if all(branch.scaled for branch in model.config.branches):
        x = x / model.llm.scale  # recorded before the authors' LLM scales them
    return {
        "stages": {name: memory.stages for name, memory in memories},
        "inputs_embeds": x,
        "mask": mask,
        "logits": model(batch),
    }


def _error(found: np.ndarray | None, wanted: np.ndarray) -> float:
    if found is None or found.shape != wanted.shape:
        return float("inf")
    error = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0)
    return float("inf") if np.isnan(error) else float(error)


def run(cases: Sequence[str]) -> bool:
    """Prints a table of all cases; True if every recorded stage holds.

    Folders beside cases (as in `golden/*/`), neither case nor checkpoint, are said and skipped.

    Raises:
        InputError: see `verify`; or no folder is a case.
    """
    good = True
    folders = [Path(case) for case in cases]
    beside = [f for f in folders if f.is_dir() and not any((f / x).exists() for x in MARKS)]
    for folder in folders:
        if folder in beside and len(beside) < len(folders):
            print(f"{folder.name:<20} no case.json, no config.json: not a case, skipped")
            continue
        for row in verify(folder):
            print(row)
            good &= row.ok
    return good
