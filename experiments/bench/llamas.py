"""Folders of random Llamas for benchmarks: a base and two fine-tunes, of published shapes."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers

from converters.files.writer import write_folder
from vfjax import InputError

MODELS = ("base", "a", "b")
"""Folders; the seed of each is its place."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's config, and its largest weights file."""

    config: dict[str, Any]
    shard_bytes: float

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the layers."""
        config = self.config
        hidden, inter = config["hidden_size"], config["intermediate_size"]
        vocab, heads = config["vocab_size"], config["num_attention_heads"]
        narrow = hidden // heads * config["num_key_value_heads"]
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
        for i in range(config["num_hidden_layers"]):
            found |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
        return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.tensors().values()))


def llama(
    hidden: int, inter: int, layers: int, heads: tuple[int, int], vocab: int, theta: float
) -> dict[str, Any]:
    """A Llama's config; `heads` are those of the queries, and of keys and values."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


TINY = Shape(llama(2048, 5632, 22, (32, 4), 32000, 1e4), 1e9)
LLAMA3 = Shape(llama(4096, 14336, 32, (32, 8), 128256, 5e5), 5e9)
SMALL = Shape(llama(1024, 2816, 12, (16, 4), 32000, 1e4), 1e9)
QUICK = Shape(llama(64, 160, 2, (4, 2), 320, 1e4), 1e5)


@functools.cache
def noise(seed: int) -> np.ndarray:
    """Normal numbers, of which tensors take stretches: drawing each anew takes minutes at 8B."""
    return np.random.default_rng(seed).standard_normal((1 << 24) + 1, np.float32)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A normal tensor, made when it is sliced: each slice from a place of its own in `noise`.

    So it has the same values only if it is cut the same way, as `write_folder` does.

    Attributes:
        name: of the tensor.
        shape: its shape.
        member: 0 for the base; a member adds its own noise to the base's values.
    """

    name: str
    shape: tuple[int, ...]
    member: int
    dtype = np.dtype(jnp.bfloat16)

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        shape = (stop - start, *self.shape[1:])
        count = math.prod(shape)

        def draw(seed: int) -> np.ndarray:
            numbers = noise(seed)
            at = zlib.crc32(f"{self.name}/{start}/{seed}".encode()) % (len(numbers) - count)
            return numbers[at : at + count].reshape(shape)

        values = 0.02 * draw(0) + np.float32("norm" in self.name)
        if self.member:
            values += np.float32(1e-3) * draw(self.member)
        return values.astype(self.dtype)


@contextlib.contextmanager
def models(work: Path | None, shape: Shape, keep: bool) -> Iterator[Path]:
    """The folder of the three models: those that are there are reused, the others made.

    Args:
        work: the folder; by default a temporary one in `outputs`.
        shape: what they are.
        keep: leave what was made; otherwise it is removed in the end.

    Raises:
        InputError: a model of another shape is there, or the disk has too little room.
    """
    if work is None:
        Path("outputs").mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="merge-", dir="outputs")).absolute()
    else:
        folder = work.absolute()
        folder.mkdir(parents=True, exist_ok=True)
    absent = [name for name in MODELS if not (folder / name).exists()]
    try:
        check(folder, shape, absent)
        for name in absent:
            print(f"{folder / name}: making {shape.size:,} parameters")
            write_model(folder / name, shape, MODELS.index(name))
        yield folder
    finally:
        if not keep:
            for name in absent:
                shutil.rmtree(folder / name, ignore_errors=True)  # absent if making it failed
            if work is None:
                folder.rmdir()


def check(folder: Path, shape: Shape, absent: Sequence[str]) -> None:
    """Raises InputError if a model that is there is another, or the rest doesn't fit the disk."""
    for name in sorted(set(MODELS) - set(absent)):
        path = folder / name / "config.json"
        found = json.loads(path.read_text())
        for key, value in shape.config.items():
            if found.get(key) != value:
                raise InputError(
                    path,
                    found=f"{key} {found.get(key)}",
                    expected=f"{value}",
                    fix="remove the folder or choose another --work",
                )
    need, free = (len(absent) + 1) * 2 * shape.size, shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            folder,
            found=f"{free:,} bytes free",
            expected=f"{need:,}, for {len(absent)} models and an output",
            fix="free some space or choose another --work",
        )


def write_model(out: Path, shape: Shape, member: int) -> None:
    """A causal LM as transformers writes it."""
    config = transformers.LlamaConfig(
        **shape.config, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    tensors = {name: Drawn(name, size, member) for name, size in shape.tensors().items()}
    files: dict[str, bytes | Path] = {"config.json": config.to_json_string().encode()}
    write_folder(out, {"": tensors}, files=files, shard_bytes=shape.shard_bytes)
