"""One of two processes that disagree in one thing after another; see test_processes.py."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

import converters
from tests.distributed_worker import make_batch
from vfjax import Batch, InputError, generate_ids, processes
from vfjax.processes import agreeing
from vfjax.sharding import make_mesh


def main(address: str, count: int, index: int, root: Path) -> None:
    """Writes `root`/said-INDEX.json: what each of the trials below says."""
    jax.distributed.initialize(address, count, index)
    processes.SHARING = 2
    mesh, last = make_mesh(4, 2), index == count - 1
    own = root / f"own-{index}"
    shutil.copytree(root / "llava", own)
    model, processor = converters.load(own, mesh=mesh)
    batch = make_batch(processor)
    odd = make_batch(processor)
    if last:
        tokens = np.array(odd.tokens)
        tokens[0, 1] += 1
        odd = Batch(tokens, odd.visual, odd.mask, odd.images, sizes=odd.sizes)
    said = [f"{len(generate_ids(model, batch, max_new_tokens=2))} rows"]
    trials = {
        "prompt": lambda: generate_ids(model, odd),
        "argument": lambda: generate_ids(model, batch, max_new_tokens=4 + last),
        "config": lambda: converters.load(configured(own, last), mesh=mesh),
        "weights": lambda: converters.load(changed(own, last), mesh=mesh),
        "absent": lambda: converters.load(root / "none" if last else own, mesh=mesh),
        "folder": lambda: share(root / f"runs-{index}"),
        "task": lambda: generate_ids(model, batch) if last else converters.load(own, mesh=mesh),
    }
    for trial in trials.values():
        try:
            trial()
            said.append("nothing")
        except InputError as error:
            said.append(str(error))
    said.append(f"{len(generate_ids(model, batch, max_new_tokens=2))} rows")
    (root / f"said-{index}.json").write_text(json.dumps(said))


def configured(own: Path, last: bool) -> Path:
    """The folder, with another key of config.json in the last process."""
    if last:
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-3}))
    return own


def changed(own: Path, last: bool) -> Path:
    """The folder, with one byte of its weights changed in the last process, its config mended."""
    if last:
        shutil.copyfile(own.parent / "llava" / "config.json", own / "config.json")
        with (own / "model.safetensors").open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\x01")
    return own


def share(folder: Path) -> None:
    """A working folder that each process has by itself."""
    with agreeing("train", folder=folder):
        pass


if __name__ == "__main__":
    address, count, index, root = sys.argv[1:]
    main(address, int(count), int(index), Path(root))
