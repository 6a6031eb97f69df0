"""Vision encoders as transformers' own modules, and how their hidden states are tapped."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
)

from vfjax import InputError
from vfjax.vision import encoders as own
from vfjax.vision.encoders.vit import Sizes

Tap = Callable[[nn.Module, Tensor, Sequence[int]], list[Tensor]]
"""(module, pixels [n, h, w, 3], taps) -> the hidden states at the taps, prefix and all."""


def hidden(module: nn.Module, pixels: Tensor, taps: Sequence[int], **more: bool) -> list[Tensor]:
    """Hidden states of a module of transformers that is called with `pixel_values`.

    Args:
        module: the encoder.
        pixels: float32[n, h, w, 3].
        taps: indices into `hidden_states`.
        more: arguments of the module.
    """
    images = pixels.permute(0, 3, 1, 2).to(next(module.parameters()).dtype)
    states = module(images, output_hidden_states=True, return_dict=True, **more).hidden_states
    return [states[tap] for tap in taps]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of encoder.

    Attributes:
        build: vfjax's config -> transformers' module, whose names in a folder are its own.
        tap: how it is called.
    """

    build: Callable[[Any], nn.Module]
    tap: Tap = hidden


def vit(config: Sizes) -> dict[str, Any]:
    """What all vision transformers' configs say by the same keys."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "patch_size": config.patch,
        "image_size": config.image_size,
        "hidden_act": config.act,
        "layer_norm_eps": config.eps,
    }


def _clip(config: own.CLIPConfig) -> nn.Module:
    keys = {**vit(config), "intermediate_size": config.mlp}
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**keys))


class Shifted(nn.Module):
    """DINOv2's embeddings whose positions are interpolated as transformers before 4.46 did it."""

    offset: float
    antialias = False

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The position table [1, 1 + h * w, width] for pictures of height x width pixels."""
        table = self.position_embeddings
        side = math.isqrt(table.shape[1] - 1)
        grid = height // self.patch_size, width // self.patch_size
        if grid == (side, side):
            return table
        found = torch.nn.functional.interpolate(
            table[:, 1:].float().transpose(1, 2).unflatten(2, (side, side)),
            scale_factor=[(k + self.offset) / side for k in grid],
            mode="bicubic",
            antialias=self.antialias,
        )
        return torch.cat([table[:, :1], found.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class ShiftedPatches(Shifted, Dinov2Embeddings):
    """Without registers."""


class ShiftedRegisters(Shifted, Dinov2WithRegistersEmbeddings):
    """With them."""

    antialias = True


def _dinov2(config: own.DINOv2Config) -> nn.Module:
    keys = {**vit(config), "qkv_bias": config.qkv_bias, "use_swiglu_ffn": config.swiglu}
    # SwiGLU's width is a multiple of 8 near two thirds of `mlp_ratio` times the width.
    keys["mlp_ratio"] = round((1.5 if config.swiglu else 1) * config.mlp / config.width)
    if config.registers:
        keys["num_register_tokens"] = config.registers
        made = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**keys))
        shifted: type[Shifted] = ShiftedRegisters
    else:
        keys["use_mask_token"] = config.mask_token
        made, shifted = transformers.Dinov2Model(transformers.Dinov2Config(**keys)), ShiftedPatches
    if config.offset:
        made.embeddings = shifted(made.config)
        made.embeddings.offset = config.offset
    return made


def _dino(config: own.DINOConfig) -> nn.Module:
    keys = {**vit(config), "intermediate_size": config.mlp, "qkv_bias": config.qkv_bias}
    return transformers.ViTModel(transformers.ViTConfig(**keys), add_pooling_layer=False)


def _resized(module: nn.Module, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """`hidden` of a module that takes pictures of other sizes only when told to."""
    return hidden(module, pixels, taps, interpolate_pos_encoding=True)


def _dinov3(config: own.DINOv3Config) -> nn.Module:
    keys = {**vit(config), "intermediate_size": config.mlp, "use_gated_mlp": config.gated}
    keys |= {"query_bias": config.q_bias, "key_bias": config.k_bias, "value_bias": config.v_bias}
    keys |= {"proj_bias": config.out_bias, "mlp_bias": config.mlp_bias}
    keys |= {"num_register_tokens": config.registers, "rope_theta": config.rope_theta}
    keys["pos_embed_rescale"] = None  # in training alone
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**keys))


ENCODERS: dict[type, Kind] = {
    own.CLIPConfig: Kind(_clip),
    own.DINOConfig: Kind(_dino, _resized),
    own.DINOv3Config: Kind(_dinov3),
    own.DINOv2Config: Kind(_dinov2),
}
"""Class of vfjax's config -> its kind."""


def register(config: type, kind: Kind) -> None:
    """Adds a kind; raises ValueError for a second of one config's class."""
    if ENCODERS.setdefault(config, kind) is not kind:
        raise ValueError(f"another encoder is for {config.__name__}, too")


def _kind(config: object) -> Kind:
    if type(config) not in ENCODERS:
        raise InputError(
            "encoder",
            found=f"{type(config).__name__}",
            expected=f"one of {', '.join(sorted(kind.__name__ for kind in ENCODERS))}",
            fix="run this model by converters.load, in JAX",
        )
    return ENCODERS[type(config)]


def build(config: object) -> nn.Module:
    """The module of an encoder's config.

    Raises:
        InputError: there is none in torch.
    """
    return _kind(config).build(config)


def tapped(config: object, module: nn.Module, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Hidden states [n, s, d] at the taps; see `vfjax.vision.encoders`.

    Args:
        config: of the module.
        module: what `build` made.
        pixels: float32[n, h, w, 3].
        taps: see `vfjax.vision.encoders.vit.run`.
    """
    return _kind(config).tap(module, torch.as_tensor(pixels), taps)


def final_norm(module: nn.Module) -> nn.Module:
    """The norm behind a transformer's blocks."""
    names = ("layernorm", "norm", "post_layernorm")
    return next(module.get_submodule(name) for name in names if hasattr(module, name))
