"""bitsandbytes, which transformers saves: NF4 and FP4, their scales perhaps quantised too; INT8.

github.com/bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py (QuantState, in whose
words a weight's tensors are named; dequantize_4bit; int8_vectorwise_dequant).
"""

import json
from collections.abc import Callable

import ml_dtypes
import numpy as np

from converters.quantised.gptq import patterns
from converters.quantised.lazy import Dequantised, Whole
from converters.quantised.modules import Module, Tensors, grouped, named, refuse_left_out
from converters.values import ANY, Unused, Values
from vfjax.merge import LazyTensor

STATE = "weight.quant_state.bitsandbytes__"
LEAVES = (
    "weight",
    r"weight\.(?:nested_)?(?:absmax|quant_map)",
    r"weight\.quant_state\.bitsandbytes__\w+",
    "SCB",
    "weight_format",
)
F32, UINT8, INT8 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int8)
DTYPES = {
    "float32": F32,
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

UNUSED: Unused = {
    "_load_in_4bit": ANY,  # tensors say it
    "_load_in_8bit": ANY,
    "bnb_4bit_compute_dtype": ANY,
    "bnb_4bit_quant_storage": ANY,  # bytes, whatever they are called
    "bnb_4bit_quant_type": ANY,  # each weight's quant_state says it
    "bnb_4bit_use_double_quant": ANY,
    "llm_int8_enable_fp32_cpu_offload": ANY,
    "llm_int8_has_fp16_weight": (False,),
    "llm_int8_threshold": ANY,
    "load_in_4bit": ANY,
    "load_in_8bit": ANY,
    "quant_method": ANY,
}


def bitsandbytes(values: Values, tensors: Tensors, dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """A folder's tensors, its quantised modules dequantised.

    Args:
        values: quantization_config.
        tensors: by name.
        dtype: of the model, which is not used: a 4-bit weight says its own, INT8 gives float32.

    Raises:
        InputError: a key, or a tensor, that is missing, wrong or not known.
    """
    skipped = patterns(values, "llm_int8_skip_modules")
    values.done(UNUSED)
    modules, out = grouped(tensors, LEAVES)
    for module in modules:
        refuse_left_out(module, "llm_int8_skip_modules", skipped, named)
        four = any(leaf.startswith("weight.") for leaf in module.tensors)
        out[f"{module.name}.weight"] = _four_bits(module) if four else _int8(module)
    return out


def _int8(module: Module) -> Dequantised:
    """Of a row number * scale / 127: a product with 1 / 127, in float32."""
    weight = module.take("weight", (None, None), (INT8,))
    scale = module.take("SCB", (weight.shape[0],), (F32,))
    if "weight_format" in module:
        form = int(module.take("weight_format", (), (UINT8,))[...])
        if form:
            raise module.error("weight_format", str(form), "0, by rows", "save it from a CPU")
    module.done()

    def rows(start: int, stop: int) -> np.ndarray:
        part = np.asarray(weight[start:stop]).astype(np.float32)
        part *= np.asarray(scale[start:stop])[:, None]
        part *= np.float32(1 / 127)
        return part

    shape = tuple(weight.shape)
    return Dequantised(f"{module.where}.weight", shape, F32, "bitsandbytes INT8", rows)


def _four_bits(module: Module) -> Dequantised:
    """A code's value times the scale of its block of elements, the upper bits first."""
    key = next((leaf for leaf in sorted(module.tensors) if leaf.startswith(STATE)), f"{STATE}nf4")
    state = _state(module, key)
    kind = state.choice("quant_type", ("nf4", "fp4"))
    shape = state.wholes("shape", least=1)
    block = state.whole("blocksize", least=2)
    dtype = DTYPES[state.choice("dtype", tuple(DTYPES))]
    if len(shape) != 2:
        raise state.error("shape", "two sizes")
    count = shape[0] * shape[1]
    weight = module.take("weight", None, (UINT8, INT8, *DTYPES.values(), np.dtype(np.float64)))
    size = int(np.prod(weight.shape)) * weight.dtype.itemsize
    if size < -(-count // 2) or size - -(-count // 2) >= weight.dtype.itemsize:
        raise module.error("weight", f"{size} bytes", f"{-(-count // 2)}, for shape {shape}")
    packed = _Bytes(weight)
    codes = Whole(module.take("weight.quant_map", (16,), (F32,)))
    blocks = -(-count // block)

    def table() -> np.ndarray:
        found = codes.read()
        if kind == "nf4":
            return found
        return np.copysign(found, np.where(np.arange(16) < 8, 1, -1).astype(F32))  # 0 too

    scales = _scales(module, state, blocks)
    state.done({})
    module.done()

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start * shape[1], stop * shape[1]  # elements
        raw = packed.read(first // 2, -(-last // 2))
        numbers = np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)
        numbers = numbers[first % 2 : first % 2 + last - first]
        found = table()[numbers]
        low = first // block
        per = scales(low, -(-last // block))
        found *= np.repeat(per, block)[first - low * block : last - low * block]
        return found.reshape(stop - start, shape[1])

    return Dequantised(f"{module.where}.weight", shape, dtype, f"bitsandbytes {kind.upper()}", rows)


def _state(module: Module, key: str) -> Values:
    """The JSON text in a weight's quant_state."""
    raw = module.take(key, (None,), (UINT8,))
    try:
        found = json.loads(bytes(raw[...]))
    except (ValueError, RecursionError) as error:
        raise module.error(key, f"no JSON ({error})", "a JSON object") from None
    if not isinstance(found, dict):
        raise module.error(key, type(found).__name__, "a JSON object")
    return Values(found, f"{module.where}.{key}")


class _Bytes:
    """A tensor's bytes, read where they are; of one with rows of several, by rows."""

    def __init__(self, tensor: LazyTensor):
        self.tensor = tensor
        self.row = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize

    def read(self, first: int, last: int) -> np.ndarray:
        low = first // self.row
        part = np.asarray(self.tensor[low : -(-last // self.row)]).reshape(-1).view(np.uint8)
        return part[first - low * self.row : last - low * self.row]


def _scales(module: Module, state: Values, blocks: int) -> "Scales":
    nested = "weight.nested_absmax" in module
    if not nested:
        plain = Whole(module.take("weight.absmax", (blocks,), (F32,)))
        return lambda first, last: plain.read()[first:last]
    inner = Whole(module.take("weight.absmax", (blocks,), (UINT8,)))
    block = state.whole("nested_blocksize", least=1)
    state.choice("nested_dtype", ("float32",))
    offset = np.float32(state.number("nested_offset", least=-3e38))
    outer = Whole(module.take("weight.nested_absmax", (-(-blocks // block),), (F32,)))
    codes = Whole(module.take("weight.nested_quant_map", (256,), (F32,)))

    def scales(first: int, last: int) -> np.ndarray:
        each = outer.read()[np.arange(first, last) // block]
        return codes.read()[inner.read()[first:last]] * each + offset

    return scales


Scales = Callable[[int, int], np.ndarray]
"""(first, last) -> the scales of those blocks."""
