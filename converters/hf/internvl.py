"""InternVL: the twin of `vfjax.architectures.internvl`.

Of transformers' folders the tower is its own module; that of the authors' names its parts in
another way and has queries, keys and values in one layer. InternVL
internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers import InternVLVisionConfig, InternVLVisionModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm

from converters.hf import encoders
from converters.hf.branch import Branch, Embed, Prompt, States, VisualTokens, all_of, register
from vfjax import architectures
from vfjax.architectures.pixel_shuffle import joined_patches
from vfjax.vision.encoders import InternViTConfig


def port(config: InternViTConfig) -> nn.Module:
    """Transformers' tower."""
    return InternVLVisionModel(
        InternVLVisionConfig(
            **encoders.vit(config),
            intermediate_size=config.mlp,
            attention_bias=config.qkv_bias,
            use_qk_norm=config.qk_norm is not None,
            norm_type="rms_norm" if config.rms_norm else "layer_norm",
            use_mean_pooling=not config.final_norm,
        )
    )


def tapped(module: nn.Module, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Hidden states at the taps; -1 is behind the last norm, where there is one."""
    images = pixels.permute(0, 3, 1, 2).to(next(module.parameters()).dtype)
    seen = module(images, output_hidden_states=True)
    return [seen.last_hidden_state if tap == -1 else seen.hidden_states[tap] for tap in taps]


encoders.register(InternViTConfig, encoders.Kind(port, tapped))


class Embeddings(nn.Module):
    """Patches and the class token, with their positions."""

    def __init__(self, config: InternViTConfig):
        super().__init__()
        c = self.config = config
        side = c.image_size // c.patch
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, c.width))
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, stride=c.patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + side**2, c.width))

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 1 + patches, width] of [n, 3, h, w]."""
        grid = self.patch_embedding(pixels)
        x = grid.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions(grid.shape[-2:])

    def positions(self, size: torch.Size) -> Tensor:
        """The table, interpolated to a grid of patches of another size."""
        table, side = self.position_embedding, self.config.image_size // self.config.patch
        if size == (side, side):
            return table
        grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = interpolate(grid, size=size, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class Attention(nn.Module):
    """Self-attention; queries and keys are normed over all heads at once."""

    def __init__(self, config: InternViTConfig):
        super().__init__()
        c, self.heads = config, config.heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.qkv_bias)
        normed = c.qk_norm is not None
        self.q_norm = InternVLVisionRMSNorm(c.width, c.qk_norm) if normed else nn.Identity()
        self.k_norm = InternVLVisionRMSNorm(c.width, c.qk_norm) if normed else nn.Identity()
        self.proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (y.reshape(split).transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        y = scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """The feed-forward of a layer."""

    def __init__(self, config: InternViTConfig):
        super().__init__()
        self.act = ACT2FN[config.act]
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Attention and feed-forward, each normed before and scaled behind."""

    def __init__(self, config: InternViTConfig):
        super().__init__()
        c = config
        norm = InternVLVisionRMSNorm if c.rms_norm else nn.LayerNorm
        self.norm1, self.norm2 = norm(c.width, eps=c.eps), norm(c.width, eps=c.eps)
        self.attn, self.mlp = Attention(c), MLP(c)
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(c.width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class AuthorsTower(nn.Module):
    """InternVisionModel, under its authors' names."""

    def __init__(self, config: InternViTConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, pixels: Tensor, output_hidden_states: bool = True) -> BaseModelOutput:
        """Hidden states [n, 1 + patches, width]."""
        x = self.embeddings(pixels)
        states = [x]
        for layer in self.encoder["layers"]:
            x = layer(x)
            states.append(x)
        return BaseModelOutput(x, tuple(states) if output_hidden_states else None)


@register("InternVL")
class InternVL(Branch):
    """Tiles of pictures -> visual tokens."""

    def __init__(self, architecture: architectures.InternVL):
        super().__init__(architecture)
        config = architecture.encoder
        if architecture.images.convert == "drop":  # what its authors' code alone does
            assert isinstance(config, InternViTConfig)
            self.encoder = AuthorsTower(config)
        c = architecture.connector.projector
        # Named by their places, as in the authors' `mlp1`.
        self.connector = nn.Sequential(
            nn.LayerNorm(c.din), nn.Linear(c.din, c.dout), ACT2FN[c.act], nn.Linear(c.dout, c.dout)
        )

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All tiles' tokens; see `Branch.visual_tokens`."""
        del embed, prompt
        config = self.architecture.connector
        patches = states["encoder"][0][:, config.combine.drop :]
        blocks: Tensor = joined_patches(patches, config.factor)
        if config.transposed:
            side = math.isqrt(blocks.shape[1])
            blocks = blocks.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        return all_of(self.connector(blocks))
