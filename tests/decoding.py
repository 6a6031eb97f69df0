"""Steps of decoding compiled for TPUs: what copies or transposes a whole parameter.

    python -m tests.decoding

Prints a JSON object: topology, devices that share a product and rows -> such instructions.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.configs.plan import get_config
from experiments.tasks.chips import make_mesh
from experiments.tasks.programs import model_of
from experiments.tasks.shapes import llava
from vfjax.llm.llama import LlamaConfig
from vfjax.model import Model, ModelConfig
from vfjax.sharding import rows_over

LLM = LlamaConfig(2048, 1024, 1, 8, 8, 128, 2048, 4096)
SLOTS = 16
"""Of the cache, which is far smaller than a parameter."""

CASES = (
    *(("v5p:2x2x1", 4, b) for b in (1, 2, 8, 64)),
    ("v5p:2x2x1", 1, 8),
    ("v5e:2x4", 8, 8),
    ("v5e:2x4", 1, 64),
    ("v6e:2x4", 4, 8),
    ("v4:2x2x1", 4, 2),
)


def copies(topology: str, axis: int, b: int) -> list[str]:
    """Names of the instructions that write a parameter anew, prefetches left out."""
    mesh, _ = make_mesh(topology, axis, 1)
    config = ModelConfig((llava(LLM.width),), LLM)
    model = model_of(get_config(), config, mesh)
    rows = rows_over(mesh, b)

    def laid(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = [rows, "model"][: max(x.ndim - 2, min(x.ndim, 1))] if b in x.shape[:1] else []
        at = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    cache = jax.tree.map(laid, jax.eval_shape(lambda: model.llm.new_cache(b, SLOTS)))
    tokens = laid(jax.ShapeDtypeStruct((b,), jnp.int32))
    step = jax.jit(Model.next, donate_argnums=2).trace(model, tokens, cache)
    text = step.lower().compile().as_text()
    entry = text[text.index("\nENTRY") :]
    least = LLM.width * LLM.kv_heads * LLM.head_dim // axis  # of the smallest kernel
    found = re.findall(r"%?([\w.\-]+) = \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", entry)
    return [name for name, shape in found if math.prod(map(int, shape.split(","))) >= least]


if __name__ == "__main__":
    print(json.dumps({f"{t}, {axis}, {b}": copies(t, axis, b) for t, axis, b in CASES}))
