"""What a person sees of a training run: a line, a JSONL, TensorBoard, W&B, a picture."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vfjax.atomic import contents, replacing
from vfjax.errors import InputError
from vfjax.train.flops import peak

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Takes scalars of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps them."""

    def close(self) -> None:
        """Ends."""


class TensorBoard:
    """Event files that TensorBoard reads, by tensorboardX."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise missing("tensorboard", "tensorboardX", "train") from error
        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, project: str, name: str, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise missing("wandb", "wandb", "wandb") from error
        run = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self.run = wandb.init(project=project, name=name, id=run, dir=str(folder), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def missing(key: str, package: str, extra: str) -> InputError:
    """The error where a config asks for a package that is not installed."""
    return InputError(
        f"config.{key}",
        found=f"no package {package}",
        expected="it installed",
        fix=f"pip install 'vfjax[{extra}]', or leave config.{key} off",
    )


class Record:
    """One stage's metrics, from its first step or from where it goes on.

    The JSONL holds a row a step: "step", "loss", "grad_norm", "answers", "tokens",
    "learning_rate", "seconds". Steps that are run again replace their rows.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        steps: int,
        *,
        trackers: Sequence[Tracker] = (),
    ):
        """Opens the files.

        Args:
            folder: of the stage.
            start: steps done before.
            steps: of the stage.
            trackers: more that take the scalars.
        """
        self.steps, self.trackers, self.peak = steps, trackers, peak()
        self.time, self.seen = time.perf_counter(), start
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / METRICS
        kept = [row for row in read(file) if row["step"] <= start] if file.is_file() else []
        with replacing(file) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.path, self.file = file, file.open("a")

    def write(self, rows: Sequence[dict[str, float]], flops: float | None) -> None:
        """Keeps consecutive steps' values, each with its 1-based "step", and prints their means.

        Args:
            rows: one a step.
            flops: of all these steps together, None if unknown.
        """
        now = time.perf_counter()
        seconds = (now - self.time) / len(rows)
        self.time, self.seen = now, int(rows[-1]["step"])
        for row in rows:
            self.file.write(json.dumps({**row, "seconds": round(seconds, 6)}) + "\n")
        self.file.flush()
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "step"}
        mean |= {"tokens_per_second": mean.pop("tokens") / seconds, "seconds": seconds}
        if self.peak and flops:
            mean["mfu"] = flops / len(rows) / seconds / self.peak
        for tracker in self.trackers:
            tracker.write(self.seen, mean)
        print(self.line(mean), flush=True)

    def line(self, mean: Mapping[str, float]) -> str:
        """Progress in one line."""
        use = f"  MFU {mean['mfu']:.1%}" if "mfu" in mean else ""
        left = (self.steps - self.seen) * mean["seconds"]
        return (
            f"step {self.seen}/{self.steps}  loss {mean['loss']:.4f}  "
            f"{mean['tokens_per_second']:,.0f} tokens/s{use}  {_clock(left)} left"
        )

    def close(self) -> None:
        """Ends all files."""
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL; a last one that a kill cut off is left out."""
    rows = []
    for line in contents(file).split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


def report(file: Path, stages: Mapping[str, Path]) -> None:
    """Loss, gradient norm and learning rate of all stages in one PNG.

    Args:
        file: to write.
        stages: name -> folder with a JSONL.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("report", "matplotlib", "plot") from error
    panels = ("loss", "grad_norm", "learning_rate")
    figure = Figure(figsize=(5 * len(stages), 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(stages), squeeze=False)
    for column, (name, folder) in enumerate(stages.items()):
        rows = read(folder / METRICS)
        steps = [row["step"] for row in rows]
        for axis, key in zip(axes[:, column], panels, strict=True):
            axis.plot(steps, [row[key] for row in rows], linewidth=1)
            axis.set(title=f"{name}: {key.replace('_', ' ')}", xlabel="step")
    with replacing(file) as part:
        figure.savefig(part, format="png", dpi=120)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
