"""Compares vfjax with outputs recorded from other code, stage by stage."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from converters.load import load
from converters.reader import read_json
from vfjax import Batch, InputError, Model, Processor, generate_ids

LIMITS: Mapping[str, float] = {
    "attention_mask": 0,
    "pixel_values": 2e-6,
    "vision_features": 1e-4,
    "image_features": 1e-4,
    "inputs_embeds": 1e-4,
    "logits": 2e-4,
    "generated": 0,
}
"""Stage -> largest absolute difference from the recording, float32 on CPU; 0 is equality."""

PICTURES = ("pixel_values", "vision_features", "image_features")
"""Stages with one row a picture."""


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
    """

    case: str
    stage: str
    error: float | None
    worst: str
    count: int

    @property
    def ok(self) -> bool:
        """Whether the stage holds; an absent one neither holds nor fails."""
        return self.error is None or self.error <= LIMITS.get(self.stage, 0)

    def __str__(self) -> str:
        name = f"{self.case:<20} {self.stage:<18}"
        if self.error is None:
            return f"{name} {'absent':>10}  not recorded in this case"
        verdict = "ok" if self.ok else f"FAILED at {self.worst}"
        limit = f"{LIMITS[self.stage]:.0e}" if LIMITS.get(self.stage) else "equal"
        return f"{name} {self.error:>10.2e}  limit {limit:<6} samples {self.count}  {verdict}"


def verify(case: str | Path) -> list[Row]:
    """Runs a recorded case; the folder format is that of `golden/README.md`.

    Args:
        case: a checkpoint folder that also holds case.json, inputs.safetensors and
            outputs.safetensors.

    Raises:
        InputError: the folder is no such case or cannot be loaded.
    """
    case = Path(case)
    for name in ("case.json", "inputs.safetensors", "outputs.safetensors"):
        if not (case / name).is_file():
            raise InputError(
                case / name, found="no file", expected="a recorded case", fix="check the path"
            )
    read_json(case / "case.json")
    inputs, recorded = (
        load_file(case / "inputs.safetensors"),
        load_file(case / "outputs.safetensors"),
    )
    model, processor = load(case, dtype="float32")
    errors: dict[str, list[tuple[float, str]]] = {}
    with jax.default_matmul_precision("highest"):
        for sample in sorted({name.split(".")[0] for name in inputs}):
            start = f"{sample}."
            wanted = {k.removeprefix(start): v for k, v in recorded.items() if k.startswith(start)}
            found = _stages(model, _batch(processor, inputs, sample), wanted)
            for stage, value in wanted.items():
                errors.setdefault(stage, []).append((_error(found.get(stage), value), sample))
    rows = []
    for stage in [*LIMITS, *sorted(set(errors) - set(LIMITS))]:
        error, worst = max(errors.get(stage, [(None, "")]))
        rows.append(Row(case.name, stage, error, worst, len(errors.get(stage, []))))
    return rows


def _batch(processor: Processor, inputs: Mapping[str, np.ndarray], sample: str) -> Batch:
    ids = np.atleast_2d(inputs[f"{sample}.input_ids"])
    real = np.atleast_2d(inputs[f"{sample}.attention_mask"]).astype(bool)
    names = [n for n in inputs if n.startswith(f"{sample}.image")]
    names.sort(key=lambda n: (len(n), n))
    rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
    return processor([inputs[n] for n in names], input_ids=rows)


def _stages(
    model: Model, batch: Batch, wanted: dict[str, np.ndarray]
) -> dict[str, np.ndarray | None]:
    """Our tensors under the names that the recording gives them.

    `wanted` is brought to the same form: rows at padding are undefined, so they are cut from both.
    """
    out: dict[str, Any] = jax.tree.map(np.asarray, _outputs(model, batch))
    for name, inputs in batch.images.items():
        out["pixel_values"] = np.asarray(inputs["pixels"]).transpose(0, 3, 1, 2)
        tokens = model.branches[name].config.tokens
        for stage in PICTURES:  # the batch holds black pictures up to its bucket
            out[stage] = out[stage][: np.sum(batch.visual >= 0) // tokens]
    real = wanted.get("attention_mask", np.True_).astype(bool)
    for stage in ("inputs_embeds", "logits"):
        out[stage] = out[stage][batch.mask]
        if stage in wanted:
            wanted[stage] = wanted[stage][real].reshape(-1, wanted[stage].shape[-1])
    if "attention_mask" in wanted:
        out["attention_mask"] = batch.mask[:, : wanted["attention_mask"].shape[1]]
    if "generated" in wanted:
        (ids,) = generate_ids(model, batch, max_new_tokens=wanted["generated"].size)
        out["generated"] = np.asarray(ids)
    return out


@jax.jit
def _outputs(model: Model, batch: Batch) -> dict[str, jax.Array]:
    """All stages of one forward pass."""
    out = {}
    if batch.images:
        (branch,) = model.branches.values()
        out["vision_features"] = branch.features(batch.images[branch.config.name])
        out["image_features"] = branch.connector(out["vision_features"])
    return out | {"inputs_embeds": model.embed(batch), "logits": model(batch)}


def _error(found: np.ndarray | None, wanted: np.ndarray) -> float:
    if found is None or found.shape != wanted.shape:
        return float("inf")
    error = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0)
    return float("inf") if np.isnan(error) else float(error)


def run(cases: Sequence[str]) -> bool:
    """Prints a table of all cases; True if every recorded stage holds."""
    good = True
    for case in cases:
        for row in verify(case):
            print(row)
            good &= row.ok
    return good
