"""GGUF files of tiny causal LMs, as llama.cpp's converter writes them, for tests.

Its rules: rows of Llama's queries and keys go in pairs, Gemma's norms have 1 added, the tokenizer's
parts stand among the keys (convert_hf_to_gguf.py).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.initialization import no_init_weights

from tests.checkpoints import randomize

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"rope_theta": 5e4}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 32}),
    "phi3": (transformers.Phi3Config, {}),
}


def make(kind: str, **options: Any) -> Any:
    """A random model of transformers."""
    config_class, own = KINDS[kind]
    config = config_class(**SIZES | own | options)
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return randomize(model, 3)


@functools.cache
def alphabet() -> list[str]:
    """Three special tokens, the letters that stand for bytes, and two words."""
    letters = sorted(bytes_to_unicode().values())
    return ["<pad>", "<s>", "</s>", *letters, "th", "the"]


def write(
    path: Path,
    model: Any,
    kind: str,
    type_: str = "F32",
    *,
    factors: np.ndarray | None = None,
    spm: tuple[list[str], list[float], list[int]] | None = None,
    keys: Mapping[str, int] | None = None,
) -> None:
    """A file of the model.

    Args:
        path: of the file.
        model: of `make`.
        kind: its architecture.
        type_: of matrices.
        factors: that frequencies are divided by.
        spm: tokens, scores and kinds of a SentencePiece vocabulary, in place of one of bytes.
        keys: more keys, or others.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    if kind in ("qwen3", "gemma"):
        writer.add_key_length(size)
        writer.add_value_length(size)
    if spm is not None:
        writer.add_tokenizer_model("llama")
        for add, values in zip(
            (writer.add_token_list, writer.add_token_scores, writer.add_token_types),
            spm,
            strict=True,
        ):
            add(values)
    else:
        tokens = alphabet()
        tokens = tokens + [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * 258 + [5] * (len(tokens) - 261))
        writer.add_token_merges(["t h", "th e"])
        writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    for key, value in (keys or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    arch = next(x for x, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if kind == "llama" and (heads := _heads(name, config)):
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if kind == "gemma" and "norm" in name:
            data = data + 1
        stored = gguf.GGMLQuantizationType[type_ if data.ndim > 1 else "F32"]
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own, gguf.quantize(np.ascontiguousarray(data), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(name: str, config: Any) -> int:
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((count for part, count in counts.items() if part in name), 0)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> np.ndarray:
    """float32[t, vocab]."""
    return model(input_ids=torch.tensor([ids])).logits[0].numpy()
