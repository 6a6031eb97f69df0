"""A member's adapters and projector on disk."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import converters
from experiments.family.real import adapter
from experiments.tasks.common import FAMILY
from vfjax import InputError
from vfjax.train import LoRAConfig, add_lora, merge_lora
from vfjax.train.optim import name_of


def test_what_is_read_is_what_was_written(tmp_path: Path):
    """Adapters of bfloat16 values, read by `converters.load`, make the merged model."""
    tower, base = FAMILY / "clip" / "vision_tower", FAMILY / "base"
    model, _ = converters.create(base, tower, {"kind": "mlp"}, template="mistral_instruct")
    with pytest.raises(InputError, match="found a model without adapters"):
        adapter.save(model, tmp_path / "a", base="base", tower="tower", rank=2, alpha=4.0)
    add_lora(model, LoRAConfig(2, 4.0, "llm/blocks/.*/attn/.*"))
    rng = np.random.default_rng(0)
    state = nnx.state(model)
    for path, param in nnx.to_flat_state(state):
        if name_of(path).endswith(("/a", "/b")) or "connector" in name_of(path):
            value = rng.normal(0, 0.2, param.get_value().shape).astype(jax.numpy.bfloat16)
            param.set_value(jax.numpy.asarray(value, jax.numpy.float32))
    nnx.update(model, state)
    adapter.save(model, tmp_path / "a", base="base", tower="tower", rank=2, alpha=4.0)
    towers = {"tower": tower}
    loaded, processor = converters.load(tmp_path / "a", base=base, towers=towers, dtype="float32")
    merge_lora(model)
    picture = np.zeros((48, 48, 3), np.uint8)
    batch = processor([picture], [processor.chat("where is 3 ?")])
    np.testing.assert_allclose(loaded(batch), model(batch), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="found a folder"):
        add_lora(model, LoRAConfig(2, 4.0))
        adapter.save(model, tmp_path / "a", base="base", tower="tower", rank=2, alpha=4.0)
