"""Fuses members' folders into one."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import converters
from converters.files.paths import stand_in
from converters.fusion import Fusion
from converters.request import Request
from experiments.tasks.common import bar, named, required
from vfjax import InputError
from vfjax.errors import counted, shown
from vfjax.processes import agreeing, together

KEYS = [
    *("base", "recipe", "export", "template", "dtype", "router", "vocab", "seed"),
    *("positions", "mask", "family", "checksums", "account"),
]
"""Of the config, that `converters.fuse` takes as they are."""


def run(config: ConfigDict, workdir: Path) -> None:
    try:
        fuse(config, workdir)
    except InputError as error:  # Python's argument, in the words of the command line
        error.args = (str(error).replace("vocab='", "--config.vocab='"),)
        raise


def fuse(config: ConfigDict, workdir: Path) -> None:
    if not config.recipe:
        required(config, "members")
    members = named("members", config.members)
    params = {key: value for key, value in config.params.to_dict().items() if value is not None}
    if not config.recipe and config.weights:
        params["weights"] = tuple(config.weights)
    out = stand_in(config.output or workdir / "fused")
    options: dict[str, Any] = {key: config[key] for key in KEYS}
    if not config.recipe:
        options |= {"method": config.method, "params": params, "rules": config.rules}
    options["towers"] = named("towers", config.towers)
    options["shard_bytes"] = config.shard_gb * 1e9
    if config.dry_run:
        show(out, converters.dry_run(members, out, **options))
        return
    with agreeing("fuse", folder=out.absolute().parent) as facts:
        if jax.process_count() > 1:
            facts |= Fusion(Request(members, out, **options)).facts()
    source = None
    with together("fuse"):
        if jax.process_index() == 0:
            with bar("fuse") as progress:
                keys = ("resume", "remote_code", "push_to_hub", "private")
                options |= {key: config[key] for key in keys}
                source = converters.fuse(members, out, progress=progress, **options)
    if source is None:
        return
    weights = params.get("weights")
    terms = ", ".join(members if weights is None else map(_term, weights, members))
    what = f"recipe {config.recipe}" if config.recipe else f"{config.method} of {terms}"
    name = shown(out)
    print(f"{name}: {what}, template {source.template}")
    if config.push_to_hub:
        print(f"{config.push_to_hub} on the hub has it, too")
    print(f"{name}/MERGE.md says what was merged; python -m converters inspect {name}")


def _term(weight: object, member: str) -> str:
    return f"{weight:g} x {member}" if isinstance(weight, int | float) else f"{weight} x {member}"


NANOSECONDS = {"linear": 6, "task_arithmetic": 6, "slerp": 10, "dare_linear": 12, "dare_ties": 12}
"""A parameter's time, on two cores with the files cached, from bench/merge.py; 20 for others."""


def show(out: Path, found: dict[str, Any]) -> None:
    """Prints what a dry run found."""
    size = sum(found["files"].values())
    seconds = found["parameters"] * 1e-9 * max(NANOSECONDS.get(m, 20) for m in found["methods"])
    for name, count in found["files"].items():
        print(f"{shown(out / name)}: {count / 1e9:.3f} GB")
    methods = ", ".join(f"{count} by {name}" for name, count in found["methods"].items())
    count = counted(found["tensors"], "tensor")
    print(f"{count}, {found['parameters']:,} parameters; merged: {methods}")
    for line in found["vocabulary"]:
        print(f"vocabulary: {line}")
    print(f"reads {found['read'] / 1e9:.3f} GB, writes {size / 1e9:.3f} GB; nothing written yet")
    print(f"about {seconds:.0f} s on two cores, beside the disk's time and the sources' SHA-256")
