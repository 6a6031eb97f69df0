"""Mini-Gemini's branch: patch info mining, twin of `vfjax.architectures.mini_gemini`.

MGM mgm/model/mgm_arch.py; arXiv 2403.18814, section 3.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from converters.hf.branch import (
    Branch,
    Embed,
    Prompt,
    States,
    VisualTokens,
    all_of,
    register,
)
from converters.hf.dense_connector import combine
from converters.hf.llava import Projector
from vfjax import architectures

Weights = tuple[Tensor, Tensor]
"""Rows [H, h] and columns [W, w] of a resize [h, w] -> [H, W]."""


class Mining(nn.Module):
    """Low-resolution tokens and high-resolution maps -> visual tokens."""

    def __init__(self, config: architectures.MiningConfig):
        super().__init__()
        self.config = config
        self.vlm_uni_query_projector = asker(config.width, config.width)
        self.vlm_uni_aux_projector = asker(config.aux_width, config.width)
        self.vlm_uni_val_projector = asker(config.aux_width, config.width)
        self.mm_projector = Projector(config.projector)

    def forward(self, states: States) -> Tensor:
        """Visual tokens [n, views * s, D], the whole view of each picture first.

        Args:
            states: "encoder": hidden states [n * views, prefix + s, d] of the low-resolution views,
                picture by picture, the whole one last; "aux": stages [n, h, w, c].
        """
        c, maps = self.config, states["aux"]
        features = combine(c.combine, states["encoder"])
        features = features.unflatten(0, (len(maps[0]), c.grid**2 + c.whole))
        plain, more = features.tensor_split([c.width], dim=-1)
        mined = [self.mine(plain[:, i], maps, w) for i, w in enumerate(self._weights(maps))]
        features = torch.cat([plain + torch.stack(mined, dim=1), more], dim=-1)
        if c.whole:
            features = features.roll(1, dims=1)
        return self.mm_projector(features.flatten(1, 2))

    def mine(self, tokens: Tensor, maps: Sequence[Tensor], weights: Sequence[Weights]) -> Tensor:
        """What one view finds: [n, s, d] to be added to its tokens.

        Args:
            tokens: [n, s, d] of the view, s a square number.
            maps: stages [n, h, w, c] of the whole picture.
            weights: for each stage, the view's part of its resize.
        """
        n, s, d = tokens.shape
        side = math.isqrt(s)
        found = torch.cat([resized(m, *w) for m, w in zip(maps, weights, strict=True)], dim=-1)
        cell = found.shape[1] // side
        found = found.unflatten(2, (side, cell)).unflatten(1, (side, cell)).transpose(2, 3)
        found = found.reshape(n, s, cell * cell, -1)
        query, key = self.vlm_uni_query_projector(tokens), self.vlm_uni_aux_projector(found)
        scores = (key @ query[..., None])[..., 0] / math.sqrt(d)
        shares = scores.nan_to_num().softmax(dim=-1)
        return (shares[..., None, :] @ self.vlm_uni_val_projector(found))[..., 0, :]

    def _weights(self, maps: Sequence[Tensor]) -> list[list[Weights]]:
        """For each view and stage its part of the resize to the first stage's size.

        The joined map of all stages, which the authors' code cuts into views, is never made.
        """
        side, grid = maps[0].shape[1], self.config.grid
        part = side // grid
        full = [bilinear(m.shape[1], side, m.device) for m in maps]
        cuts = [slice(i * part, (i + 1) * part) for i in range(grid)]
        views = [[(w[rows], w[cols]) for w in full] for rows in cuts for cols in cuts]
        if self.config.whole:
            shrink = bilinear(side, part, maps[0].device)
            views.append([(shrink @ w, shrink @ w) for w in full])
        return views


def asker(din: int, dout: int, *, bias: bool = True) -> nn.Sequential:
    """Layer norm, then a dense layer: [..., din] -> [..., dout]."""
    return nn.Sequential(nn.LayerNorm(din), nn.Linear(din, dout, bias=bias))


def bilinear(source: int, target: int, device: torch.device) -> Tensor:
    """Weights float32[target, source] of torch's bilinear resize along one axis."""
    rows = torch.eye(source, device=device)[None]
    return nn.functional.interpolate(rows, size=target, mode="linear")[0].T


def resized(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """[n, h, w, c] -> [n, H, W, c] in x's dtype, by weights [H, h] and [W, w], in float32."""
    y = torch.einsum("yh,nhwc->nywc", rows, x.float())
    return torch.einsum("xw,nywc->nyxc", cols, y).to(x.dtype)


@register("MiniGemini")
class MiniGemini(Branch):
    """CLIP or SigLIP on low-resolution views, ConvNeXt on the whole picture."""

    def __init__(self, architecture: architectures.MiniGemini):
        super().__init__(architecture)
        self.connector = Mining(architecture.connector)

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All tokens; see `Branch.visual_tokens`."""
        del embed, prompt
        return all_of(self.connector(states))
