"""FP8 in square blocks, as DeepSeek's and Qwen's folders have it; or with one scale a weight.

Scales: `weight_scale_inv` (DeepSeek-V3's inference/kernel.py, weight_dequant), or AutoFP8's
`weight_scale`. Blocks at the end are cut off where the sizes are no multiple of theirs.
"""

import math

import ml_dtypes
import numpy as np

from converters.quantised.gptq import patterns
from converters.quantised.lazy import Dequantised, Grid, Whole
from converters.quantised.modules import Module, Tensors, grouped, named, refuse_left_out
from converters.values import ANY, Unused, Values
from vfjax.merge import LazyTensor

LEAVES = ("weight", "weight_scale_inv", "weight_scale", "(?:input|activation|[qkv])_scale")
RUN = ("input_scale", "activation_scale", "q_scale", "k_scale", "v_scale")
FP8 = tuple(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
UINT8 = np.dtype(np.uint8)
BF16 = np.dtype(ml_dtypes.bfloat16)
SCALES = (np.dtype(np.float32), BF16, np.dtype(np.float16), E8M0, UINT8)

UNUSED: Unused = {
    "activation_scheme": ANY,
    "dequantize": ANY,
    "expert_dtype": ("fp8",),
    "fmt": ANY,  # tensors have it
    "kv_cache_scheme": ANY,
    "modules_to_convert": ANY,  # tensors say which they are
    "quant_method": ANY,
    "scale_fmt": ANY,  # so do the scales
}


def fp8(values: Values, tensors: Tensors, dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """A folder's tensors, its quantised modules dequantised: number * scale in float32, rounded.

    Args:
        values: quantization_config.
        tensors: by name.
        dtype: of the model, which the values get, as in transformers
            (integrations/finegrained_fp8.py, Fp8Dequantize); None: the scales'.

    Raises:
        InputError: a key, or a tensor, that is missing, wrong or not known.
    """
    block = values.wholes("weight_block_size", None, least=1)
    if block is not None and len(block) != 2:
        raise values.error("weight_block_size", "two numbers")
    keys = ("modules_to_not_convert", "ignored_layers")
    skipped = {key: patterns(values, key) for key in keys}
    values.done(UNUSED)
    modules, out = grouped(tensors, LEAVES)
    for module in modules:
        if not any(leaf.startswith("weight") for leaf in module.tensors):  # of a cache
            continue
        for key, names in skipped.items():
            refuse_left_out(module, key, names, named)
        out[f"{module.name}.weight"] = _dequantised(module, block, dtype)
    return out


def _dequantised(
    module: Module, block: tuple[int, ...] | None, dtype: np.dtype | None
) -> Dequantised:
    weight = module.take("weight", (None, None), FP8)
    outputs, inputs = weight.shape
    leaf = "weight_scale" if "weight_scale" in module else "weight_scale_inv"
    stored = module.take(leaf, None, SCALES)
    scale = Whole(stored)
    height, width = block or (outputs, inputs)
    if math.prod(stored.shape) == 1:
        height, width = outputs, inputs
    else:
        module.take(leaf, (-(-outputs // height), -(-inputs // width)), SCALES)
    module.done(RUN)

    def scales(first: int, last: int) -> np.ndarray:
        found = scale.read().reshape(-1, -(-inputs // width))[first:last]
        if found.dtype == UINT8:  # exponents, by another name
            found = found.view(E8M0)
        return found

    grid = Grid(scales, height, width)

    def rows(start: int, stop: int) -> np.ndarray:
        part = np.asarray(weight[start:stop]).astype(np.float32)
        part *= grid(start, stop, inputs)
        return part

    if dtype is None:
        dtype = BF16 if stored.dtype in (E8M0, UINT8) else stored.dtype
    size = "one scale" if height == outputs and width == inputs else f"blocks of {height} x {width}"
    return Dequantised(f"{module.where}.weight", (outputs, inputs), dtype, f"FP8, {size}", rows)
