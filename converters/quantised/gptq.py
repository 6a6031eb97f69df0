"""GPTQ and AWQ: whole numbers of 2 to 8 bits, scaled in groups of a row.

Both store the transpose: GPTQ packs a column's numbers (AutoGPTQ, nn_modules/qlinear/
qlinear_cuda.py, pack; GPTQModel's `gptq_v2` differs in zero points alone), AWQ a row's, eight
output channels to an int32 in the order 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ, modules/linear/gemm.py).
"""

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from converters.quantised.lazy import Dequantised, Grid, Whole, unpack
from converters.quantised.modules import Module, Tensors, grouped, named, refuse_left_out
from converters.values import ANY, Unused, Values
from vfjax.merge import LazyTensor

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
INTS = (np.dtype(np.int32), np.dtype(np.uint32))
INDICES = (np.dtype(np.int32), np.dtype(np.int64))
SCALES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))

MADE: Unused = {  # how it was quantised, or is run
    "act_group_aware": ANY,
    "backend": ANY,
    "batch_size": ANY,
    "block_name_to_quantize": ANY,
    "cache_block_outputs": ANY,
    "damp_auto_increment": ANY,
    "damp_percent": ANY,
    "dataset": ANY,
    "disable_exllama": ANY,
    "do_fuse": ANY,
    "exllama_config": ANY,
    "fuse_max_seq_len": ANY,
    "max_input_length": ANY,
    "meta": ANY,
    "model_file_base_name": ANY,
    "model_name_or_path": ANY,
    "model_seqlen": ANY,
    "module_name_preceding_first_block": ANY,
    "modules_to_fuse": ANY,
    "mse": ANY,
    "pad_token_id": ANY,
    "quant_method": ANY,
    "tokenizer": ANY,
    "true_sequential": ANY,
    "use_cuda_fp16": ANY,
    "use_exllama": ANY,
}

UNUSED: Unused = MADE | {
    "is_marlin_format": (False,),
    "lm_head": ANY,  # whether it has a head's tensors, which are read
    "pack_dtype": ("int32",),
    "quantizer": ANY,
    "static_groups": ANY,  # g_idx says it
    "sym": ANY,  # all zero points are stored
}


def gptq(values: Values, tensors: Tensors, dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """A folder's tensors, its GPTQ modules dequantised: scale (number - zero point).

    Zero points of `gptq` are stored less 1, those of `gptq_v2` as they are. Values are float16, or
    of the scales' dtype.

    Args:
        values: quantization_config.
        tensors: by name.
        dtype: of the model, which is not used.

    Raises:
        InputError: a key, or a tensor, that is missing, wrong or not known.
    """
    bits = values.whole("bits", least=2, most=8)
    group = values.whole("group_size", 128, least=-1)
    ordered = values.flag("desc_act", False)
    forms = ("gptq", "gptq_v2")
    form = values.choice("checkpoint_format", forms, None)
    form = values.choice("format", (form,) if form else forms, form or "gptq")
    rules = values.mapping("dynamic", None) or {}
    inside = [x for key in INSIDE for x in _names(values, key)]
    values.done(UNUSED)
    modules, out = grouped(tensors, LEAVES)
    for module in modules:
        own, size = _by_name(values, rules, module, bits, group)
        if inside and ".layers." in module.name and not module.name.endswith(tuple(inside)):
            raise module.error("qweight", "a tensor", f"none: {INSIDE[0]} leaves the module out")
        out[f"{module.name}.weight"] = _gptq(module, own, size, ordered, form == "gptq")
    return out


INSIDE = ("modules_in_block_to_quantize", "inside_layer_modules")
"""Keys of those modules of a block that are quantised."""


def _names(values: Values, key: str) -> list[str]:
    found = values.any(key) or []
    flat = [x for one in found for x in (one if isinstance(one, list) else [one])]
    if not isinstance(found, list) or not all(isinstance(x, str) for x in flat):
        raise values.error(key, "names of modules, or lists of names")
    return flat


def _by_name(
    values: Values, rules: Mapping[str, object], module: Module, bits: int, group: int
) -> tuple[int, int]:
    """A module's bits and size of groups, by GPTQModel's rules for names ("+:pattern", "-:")."""
    for pattern, own in rules.items():
        try:
            found = re.match(pattern.removeprefix("+:").removeprefix("-:"), module.name)
        except re.error:
            raise values.error("dynamic", "regular expressions", f"correct {pattern!r}") from None
        if found and pattern.startswith("-:"):
            raise module.error("qweight", "a tensor", f"none: dynamic has {pattern!r}")
        if found:
            if not isinstance(own, Mapping):
                raise values.error("dynamic", "settings by pattern")
            part = Values(own, f"{values.where}: dynamic: {pattern}")
            bits = part.whole("bits", bits, least=2, most=8)
            group = part.whole("group_size", group, least=-1)
            part.done(UNUSED | {"desc_act": ANY})
            break
    return bits, group


def _gptq(module: Module, bits: int, group: int, ordered: bool, less: bool) -> Dequantised:
    words, outputs = module.take("qweight", (None, None), INTS).shape
    if bits not in (2, 3, 4, 8) or words * 32 % bits:
        raise module.error("qweight", f"{words} rows", f"numbers of {bits} bits: 2, 3, 4 or 8")
    inputs = words * 32 // bits
    group = inputs if group == -1 else group
    if group < 1:
        raise module.error("qweight", f"groups of {group}", "a positive group_size, or -1")
    count = -(-inputs // group)
    packed = Whole(module.tensors["qweight"])
    scales = Whole(module.take("scales", (count, outputs), SCALES))
    zeros = Whole(module.take("qzeros", (count, -(-outputs * bits // 32)), INTS))
    places = None
    if "g_idx" in module:
        index = module.take("g_idx", (inputs,), INDICES)
        places = Whole(_Checked(module, index, count, None if ordered else group))
    module.done()

    def zero(first: int, last: int) -> np.ndarray:
        found = unpack(zeros.read(), bits, outputs)[:, first:last].T.astype(np.int16)
        return (found + 1) & (2**bits - 1) if less else found

    def rows(start: int, stop: int) -> np.ndarray:
        part = np.ascontiguousarray(packed.read()[:, start:stop].T)
        numbers = unpack(part, bits, inputs).astype(np.float32)
        numbers -= Grid(zero, 1, group, places)(start, stop, inputs)
        numbers *= Grid(lambda a, b: scales.read()[:, a:b].T, 1, group, places)(start, stop, inputs)
        return numbers

    name, dtype = f"{module.where}.weight", module.tensors["scales"].dtype
    return Dequantised(name, (outputs, inputs), dtype, f"GPTQ, {bits} bits", rows)


class _Checked:
    """A group for each input, which is one of those that there are."""

    def __init__(self, module: Module, tensor: LazyTensor, count: int, group: int | None):
        self.module, self.tensor, self.count, self.group = module, tensor, count, group
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __getitem__(self, rows: object) -> np.ndarray:
        found = self.tensor[...]
        if not 0 <= found.min() <= found.max() < self.count:
            raise self.module.error(
                "g_idx",
                f"group {found.max() if found.min() >= 0 else found.min()}",
                f"0 to {self.count - 1}, those that have scales",
            )
        if self.group and not np.array_equal(found, np.arange(len(found)) // self.group):
            raise self.module.error(
                "g_idx", "groups in another order", "one behind the other: desc_act is false"
            )
        return found


AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's numbers each channel is."""


def awq(values: Values, tensors: Tensors, dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """A folder's tensors, its AWQ modules dequantised; see `gptq`.

    Raises:
        InputError: as `gptq`; another layout than "gemm".
    """
    bits = values.any("bits", values.any("w_bit", 4))
    if bits != 4:
        raise values.error("bits" if "bits" in values else "w_bit", "4")
    group = values.whole("group_size", values.whole("q_group_size", 128, least=-1), least=-1)
    version = values.text("version", None) or values.text("format", None) or "gemm"
    for key in ("version", "format"):
        if values.text(key, version) not in ("gemm", "GEMM"):
            raise values.error(key, "'gemm'", "this layout is not supported: take the gemm one")
    if values.text("backend", None) == "llm-awq":
        raise values.error("backend", "AutoAWQ's", "its layout is not supported")
    skipped = patterns(values, "modules_to_not_convert")
    unused = MADE | {"zero_point": (True,), "desc_act": ANY, "sym": ANY, INSIDE[0]: ANY}
    values.done(unused | {"backend": ANY, "version": ANY, "format": ANY})
    modules, out = grouped(tensors, LEAVES[:3])
    for module in modules:
        refuse_left_out(module, "modules_to_not_convert", skipped, named)
        out[f"{module.name}.weight"] = _awq(module, group)
    return out


def patterns(values: Values, key: str) -> tuple[str, ...]:
    """Names of modules that are regular expressions.

    Raises:
        InputError: other things than that.
    """
    found = values.names(key)
    for one in found:
        try:
            re.compile(one.removeprefix("re:"))
        except re.error as error:
            raise values.error(key, f"regular expressions ({error} in {one!r})") from None
    return found


def _awq(module: Module, group: int) -> Dequantised:
    inputs, words = module.take("qweight", (None, None), INTS).shape
    group = inputs if group == -1 else group
    if group < 1 or inputs % group:
        raise module.error("qweight", f"{inputs} inputs", f"a multiple of group_size {group}")
    packed, outputs = Whole(module.tensors["qweight"]), words * 8
    scales = Whole(module.take("scales", (inputs // group, outputs), SCALES))
    zeros = Whole(module.take("qzeros", (inputs // group, words), INTS))
    module.done()

    def numbers(held: Whole, start: int, stop: int) -> np.ndarray:
        """uint8[stop - start, ...], of channels."""
        first, last = start // 8, -(-stop // 8)
        part = unpack(held.read()[:, first:last], 4, (last - first) * 8)
        part = part.reshape(len(part), -1, 8)[..., AWQ].reshape(len(part), -1)
        return part[:, start - first * 8 : stop - first * 8].T

    def rows(start: int, stop: int) -> np.ndarray:
        found = numbers(packed, start, stop).astype(np.float32)
        found -= Grid(lambda a, b: numbers(zeros, a, b), 1, group)(start, stop, inputs)
        found *= Grid(lambda a, b: scales.read()[:, a:b].T, 1, group)(start, stop, inputs)
        return found

    name, dtype = f"{module.where}.weight", module.tensors["scales"].dtype
    return Dequantised(name, (outputs, inputs), dtype, "AWQ, 4 bits", rows)


def beside(tensors: Tensors) -> bool:
    """Whether there are tensors of GPTQ or AWQ."""
    return any(name.endswith(".qweight") for name in tensors)
