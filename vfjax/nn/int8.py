"""An LLM's products with int8 weights, a scale for each output: half the bytes of bfloat16.

Each column by its largest weight, as LLM.int8 does (arXiv 2208.07339); activations keep their
dtype, since what decoding waits for is the weights. Embeddings, norms, branches and experts stay.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.model import Model
from vfjax.nn import layers

Array = jax.Array


class Int8Linear(nnx.Module):
    """x @ kernel * scale + bias; `kernel` int8[in, out], `scale` float32[out]."""

    def __init__(self, layer: nnx.Linear):
        axes = layer.kernel.axes
        kernel, scale = quantize(layer.kernel[...])
        self.kernel = nnx.Param(kernel, axes=axes)
        self.scale = nnx.Param(scale, axes=axes[1:])
        self.bias = layer.bias if layer.use_bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
        y = (y * self.scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]


@jax.jit
def quantize(kernel: Array) -> tuple[Array, Array]:
    """int8[in, out] and float32[out] of float[in, out]: the largest of a column becomes 127."""
    narrow, scale = layers.quantize(kernel, axis=0)
    return narrow, scale[0]


def int8(model: Model) -> Model:
    """Puts `Int8Linear` in place of the dense layers of the LLM, in place; for generation.

    `converters.load(..., int8=True)` does it tensor by tensor, as they are read.
    """
    modules = dict(nnx.iter_modules(model.llm))
    for path, layer in modules.items():
        if isinstance(layer, nnx.Linear):
            setattr(modules[path[:-1]], str(path[-1]), Int8Linear(layer))
    return model
