"""Writes tiny folders by the libraries that quantise, and beside them what each dequantises to.

Their pins exclude one another's and ours, and none of them is needed to read their files, so they
have an environment of their own:

    pip install torch==2.13.0 transformers==5.24.0 accelerate pydantic loguru numpy safetensors
    pip install --no-deps compressed-tensors==0.20.1 bitsandbytes==0.50.2
    pip install --no-deps autoawq==0.2.9 auto-gptq==0.7.1
    PYTHONPATH=. python tests/peers/quantised.py FOLDER tests/data/quantised.npz

FOLDER/CASE is what the library saves of a random Llama, or LLaVA, and FOLDER/CASE-plain the same
model with the weights that the library itself dequantises, by its code for CPUs. The file holds of
one module of each case

* `CASE/config`: quantization_config, JSON; `CASE/dtype`: of the model;
* `CASE/LEAF`: its tensors, the bytes of dtypes that numpy lacks;
* `CASE/dtypes`: JSON, LEAF -> its dtype, and `plain` -> the dequantised weight's;
* `CASE/plain`: SHA-256 of the dequantised weight's bytes;
* `versions`: JSON, of the libraries.
"""

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints import hf_llava_folder, llama_folder, write_json

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
MODULE = "model.layers.0.mlp.down_proj"
"""Which is recorded: 64 x 96."""

LINEAR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


PACKAGES = {"awq": "autoawq", "auto_gptq": "auto-gptq"}


def imported(name: str) -> types.ModuleType:
    """A module of a package whose own __init__ imports what is not here."""
    parts = name.split(".")
    root = Path(str(importlib.metadata.distribution(PACKAGES[parts[0]]).locate_file(parts[0])))
    for i in range(1, len(parts)):
        inner = sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        inner.__path__ = [str(root.joinpath(*parts[1:i]))]
    return importlib.import_module(name)


def linears(model: nn.Module, skip: str = "lm_head") -> dict[str, nn.Linear]:
    """A model's linear layers by name, but for those whose name has `skip`."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if skip not in name}


def saved(path: Path, plain: Path, like: Path, tensors: dict[str, Any], more: dict) -> None:
    """Folders of a state dict as it is stored, and of the same with plain weights.

    Args:
        path: of the first.
        plain: of the second.
        like: the folder of the model in full precision.
        tensors: name -> tensor, in `like`'s names.
        more: quantization_config, and name of a weight -> what it dequantises to.
    """
    config = json.loads((like / "config.json").read_text())
    for place in (path, plain):
        shutil.copytree(like, place)
    save_file({n: x.contiguous() for n, x in tensors.items()}, path / "model.safetensors")
    write_json(path / "config.json", config | {"quantization_config": more["config"]})
    whole = load_file(plain / "model.safetensors")
    whole |= {name: x.contiguous() for name, x in more["plain"].items()}
    save_file(whole, plain / "model.safetensors")


def replaced(like: Path, made: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A folder's tensors, modules' weights by others."""
    found = load_file(like / "model.safetensors")
    for name, tensors in made.items():
        del found[f"{name}.weight"]
        found |= {f"{name}.{leaf}": x for leaf, x in tensors.items()}
    return found


def compressed(
    config: dict[str, Any], dtype: torch.dtype, **scheme: Any
) -> Callable[[Path, Path, Path], None]:
    """compressed-tensors: its own min-max scales, compressors and file."""

    def write(path: Path, plain: Path, like: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.compressors.base import decompress_module
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        model = transformers.AutoModel if (like / "preprocessor_config.json").exists() else None
        model = (
            transformers.AutoModelForImageTextToText if model else transformers.AutoModelForCausalLM
        )
        made = model.from_pretrained(like, dtype=dtype)
        groups = {"group_0": {"targets": ["Linear"], "weights": config, **scheme}}
        ignore = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
        apply_quantization_config(made, QuantizationConfig(config_groups=groups, ignore=ignore))
        for module in made.modules():
            if getattr(module, "quantization_scheme", None) is None:
                continue
            args, weight = module.quantization_scheme.weights, module.weight.detach()
            blocks = in_blocks(weight, args)
            whole = None
            if hasattr(module, "weight_global_scale"):
                whole = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
                module.weight_global_scale.data.copy_(whole)
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape)
            if hasattr(module, "weight_zero_point"):
                shape, kind = module.weight_zero_point.shape, module.weight_zero_point.dtype
                module.weight_zero_point.data = zero.float().round().reshape(shape).to(kind)
        compressor = ModelCompressor.from_pretrained_model(made)
        compressor.compress_model(made)
        made.save_pretrained(path)
        compressor.update_config(path)
        shutil.copytree(like, plain)
        for file in like.iterdir():
            if not (path / file.name).exists():
                shutil.copy(file, path / file.name)
        found = load_file(plain / "model.safetensors")
        names = on_disk(made, found)
        for name, module in made.named_modules():
            if hasattr(module, "weight_scale") or hasattr(module, "weight_packed"):
                decompress_module(module)
                found[names[name]] = module.weight.detach().contiguous()
        save_file(found, plain / "model.safetensors")

    return write


def on_disk(model: nn.Module, found: Mapping[str, Any]) -> dict[str, str]:
    """Name of a module in memory -> its weight's in the file: they end alike."""
    out = {}
    for name, _ in model.named_modules():
        for old, new in (("model.language_model.", "language_model.model."), ("model.", "")):
            for rest in (name, name.replace(old, new, 1)):
                if f"{rest}.weight" in found:
                    out[name] = f"{rest}.weight"
    return out


def in_blocks(weight: torch.Tensor, args: Any) -> torch.Tensor:
    """A weight's elements by scale, the last axis those that share one."""
    strategy = args.strategy
    if strategy == "tensor":
        return weight.reshape(1, -1)
    if strategy == "channel":
        return weight.unsqueeze(1)
    if strategy in ("group", "tensor_group"):
        return weight.unflatten(1, (-1, args.group_size))
    height, width = args.block_structure
    rows = -weight.shape[0] % height
    padded = nn.functional.pad(weight, (0, 0, 0, rows))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(2)


def gptq(bits: int, group: int, ordered: bool = False, sym: bool = True) -> Callable[..., None]:
    """AutoGPTQ's packer: numbers by rounding, in float16; its own product with the identity."""

    def write(path: Path, plain: Path, like: Path) -> None:
        kind = imported("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
        model = transformers.AutoModelForCausalLM.from_pretrained(like, dtype=torch.float16)
        made, values = {}, {}
        for i, (name, linear) in enumerate(linears(model).items()):
            rows, columns = linear.weight.shape
            size = columns if group == -1 else group
            rng = torch.Generator().manual_seed(i)
            index = torch.arange(columns) // size
            if ordered:
                index = index[torch.randperm(columns, generator=rng)]
            weight, most = linear.weight.detach().float(), 2**bits - 1
            count = int(index.max()) + 1
            low = torch.stack([weight[:, index == g].amin(1) for g in range(count)], 1).clamp(max=0)
            high = torch.stack([weight[:, index == g].amax(1) for g in range(count)], 1).clamp(
                min=0
            )
            if sym:
                high = torch.maximum(high, -low)
                low = -high
            scales = ((high - low) / most).half().float()
            zeros = torch.full_like(scales, (most + 1) // 2) if sym else (-low / scales).round()
            if not sym:
                zeros.clamp_(1, most)  # its packer and its kernels disagree about 0
            held = zeros[:, index] * scales[:, index]
            numbers = ((weight + held) / scales[:, index]).round().clamp(0, most)
            linear.weight.data = (numbers * scales[:, index] - held).half()
            layer = kind(bits, group, columns, rows, False, weight_dtype=torch.float16)
            layer.pack(linear, scales, zeros.clone(), index.to(torch.int32))
            made[name] = {k: x for k, x in layer.state_dict().items() if k != "bias"}
            with torch.no_grad():
                values[f"{name}.weight"] = layer(torch.eye(columns, dtype=torch.float16)).t()
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym}
        config |= {"desc_act": ordered, "damp_percent": 0.01, "static_groups": False}
        config |= {"true_sequential": True, "checkpoint_format": "gptq", "is_marlin_format": False}
        config |= {"model_name_or_path": None, "model_file_base_name": None, "lm_head": False}
        saved(path, plain, like, replaced(like, made), {"config": config, "plain": values})

    return write


def awq(group: int) -> Callable[..., None]:
    """AutoAWQ's packer, and its dequantisation for CPUs."""

    def write(path: Path, plain: Path, like: Path) -> None:
        module = imported("awq.modules.linear.gemm")
        model = transformers.AutoModelForCausalLM.from_pretrained(like, dtype=torch.float16)
        made, values = {}, {}
        for name, linear in linears(model).items():
            rows, columns = linear.weight.shape
            size = columns if group == -1 else group
            blocks = linear.weight.detach().float().reshape(-1, size)
            high, low = blocks.amax(1), blocks.amin(1)
            scales = ((high - low).clamp(min=1e-5) / 15).reshape(rows, -1)
            zeros = (-low.reshape(rows, -1) / scales).round().clamp(0, 15)
            blocks = (blocks / scales.reshape(-1, 1)).round() + zeros.reshape(-1, 1)
            numbers = blocks.clamp(0, 15) - zeros.reshape(-1, 1)
            linear.weight.data = (numbers * scales.reshape(-1, 1)).reshape(rows, columns).half()
            layer = module.WQLinear_GEMM.from_linear(
                linear, 4, size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
            )
            made[name] = {k: x for k, x in layer.state_dict().items() if k != "bias"}
            found = module.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, size)
            values[f"{name}.weight"] = found.t()
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
        config |= {"version": "gemm", "modules_to_not_convert": None}
        saved(path, plain, like, replaced(like, made), {"config": config, "plain": values})

    return write


def bnb(dtype: torch.dtype, **settings: Any) -> Callable[..., None]:
    """What transformers saves with bitsandbytes, on a CPU."""

    def write(path: Path, plain: Path, like: Path) -> None:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        sees = (like / "preprocessor_config.json").exists()
        kind = (
            transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        )
        skip = ["lm_head", "model.vision_tower"] if sees else None
        config = transformers.BitsAndBytesConfig(**settings, llm_int8_skip_modules=skip)
        model = kind.from_pretrained(like, dtype=dtype, quantization_config=config)
        model.save_pretrained(path)
        shutil.copytree(like, plain)
        for file in like.iterdir():
            if not (path / file.name).exists():
                shutil.copy(file, path / file.name)
        found = load_file(plain / "model.safetensors")
        names = on_disk(model, found)
        for name, module in model.named_modules():
            if type(module.__dict__.get("_parameters", {}).get("weight")).__name__ in (
                "Params4bit",
                "Int8Params",
            ):
                state = getattr(module, "state", None)
                value = dequantize_bnb_weight(module.weight, state)
                found[names[name]] = value.detach().contiguous()
        save_file(found, plain / "model.safetensors")

    return write


def fp8(block: tuple[int, int] | None, ue8m0: bool = False) -> Callable[..., None]:
    """Blocks scaled as DeepSeek's are; transformers dequantises them as it loads."""

    def write(path: Path, plain: Path, like: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(like, dtype=torch.bfloat16)
        made = {}
        for name, linear in linears(model).items():
            weight = linear.weight.detach().float()
            height, width = block or weight.shape
            parts = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height))
            scales = parts.abs().amax((1, 3)) / 448
            if ue8m0:
                scales = scales.log2().ceil().exp2()
            wide = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
            stored = scales.to(torch.float8_e8m0fnu) if ue8m0 else scales
            inner = {"weight": (weight / wide).to(torch.float8_e4m3fn), "weight_scale_inv": stored}
            made[name] = inner if block else inner | {"weight_scale_inv": stored.reshape(())}
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        config |= {"weight_block_size": block, "scale_fmt": "ue8m0" if ue8m0 else "float"}
        saved(path, plain, like, replaced(like, made), {"config": config, "plain": {}})
        loading = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=loading
        )
        found = load_file(plain / "model.safetensors")
        state = read.state_dict()
        save_file({name: state[name].contiguous() for name in found}, plain / "model.safetensors")

    return write


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
RUN8 = ACTIVATIONS | {"type": "float"}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}

CASES: dict[str, tuple[torch.dtype, Callable[..., None]]] = {
    "ct-fp8-tensor": (
        BF16,
        compressed(FLOAT8 | {"strategy": "tensor"}, BF16, input_activations=RUN8),
    ),
    "ct-fp8-channel": (
        BF16,
        compressed(FLOAT8 | {"strategy": "channel"}, BF16, input_activations=RUN8),
    ),
    "ct-fp8-block": (
        BF16,
        compressed(
            FLOAT8 | {"strategy": "block", "block_structure": [48, 32]},
            BF16,
            input_activations=RUN8,
        ),
    ),
    "ct-int8": (F16, compressed(LINEAR, F16, input_activations=ACTIVATIONS)),
    "ct-int8-asym": (
        BF16,
        compressed(LINEAR | {"symmetric": False}, BF16, input_activations=ACTIVATIONS),
    ),
    "ct-w8a16": (F32, compressed(LINEAR, F32)),
    "ct-int4": (BF16, compressed(INT4, BF16)),
    "ct-int4-asym": (F16, compressed(INT4 | {"symmetric": False}, F16)),
    "ct-int3": (F16, compressed(INT4 | {"num_bits": 3}, F16)),
    "ct-int5-asym": (BF16, compressed(INT4 | {"num_bits": 5, "symmetric": False}, BF16)),
    "ct-int4-channel": (
        F32,
        compressed(LINEAR | {"num_bits": 4, "symmetric": False}, F32),
    ),
    "ct-nvfp4": (
        BF16,
        compressed(
            FP4
            | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
            BF16,
        ),
    ),
    "ct-mxfp4": (
        BF16,
        compressed(
            FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, BF16
        ),
    ),
    "gptq-4": (F16, gptq(4, 32)),
    "gptq-4-asym": (F16, gptq(4, 32, sym=False)),
    "gptq-4-order": (F16, gptq(4, 32, ordered=True)),
    "gptq-8": (F16, gptq(8, -1)),
    "gptq-3-order": (F16, gptq(3, 32, ordered=True, sym=False)),
    "gptq-2": (F16, gptq(2, 16, sym=False)),
    "awq": (F16, awq(32)),
    "awq-row": (F16, awq(-1)),
    "bnb-nf4": (BF16, bnb(BF16, load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bnb-nf4-double": (
        F16,
        bnb(F16, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bnb-fp4": (F32, bnb(F32, load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "bnb-nf4-storage": (
        BF16,
        bnb(BF16, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"),
    ),
    "bnb-int8": (F16, bnb(F16, load_in_8bit=True)),
    "fp8-block": (BF16, fp8((32, 32))),
    "fp8-ue8m0": (BF16, fp8((32, 16), ue8m0=True)),
    "fp8-tensor": (BF16, fp8(None)),
    "llava-ct-int4": (BF16, compressed(INT4, BF16)),
    "llava-bnb-nf4": (BF16, bnb(BF16, load_in_4bit=True, bnb_4bit_quant_type="nf4")),
}


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy has it, of dtypes that numpy lacks the bytes."""
    found = tensor.detach().contiguous()
    try:
        return found.numpy()
    except TypeError:
        return found.reshape(-1).view(torch.uint8).reshape(*found.shape[:-1], -1).numpy()


def recorded(path: Path, plain: Path) -> dict[str, np.ndarray]:
    """What the file holds of one case."""
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    own = {
        n.removeprefix(f"{MODULE}."): x for n, x in tensors.items() if n.startswith(f"{MODULE}.")
    }
    value = load_file(plain / "model.safetensors")[f"{MODULE}.weight"]
    out = {leaf: as_bytes(x) for leaf, x in own.items()}
    dtypes = {leaf: str(x.dtype).removeprefix("torch.") for leaf, x in own.items()}
    dtypes["plain"] = str(value.dtype).removeprefix("torch.")
    out["plain"] = np.array(hashlib.sha256(as_bytes(value).tobytes()).hexdigest())
    texts = {"config": config["quantization_config"], "dtypes": dtypes, "dtype": config["dtype"]}
    return out | {key: np.array(json.dumps(x)) for key, x in texts.items()}


def main(root: str, target: str) -> None:
    out: dict[str, np.ndarray] = {}
    only = sys.argv[3:]
    for case, (dtype, write) in CASES.items():
        if only and case not in only:
            continue
        base, path, plain = (Path(root) / x for x in (f"{case}-full", case, f"{case}-plain"))
        for place in (base, path, plain):
            shutil.rmtree(place, ignore_errors=True)
        make = hf_llava_folder if case.startswith("llava") else llama_folder
        options: dict[str, Any] = {"text": SIZES} if case.startswith("llava") else SIZES
        make(base, len(case), **options)
        whole = load_file(base / "model.safetensors")
        save_file({n: x.to(dtype) for n, x in whole.items()}, base / "model.safetensors")
        config = json.loads((base / "config.json").read_text())
        write_json(base / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        write(path, plain, base)
        if not case.startswith("llava"):
            out |= {f"{case}/{key}": x for key, x in recorded(path, plain).items()}
        print(case, flush=True)
    names = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "autoawq", "auto-gptq")
    versions = {name: importlib.metadata.version(name) for name in names}
    if not only:
        np.savez_compressed(target, versions=np.array(json.dumps(versions)), **out)


if __name__ == "__main__":
    main(*sys.argv[1:3])
