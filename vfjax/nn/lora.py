"""Low-rank adapters on dense layers (LoRA, arXiv 2106.09685), without dropout."""

import dataclasses
import re
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vfjax.errors import InputError, require
from vfjax.model import Model
from vfjax.sharding import mesh_of, param_sharding

Array = jax.Array
T = TypeVar("T", bound=nnx.Module)

DENSE = r"llm/blocks/.*"
"""LLaVA's choice: all dense layers of the LLM but its head (llava/train/train.py)."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Rank and scale; `pattern` matches the names of the layers that get an adapter.

    Raises:
        InputError: a rank below 1 or beyond any matrix's, or no regular expression.
    """

    rank: int = 128
    alpha: float = 256.0
    pattern: str = DENSE

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 1 << 16, "lora.rank", self.rank, f"1 to {1 << 16}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            found = f"{self.pattern!r} ({error})"
            require(False, "lora.pattern", found, "a regular expression")


class LoRA(nnx.Module):
    """y = base(x) + alpha / rank * (x A) B, with A [in, rank] random and B [rank, out] zero."""

    def __init__(self, base: nnx.Linear, config: LoRAConfig, *, rngs: nnx.Rngs):
        self.base, self.scale = base, config.alpha / config.rank
        din, dout = base.kernel.shape
        axes = base.kernel.axes
        bound = din**-0.5  # Kaiming's uniform with a = sqrt(5), as PEFT draws A
        draw = jax.random.uniform(rngs.params(), (din, config.rank), minval=-bound, maxval=bound)
        self.a = nnx.Param(draw, axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((config.rank, dout)), axes=(None, axes[1]))

    @property
    def kernel(self) -> nnx.Param:
        """The frozen kernel."""
        return self.base.kernel

    def __call__(self, x: Array) -> Array:
        low = x @ self.a[...].astype(x.dtype)
        return self.base(x) + self.scale * (low @ self.b[...].astype(x.dtype))

    def merged(self) -> nnx.Linear:
        """The layer with A B added to its kernel, in float32, rounded once."""
        kernel = self.base.kernel
        delta = jnp.matmul(self.a[...], self.b[...], precision="highest")
        value = kernel[...].astype(jnp.float32) + self.scale * delta
        self.base.kernel[...] = value.astype(kernel.dtype)
        return self.base


def add_lora(model: Model, config: LoRAConfig, *, seed: int = 0) -> Model:
    """Puts adapters into the model, in place; train them with a group `.*/[ab]$`.

    Args:
        model: any; its layers stay as they are, under `base`.
        config: rank, scale, which layers.
        seed: of A; B is 0, so that nothing changes yet.

    Returns:
        The model.

    Raises:
        InputError: the pattern matches no dense layer.
    """
    rngs = nnx.Rngs(seed)
    found = [
        (parent, key, LoRA(layer, config, rngs=rngs))
        for _, parent, key, layer in _matched(model, config)
    ]
    mesh = mesh_of(nnx.state(model))
    for parent, key, layer in found:
        for name, p in (("a", layer.a), ("b", layer.b)):
            if isinstance(mesh, Mesh):
                p[...] = jax.device_put(p[...], param_sharding(name, p, mesh))
        setattr(parent, key, layer)
    return model


def adapters(model: Model, config: LoRAConfig) -> list[str]:
    """Names of the parameters that `add_lora` would add; raises InputError as it does."""
    layers = [name for name, *_ in _matched(model, config)]
    return [f"{name}/{part}" for name in layers for part in ("a", "b")]


def _matched(model: Model, config: LoRAConfig) -> list[tuple[str, nnx.Module, str, nnx.Linear]]:
    """The dense layers that get an adapter."""
    found = [each for each in _layers(model, nnx.Linear) if re.match(config.pattern, each[0])]
    if not found:
        raise InputError(
            "lora.pattern",
            found=f"{config.pattern!r}, which matches no dense layer",
            expected="names such as llm/blocks/0/attn/q",
            fix=f"correct it; {DENSE!r} is all of the LLM's blocks",
        )
    return found


def merge_lora(model: Model) -> Model:
    """Adds every adapter to its layer's kernel and takes it out, in place; for export."""
    for _, parent, key, layer in _layers(model, LoRA):
        setattr(parent, key, layer.merged())
    return model


def _layers(model: nnx.Module, kind: type[T]) -> list[tuple[str, nnx.Module, str, T]]:
    """(name, parent, attribute, layer) of all layers of a kind, in the order of their names."""
    modules = dict(nnx.iter_modules(model))
    return [
        ("/".join(map(str, path)), modules[path[:-1]], str(path[-1]), layer)
        for path, layer in modules.items()
        if isinstance(layer, kind) and path
    ]
