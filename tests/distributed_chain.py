"""One of several processes that fuse, load, generate and train; see test_distributed.py."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import converters
import experiments.configs.train as configs_train
import experiments.tasks.train as task
from converters.files.reader import FileTensor
from tests.distributed_worker import make_batch
from vfjax import generate_ids
from vfjax.processes import together
from vfjax.sharding import make_mesh


def main(address: str, count: int, index: int, root: Path, out: Path) -> None:
    """Writes `out`/tokens-INDEX.json, and with the others what `chain` makes."""
    jax.distributed.initialize(address, count, index)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (count, 2, 8)
    (out / f"tokens-{index}.json").write_text(json.dumps(chain(root, out)))
    (out / f"read-{index}.json").write_text(json.dumps(bytes_read(out / "fused")))


def chain(root: Path, out: Path) -> list[list[int]]:
    """Fuses `root`/a and b into `out`/fused, on process 0; trains its connectors a step, in align.

    Returns:
        What the fused model says, before it is trained.
    """
    with together("fuse"):
        if jax.process_index() == 0:
            members, params = {name: root / name for name in "ab"}, {"weights": (0.5, 0.5)}
            converters.fuse(members, out / "fused", base=root / "base", params=params)
    model, processor = converters.load(out / "fused", mesh=make_mesh(4, 2))
    tokens = generate_ids(model, make_batch(processor), max_new_tokens=4)

    config = configs_train.get_config()
    with config.unlocked():
        del config.stages["tune"]
    stage = {"data": (f"{root / 'rows.json'}={root}",), "batch": 4, "steps": 1, "length": 400}
    changes = {"model": str(out / "fused"), "dtype": "float32", "mesh": (4, 2), "report": False}
    changes |= {f"stages.align.{key}": value for key, value in stage.items()}
    config.update_from_flattened_dict(changes)
    task.run(config, out)
    return tokens


def bytes_read(folder: Path) -> int:
    """Of a model's tensors by this process, where all devices share each parameter."""
    counts, get = [], FileTensor.__getitem__

    def counted(tensor: FileTensor, index: Any) -> np.ndarray:
        counts.append((found := get(tensor, index)).nbytes)
        return found

    with mock.patch.object(FileTensor, "__getitem__", counted):
        converters.load(folder, mesh=make_mesh(model=8))
    return sum(counts)


if __name__ == "__main__":
    address, count, index, root, out = sys.argv[1:]
    main(address, int(count), int(index), Path(root), Path(out))
