"""One of several processes that load, run and export a model together; see test_distributed.py."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import converters
from vfjax import Batch, Processor, generate_ids
from vfjax.sharding import make_mesh


def main(address: str, count: int, index: int, folder: Path, out: Path) -> None:
    """Writes `out`/tokens-INDEX.json, and with the others exports to `out`/export."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    model, processor = converters.load(folder, mesh=make_mesh(4, 2))
    kernel = model.llm.head.kernel.get_value()
    assert {s.data.shape for s in kernel.addressable_shards} == {(32, 160)}
    assert not kernel.is_fully_addressable
    tokens = generate_ids(model, make_batch(processor), max_new_tokens=8)
    converters.export(model, out / "export")
    (out / f"tokens-{index}.json").write_text(json.dumps(tokens))


def make_batch(processor: Processor) -> Batch:
    """Four pictures and rows of different lengths."""
    pictures = list(np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), np.uint8))
    rows = [[1, *range(40, 41 + row), -200, 60 + row] for row in range(4)]
    return processor(pictures, input_ids=rows)


if __name__ == "__main__":
    address, count, index, folder, out = sys.argv[1:]
    main(address, int(count), int(index), Path(folder), Path(out))
