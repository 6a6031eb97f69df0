"""The positions that a fused LLM reads: one a token, or the three of a member with M-RoPE.

A Qwen2-VL's LLM is a Qwen2 whose frequencies turn by time, row or column. Text has three equal
positions, and so have other members' visual tokens, for which nothing changes.
"""

from collections.abc import Collection, Mapping
from typing import Any

from converters import registry
from converters.source import Source
from converters.vocabulary import said
from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.llm import LlamaConfig
from vfjax.merge.compatibility import MROPE

ROPE = ("model_type", "rope_parameters", "rope_scaling", "rope_theta")
"""Keys of an LLM's config that say how positions turn the features of its heads."""


def compared(source: Source) -> dict[str, Any]:
    """An LLM's config with what it leaves to its class, for `check_family`."""
    config = source.config_of("llm")
    return {**source.llm, "rms_norm_eps": config.eps, "rope_theta": config.rope_theta}


def shared_llm(opened: Mapping[str, Source], seeing: Collection[str]) -> dict[str, Any]:
    """The first model's LLM config, with the rotary keys of the members that have M-RoPE.

    Args:
        opened: label -> folder, the base (or the first member) first.
        seeing: labels whose branches the LLM is to read; without any it reads one position a token.

    Raises:
        InputError: two of these members have M-RoPE of other kinds.
    """
    reference = next(iter(opened.values()))
    if not any(opened[label].branches for label in seeing):
        llm = _plain(reference)
    else:
        llm = dict(reference.llm)
        placed = {
            label: config
            for label in seeing
            if opened[label].branches and (config := opened[label].config_of("llm")).axes > 1
        }
        if placed:
            first = next(iter(placed))
            for label, config in placed.items():
                if config.rope_axes != placed[first].rope_axes:
                    raise InputError(
                        f"{said(label)}: mrope_section",
                        found=_section(opened[label].llm),
                        expected=f"{_section(opened[first].llm)}, as in {said(first)}",
                        fix="one LLM turns its frequencies by one rule: fuse members that share it",
                    )
            llm = _rotated(reference, opened[first].llm)
    return {**llm, "architectures": [registry.find(llm, str(reference.path)).architecture]}


def _section(llm: Mapping[str, Any]) -> str:
    rope = llm.get("rope_parameters") or llm.get("rope_scaling") or {}
    return f"{rope.get('mrope_section', 'none')} of {llm['model_type']}"


def _rotated(reference: Source, other: Mapping[str, JSON]) -> dict[str, Any]:
    """An LLM's config with the rotary keys of another one."""
    if all(reference.llm.get(key) == other.get(key) for key in ROPE):
        return dict(reference.llm)
    own = {key: value for key, value in reference.llm.items() if key not in ROPE}
    rope = {key: other[key] for key in ROPE if key in other}
    return {**_sizes(reference.config_of("llm")), **own, **rope}


def _plain(source: Source) -> dict[str, Any]:
    """An LLM's config with one position a token, of the class that has such."""
    kind = source.table("llm").plain
    if not kind:
        return dict(source.llm)
    config = source.config_of("llm")
    llm = {**_sizes(config), **source.llm, "model_type": kind}
    for key in ("rope_parameters", "rope_scaling"):
        rope = {k: v for k, v in dict(llm.pop(key, None) or {}).items() if k not in MROPE}
        rope = {k: v for k, v in rope.items() if v not in ("mrope", "default")}
        if rope:
            llm[key] = {"rope_type": "default", **rope} if key == "rope_parameters" else rope
    if "rope_theta" not in llm.get("rope_parameters", {}):
        llm["rope_theta"] = config.rope_theta
    return llm


def _sizes(config: LlamaConfig) -> dict[str, Any]:
    """What classes of LLMs have other defaults of."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.eps,
    }
