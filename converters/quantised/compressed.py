"""compressed-tensors, in which llm-compressor saves: FP8, INT8, packed integers, NVFP4, MXFP4.

github.com/vllm-project/compressed-tensors: compressors/*/base.py, compressors/pack_quantized/
helpers.py and quantization/lifecycle/forward_helpers.py. What its config says of activations and of
the cache is not done here.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from types import EllipsisType

import ml_dtypes
import numpy as np

from converters.quantised.gptq import INDICES, patterns
from converters.quantised.lazy import E2M1, Dequantised, Grid, Whole, unpack
from converters.quantised.modules import Module, Tensors, aliases, grouped, refuse_left_out
from converters.values import ANY, Unused, Values
from vfjax.merge import LazyTensor

WEIGHT = (
    "weight",
    "weight_packed",
    "weight_(?:global_)?scale",
    "weight_(?:zero_point|shape|g_idx)",
)
RUN = ("(?:input|output)_(?:global_)?(?:scale|zero_point)", "[qkv]_(?:scale|zero_point)")
UNUSED_TENSORS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "output_global_scale",
)

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT8, UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
INT32 = np.dtype(np.int32)
WHOLE = (np.dtype(np.int64), INT32)

UNUSED: Unused = {
    "dequantize": ANY,
    "global_compression_ratio": ANY,
    "kv_cache_scheme": ANY,
    "moe_sparsity_config": (None,),
    "quant_method": ANY,
    "quantization_status": ANY,
    "run_compressed": ANY,
    "sparsity_config": ({}, None),
    "transform_config": ({}, None),
    "use_optimized_inference": ANY,
    "version": ANY,
}

NAIVE = ("naive-quantized", "float-quantized", "int-quantized")
PACKED, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = (*NAIVE, PACKED, NVFP4, MXFP4)
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantised; None of the fields says what it is of."""

    targets: tuple[str, ...]
    form: str
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, ...] | None

    def grid(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Rows and columns that one scale is for."""
        if self.strategy == "block" and self.block is not None:
            return self.block[0], self.block[1]
        if self.strategy in ("group", "tensor_group") and self.group is not None:
            return 1, self.group
        return (outputs if self.strategy == "tensor" else 1), inputs


def compressed_tensors(
    values: Values, tensors: Tensors, dtype: np.dtype | None
) -> dict[str, LazyTensor]:
    """A folder's tensors, its quantised modules dequantised: scale (number - zero point).

    Args:
        values: quantization_config.
        tensors: by name.
        dtype: of the model, which is not used: values are of the scales' dtype.

    Raises:
        InputError: a key, or a tensor, that is missing, wrong or not known.
    """
    ignored = patterns(values, "ignore")
    form = values.text("format", "naive-quantized")
    groups = values.section("config_groups")
    schemes = [_scheme(groups.section(name), form) for name in groups.data]
    values.done(UNUSED)
    modules, out = grouped(tensors, (*WEIGHT, *RUN))
    for module in modules:
        if not any(leaf.startswith("weight") for leaf in module.tensors):  # of attention
            for leaf in module.tensors:
                module.take(leaf)
            continue
        refuse_left_out(module, "ignore", ignored, _matches)
        names = aliases(module.name)
        fits = [
            scheme
            for rank in (_matches, _is_class)
            for scheme in schemes
            if any(rank(name, target) for name in names for target in scheme.targets)
        ]
        if not fits:
            raise module.error(
                next(iter(module.tensors)), "a quantised module", "one that config_groups names"
            )
        out[f"{module.name}.weight"] = _dequantised(module, fits[0])
    return out


def _scheme(values: Values, form: str) -> Scheme:
    targets = patterns(values, "targets")
    weights = values.section("weights")
    form = values.text("format", None) or form
    if form not in FORMATS:
        fix = "this format is not supported: take the model it was made from"
        raise values.put({"format": form}).error("format", ", ".join(FORMATS), fix)
    bits = weights.whole("num_bits", 8, most=8)
    floating = weights.choice("type", ("int", "float"), "int") == "float"
    group = weights.whole("group_size", None, least=-1)
    default = "tensor" if group is None else "channel" if group == -1 else "group"
    scheme = Scheme(
        targets,
        form,
        bits,
        floating,
        weights.flag("symmetric", True),
        weights.choice("strategy", STRATEGIES, default),
        group,
        weights.wholes("block_structure", None, least=1),
    )
    if weights.any("dynamic", False) is not False:
        raise weights.error("dynamic", "false")
    unused: Unused = {"observer": ANY, "observer_kwargs": ANY, "zp_dtype": ANY, "scale_dtype": ANY}
    weights.done(unused | {"actorder": ANY})  # whose groups weight_g_idx says
    values.done({"input_activations": ANY, "output_activations": ANY, "format": ANY})
    sized = scheme.group if scheme.strategy in ("group", "tensor_group") else 1
    if not sized or sized < 1:
        raise weights.error("group_size", "a positive number, with this strategy")
    if scheme.strategy == "block" and len(scheme.block or ()) != 2:
        raise weights.error("block_structure", "two numbers, with this strategy")
    wanted = {PACKED: (None, False), NVFP4: (4, True), MXFP4: (4, True)}
    if form in wanted:
        number, kind = wanted[form]
        if floating != kind or bits != (number or bits):
            raise weights.error("num_bits", f"what {form} is for")
    elif bits != 8:
        raise weights.error("num_bits", f"8, with {form}")
    return scheme


def _matches(name: str, target: str) -> bool:
    """As utils/match.py, match_name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _is_class(name: str, target: str) -> bool:
    """Whether a target is a module's class: of what has matrices it is Linear, or Embedding."""
    return target == ("Embedding" if name.endswith("embed_tokens") else "Linear")


def _dequantised(module: Module, scheme: Scheme) -> Dequantised:
    if scheme.form in NAIVE:
        found = _naive(module, scheme)
    elif scheme.form == PACKED:
        found = _packed(module, scheme)
    else:
        found = _four_bits(module, scheme)
    module.done(UNUSED_TENSORS)
    return found


def _grid(module: Module, scheme: Scheme, leaf: str, shape: tuple[int, int]) -> Grid:
    """A tensor of scales or zero points, of one of the layouts that a strategy has."""
    outputs, inputs = shape
    height, width = scheme.grid(outputs, inputs)
    size = -(-outputs // height), -(-inputs // width)
    tensor = module.take(leaf)
    if math.prod(size) == 1 and math.prod(tensor.shape) == 1:
        whole = Whole(tensor)
        return Grid(lambda a, b: whole.read().reshape(1, 1), height, width)
    tensor = module.take(leaf, size if len(tensor.shape) != 1 or size[1] > 1 else size[:1])
    return Grid(lambda a, b: np.asarray(tensor[a:b]).reshape(b - a, -1), height, width)


def _kind(scheme: Scheme) -> str:
    name = "FP" if scheme.floating else "INT"
    return f"compressed-tensors {name}{scheme.bits}, a scale a {scheme.strategy}".replace("_", " ")


def _naive(module: Module, scheme: Scheme) -> Dequantised:
    stored = FP8 if scheme.floating else INT8
    weight = module.take("weight", (None, None), (stored,))
    shape = weight.shape[0], weight.shape[1]
    scales = _grid(module, scheme, "weight_scale", shape)
    zeros = None
    if not scheme.symmetric or "weight_zero_point" in module:
        zeros = _zeros(module, scheme, shape)

    def rows(start: int, stop: int) -> np.ndarray:
        found = np.asarray(weight[start:stop]).astype(np.float32)
        if zeros is not None:
            found -= zeros(start, stop, shape[1])
        found *= scales(start, stop, shape[1])
        return found

    dtype = module.tensors["weight_scale"].dtype
    return Dequantised(f"{module.where}.weight", shape, dtype, _kind(scheme), rows)


def _zeros(module: Module, scheme: Scheme, shape: tuple[int, int]) -> Grid:
    """Zero points that are stored as they are."""
    tensor = module.tensors.get("weight_zero_point")
    plain = {} if tensor is None else {"weight_zero_point": _Plain(tensor)}
    module.taken.add("weight_zero_point")
    return _grid(Module(module.name, plain), scheme, "weight_zero_point", shape)


class _Plain:
    """A tensor of small numbers as floats."""

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: LazyTensor):
        self.tensor, self.shape = tensor, tensor.shape

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        return np.asarray(self.tensor[rows]).astype(np.float32)


def _packed(module: Module, scheme: Scheme) -> Dequantised:
    bits = scheme.bits
    packed = module.take("weight_packed", (None, None), (INT32,))
    size = module.take("weight_shape", (2,), WHOLE)[...]
    outputs, inputs = int(size[0]), int(size[1])
    each = _words(inputs, bits, packed.shape[1])
    if outputs != packed.shape[0] or each is None:
        raise module.error(
            "weight_packed",
            f"shape {tuple(packed.shape)}",
            f"{(outputs, -(-inputs * bits // 32))}, as weight_shape says",
        )
    scales = _grid(module, scheme, "weight_scale", (outputs, inputs))
    if "weight_g_idx" in module:
        places = Whole(module.take("weight_g_idx", (inputs,), INDICES))
        scales = dataclasses.replace(scales, places=places)
    zeros = None if scheme.symmetric else _packed_zeros(module, scheme, (outputs, inputs), scales)

    def rows(start: int, stop: int) -> np.ndarray:
        found = each(np.asarray(packed[start:stop])).astype(np.float32) - 2 ** (bits - 1)
        if zeros is not None:
            found -= zeros(start, stop, inputs)
        found *= scales(start, stop, inputs)
        return found

    dtype = module.tensors["weight_scale"].dtype
    return Dequantised(f"{module.where}.weight", (outputs, inputs), dtype, _kind(scheme), rows)


def _words(count: int, bits: int, words: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """What unpacks rows of so many words, int32[r, words] -> uint8[r, count]; None if none does.

    Since 0.13 numbers lie one behind the other; before that a word held whole ones, with bits
    unused between them where 32 is no multiple of theirs.
    """
    if words == -(-count * bits // 32):
        return lambda found: unpack(found, bits, count)
    each = 32 // bits
    if words != -(-count // each):
        return None
    shifts = np.arange(each, dtype=np.uint32) * bits

    def padded(found: np.ndarray) -> np.ndarray:
        parts = found.view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
        return parts.reshape(len(found), -1)[:, :count].astype(np.uint8)

    return padded


def _packed_zeros(module: Module, scheme: Scheme, shape: tuple[int, int], scales: Grid) -> Grid:
    """Zero points that are packed along the outputs, or, by some versions, not packed."""
    stored = module.take("weight_zero_point", None, (INT32, INT8))
    if stored.dtype == INT8:
        found = _zeros(module, scheme, shape)
        return dataclasses.replace(found, places=scales.places)
    count = -(-shape[1] // scales.width)
    each = _words(shape[0], scheme.bits, stored.shape[0])
    if scales.height != 1 or each is None or tuple(stored.shape[1:]) != (count,):
        expected = f"{(-(-shape[0] * scheme.bits // 32), count)}, as weight_shape says"
        raise module.error("weight_zero_point", f"shape {tuple(stored.shape)}", expected)
    whole = Whole(stored)

    def zeros(first: int, last: int) -> np.ndarray:
        found = each(np.ascontiguousarray(whole.read().T))[:, first:last].T
        return found.astype(np.int16) - 2 ** (scheme.bits - 1)

    return dataclasses.replace(scales, read=zeros)


def _four_bits(module: Module, scheme: Scheme) -> Dequantised:
    """NVFP4 and MXFP4: two numbers a byte, the lower bits first; values are bfloat16."""
    packed = module.take("weight_packed", (None, None), (UINT8,))
    shape = packed.shape[0], packed.shape[1] * 2
    _, width = scheme.grid(*shape)
    size = shape[0], -(-shape[1] // width)
    stored = FP8 if scheme.form == NVFP4 else UINT8
    scale = module.take("weight_scale", size, (stored,))
    whole = None
    if scheme.form == NVFP4:
        whole = module.take("weight_global_scale", (1,), (np.dtype(np.float32),))
        divisor = Whole(whole)

    def scales(first: int, last: int) -> np.ndarray:
        found = np.asarray(scale[first:last])
        if whole is None:  # exponents
            return np.exp2(found.astype(np.float32) - 127)
        return found.astype(np.float32) / divisor.read()

    grid = Grid(scales, 1, width)

    def rows(start: int, stop: int) -> np.ndarray:
        numbers = E2M1[unpack(np.asarray(packed[start:stop]), 4, shape[1])]
        return numbers * grid(start, stop, shape[1])

    kind = "NVFP4" if scheme.form == NVFP4 else "MXFP4"
    dtype = np.dtype(ml_dtypes.bfloat16)
    name = f"{module.where}.weight"
    return Dequantised(name, shape, dtype, f"compressed-tensors {kind}", rows)
