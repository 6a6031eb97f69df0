"""Folders of adapters and projectors that need a base LLM, written by PEFT and torch, for tests."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.checkpoints import Member, upstream_llava_folder


@torch.no_grad()
def peft_folder(
    path: Path,
    model: transformers.PreTrainedModel,
    seed: int = 0,
    *,
    base: str = "someone/base",
    **settings: Any,
) -> peft.PeftModel:
    """An adapter of `model` as PEFT writes it, every factor at random.

    Args:
        path: folder to make.
        model: not changed.
        seed: of the factors.
        base: name that adapter_config.json gives `model`.
        settings: of peft.LoraConfig.

    Returns:
        `model` with the adapter beside it.
    """
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    model = copy.deepcopy(model)
    model.name_or_path = base
    rng = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base is nowhere, that a setting has no effect
        config = peft.LoraConfig(**copy.deepcopy({**wanted, **settings}))  # it changes lists
        made = peft.get_peft_model(model, config)
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
        made.save_pretrained(path)
    return made.eval()


def lora_folder(
    path: Path, llm: transformers.PreTrainedModel, seed: int = 0, **settings: Any
) -> transformers.PreTrainedModel:
    """As `peft_folder`; returns `llm` with the adapter, merged by PEFT."""
    return peft_folder(path, llm, seed, **settings).merge_and_unload().eval()


def llava_lora_folder(
    path: Path, llm: transformers.LlamaForCausalLM, seed: int = 0, **settings: Any
) -> Member:
    """A repository of LLaVA's finetune_lora: adapter, projector, config; no tokenizer."""
    member = upstream_llava_folder(path, seed, llm=llm)
    state = _without_llm(path)
    extra = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    torch.save(extra, path / "non_lora_trainables.bin")
    return dataclasses.replace(member, llm=lora_folder(path, llm, seed, **settings))


def projector_folder(
    path: Path, llm: transformers.LlamaForCausalLM, seed: int = 0, **config: Any
) -> Member:
    """A repository of LLaVA's pretrain scripts: projector and config; no tokenizer."""
    member = upstream_llava_folder(path, seed, llm=llm, **config)
    torch.save(_without_llm(path), path / "mm_projector.bin")
    return member


def _without_llm(path: Path) -> dict[str, torch.Tensor]:
    """Takes weights and tokenizer out of an upstream folder; the projector's tensors."""
    file = path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    for gone in (file, *path.glob("tokenizer*"), *path.glob("special_tokens_map.json")):
        gone.unlink()
    return {name: x for name, x in state.items() if "mm_projector" in name}
