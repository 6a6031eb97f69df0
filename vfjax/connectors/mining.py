"""Mini-Gemini's patch info mining (MGM mgm/model/mgm_arch.py; arXiv 2403.18814, section 3.2).

Each token of a low-resolution view asks the high-resolution pixels of its own cell. The joined
ConvNeXt map of an HD picture has 2880 x 384 x 384 values; it is never made: resizing is linear
along rows and columns, so each view takes its part of every stage by its own rows of the weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.connectors.combine import Combine
from vfjax.connectors.mlp import MLPConfig
from vfjax.nn.layers import layer_norm, linear
from vfjax.vision.resize import bilinear, resized

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MiningConfig:
    """Sizes of the mining and of the projector after it.

    Attributes:
        projector: the MLP that reads mined features.
        combine: what is read of the low-resolution encoder; mining asks with its plain feature.
        width: of the low-resolution encoder.
        aux_width: channels of all stages of the high-resolution encoder.
        grid: views a side that the high-resolution picture is cut into.
        whole: there is one more view, of the whole picture; it comes last in the pixels and first
            in the tokens.
    """

    projector: MLPConfig
    width: int
    aux_width: int
    grid: int = 1
    whole: bool = False
    combine: Combine = Combine()

    @property
    def act(self) -> str:
        """Activation of the projector."""
        return self.projector.act

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Hidden states that are read of each encoder; of the ConvNeXt, all stages."""
        return {"encoder": self.combine.taps, "aux": (0, 1, 2, 3)}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Encoder -> hidden states that are joined on channels, channels of all of them."""
        return {"encoder": (self.combine.width(1), self.projector.din), "aux": (1, self.aux_width)}

    @property
    def dout(self) -> int:
        """The LLM's width."""
        return self.projector.dout

    def build(self, *, rngs: nnx.Rngs) -> "Mining":
        return Mining(self, rngs=rngs)


class Asker(nnx.Module):
    """Layer norm, then a dense layer: [..., din] -> [..., dout]."""

    def __init__(self, din: int, dout: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(din, 1e-5, rngs=rngs)
        self.dense = linear(din, dout, (None, "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dense(self.norm(x))


class Mining(nnx.Module):
    """Low-resolution tokens and high-resolution maps -> visual tokens."""

    def __init__(self, config: MiningConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.query = Asker(c.width, c.width, rngs=rngs)
        self.key = Asker(c.aux_width, c.width, rngs=rngs)
        self.value = Asker(c.aux_width, c.width, rngs=rngs)
        self.projector = c.projector.build(rngs=rngs)

    def mine(self, tokens: Array, maps: Sequence[Array], weights: Sequence[tuple]) -> Array:
        """What one view finds: [n, s, d] to be added to its tokens.

        Args:
            tokens: [n, s, d] of the view, s a square number.
            maps: stages [n, h, w, c] of the whole picture.
            weights: for each stage, the view's rows [H, h] and columns [W, w] of its resize.
        """
        n, s, d = tokens.shape
        side = math.isqrt(s)
        found = jnp.concatenate([resized(m, *w) for m, w in zip(maps, weights, strict=True)], -1)
        cell = found.shape[1] // side
        found = found.reshape(n, side, cell, side, cell, -1).swapaxes(2, 3)
        found = found.reshape(n, s, cell * cell, -1)
        scores = jnp.einsum("nsd,nscd->nsc", self.query(tokens), self.key(found)) / math.sqrt(d)
        shares = jax.nn.softmax(jnp.nan_to_num(scores), axis=-1)
        return jnp.einsum("nsc,nscd->nsd", shares, self.value(found))

    def __call__(
        self,
        states: Mapping[str, Sequence[Array]],
        inputs: Mapping[str, Array],
        embed: Callable[[Array], Array],
    ) -> dict[str, Array]:
        """Stages up to the visual tokens.

        Args:
            states: "encoder": hidden states [n * views, 1 + s, d] of the low-resolution views,
                picture by picture, the whole one last; "aux": stages [n, h, w, c].
            inputs: not read.
            embed: not read.

        Returns:
            vision_features [n * views, s, d]; mined, likewise; connector_features and
            image_features [n, views * s, ...], the whole view first; tokens, the same flat.
        """
        del inputs, embed
        c = self.config
        plain, joined = c.combine(states["encoder"])
        maps = states["aux"]
        n, views = len(maps[0]), c.grid**2 + c.whole
        per_view = plain.reshape(n, views, *plain.shape[1:])
        mined = jnp.stack(
            [self.mine(per_view[:, i], maps, w) for i, w in enumerate(self._weights(maps))], axis=1
        ).reshape(plain.shape)
        features = joined.at[..., : c.width].add(mined)
        features = features.reshape(n, views, *features.shape[1:])
        if c.whole:
            features = jnp.roll(features, 1, axis=1)
        features = features.reshape(n, -1, features.shape[-1])
        projected = self.projector(features)
        return {
            "vision_features": plain,
            "mined": mined,
            "aux_features": joined_map(maps),  # of use to comparisons only: dropped if not read
            "connector_features": features,
            "image_features": projected,
            "tokens": projected.reshape(-1, projected.shape[-1]),
        }

    def _weights(self, maps: Sequence[Array]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each view and stage the rows and columns of the resize to the first stage's size."""
        side = maps[0].shape[1]
        part = side // self.config.grid
        full = [bilinear(m.shape[1], side) for m in maps]
        cuts = [slice(i * part, (i + 1) * part) for i in range(self.config.grid)]
        views = [[(w[rows], w[cols]) for w in full] for rows in cuts for cols in cuts]
        if self.config.whole:
            shrink = bilinear(side, part)
            views.append([(shrink @ w, shrink @ w) for w in full])
        return views


def joined_map(maps: Sequence[Array]) -> Array:
    """All stages at the first one's size, [n, h, w, sum of c], of which views take their parts."""
    side = maps[0].shape[1]
    return jnp.concatenate([resized(m, *[bilinear(m.shape[1], side)] * 2) for m in maps], axis=-1)
