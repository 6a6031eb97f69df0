"""Fuses members' folders into one."""

from pathlib import Path

from ml_collections import ConfigDict

import converters
from experiments.tasks.common import bar, named, required


def run(config: ConfigDict, workdir: Path) -> None:
    required(config, "members")
    members = named("members", config.members)
    weights = config.weights or (1 / len(members),) * len(members)
    out = Path(config.output or workdir / "fused")
    with bar("fuse") as progress:
        source = converters.fuse(
            members,
            out,
            base=config.base,
            method=config.method,
            params={"weights": list(weights), **config.params.to_dict()},
            export=config.export,
            template=config.template,
            dtype=config.dtype,
            router=config.router,
            towers=named("towers", config.towers),
            progress=progress,
        )
    terms = ", ".join(f"{weight:g} x {name}" for name, weight in zip(members, weights, strict=True))
    print(f"{out}: {config.method} of {terms}, template {source.template}")
    print(f"python -m converters inspect {out}")
