"""COMM: every layer of CLIP and the last of DINOv2, merged and joined (arXiv 2310.08825).

Its code was never published. What the paper leaves open is an option here, and its default ours.
"""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from vfjax.architectures.base import (
    Encoder,
    Inputs,
    PatchEncoder,
    Size,
    VisualTokens,
    all_of,
    bucket,
)
from vfjax.architectures.combine import mean
from vfjax.architectures.llava import whole, whole_regions
from vfjax.architectures.mini_gemini import Asker
from vfjax.architectures.tapped import Shown, Tapped
from vfjax.errors import InputError, counted
from vfjax.nn.layers import MLP, linear
from vfjax.vision.images import ImageSpec

Array = jax.Array

Merging = Literal["lln_layerscale", "layerscale", "mean", "conv_layerscale"]
MERGES: tuple[Merging, ...] = ("lln_layerscale", "layerscale", "mean", "conv_layerscale")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """How the layers of one encoder become one feature of its width D (section 3.2, figure 3).

    Attributes:
        width: D.
        layers: taps, such as 1..24 of CLIP-L and 19..24 of DINOv2-L.
        drop: leading tokens (class, registers) that are left out.
        merge: "lln_layerscale", the paper's: sum of alpha_i * Linear_i(LayerNorm_i(x_i)), D -> D.
            "layerscale": sum of alpha_i * x_i. "mean": their mean. "conv_layerscale": sum of
            alpha_i * Conv_i(x_i), 1 x 1; of the paper's BatchNorm only what is left in evaluation,
            a scale and shift of channels that the convolution takes in, so that nothing depends on
            the batch. The alpha_i are the softmax of learned logits, which start at 0 (ours: the
            paper says that they sum to 1).
        blocks: MLPs after the merge, one after another without a skip connection; the paper has
            them on DINOv2, its tables try 1, 2, 4 and 8.
        ratio: hidden width of such a block over D; its activation is GELU (ours).
        eps: of the layer norms.
    """

    width: int
    layers: tuple[int, ...]
    drop: int = 1
    merge: Merging = "lln_layerscale"
    blocks: int = 0
    ratio: int = 4
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for key, good, expected in (
            ("merge", self.merge in MERGES, ", ".join(MERGES)),
            ("layers", len(self.layers) > 0, "one or more"),
            ("blocks", self.blocks >= 0, "0 or more"),
            ("ratio", self.ratio > 0, "1 or more"),
        ):
            if not good:
                found = repr(getattr(self, key))
                raise InputError(f"COMM: {key}", found=found, expected=expected, fix="correct it")

    def build(self, *, rngs: nnx.Rngs) -> "Merge":
        return Merge(self, rngs=rngs)


class Merge(nnx.Module):
    """Hidden states [n, s, D] of one encoder -> one feature [n, s - drop, D]."""

    def __init__(self, config: MergeConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        if c.merge in ("lln_layerscale", "conv_layerscale"):
            self.layers = nnx.List(self._layer(rngs) for _ in c.layers)
        if c.merge != "mean":
            self.logits = nnx.Param(jnp.zeros(len(c.layers)), axes=(None,))
        self.mlp = nnx.List(
            MLP(c.width, c.ratio * c.width, "gelu", rngs=rngs) for _ in range(c.blocks)
        )

    def _layer(self, rngs: nnx.Rngs) -> nnx.Module:
        width = self.config.width
        if self.config.merge == "lln_layerscale":
            return Asker(width, width, rngs=rngs)
        return linear(width, width, (None, "embed"), rngs=rngs)

    def __call__(self, states: Sequence[Array], dtype: DTypeLike) -> Array:
        """The feature of the hidden states at `config.layers`, computed in `dtype`."""
        c = self.config
        features = [s[:, c.drop :].astype(dtype) for s in states]
        if c.merge in ("lln_layerscale", "conv_layerscale"):
            features = [f(x) for f, x in zip(self.layers, features, strict=True)]
        if c.merge == "mean":
            merged = mean(features)
        else:
            shares = jax.nn.softmax(self.logits[...].astype(jnp.float32)).astype(dtype)
            merged = sum(
                (shares[i] * x for i, x in enumerate(features)), start=jnp.zeros((), dtype)
            )
        for block in self.mlp:
            merged = block(merged)
        return merged


@dataclasses.dataclass(frozen=True)
class COMMConfig:
    """Both encoders' merges, their join and the last dense layer.

    Attributes:
        encoder: of the first encoder.
        dout: the LLM's width.
        aux: of the second one; None without.
        join: "channels" (what the paper's figure shows; both encoders must have as many tokens) or
            "tokens" (both must have the same width), the second encoder's behind the first's.
    """

    encoder: MergeConfig
    dout: int
    aux: MergeConfig | None = None
    join: Literal["channels", "tokens"] = "channels"

    act = "gelu"

    def __post_init__(self) -> None:
        if self.join not in ("channels", "tokens"):
            raise InputError(
                "COMM: join", found=repr(self.join), expected="channels, tokens", fix="correct it"
            )
        if self.aux and self.join == "tokens" and self.aux.width != self.encoder.width:
            raise InputError(
                "COMM: join 'tokens'",
                found=f"encoders of widths {self.encoder.width} and {self.aux.width}",
                expected="one width",
                fix="join them on channels",
            )

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Hidden states that are read of each encoder."""
        taps = {"encoder": self.encoder.layers}
        return taps | ({"aux": self.aux.layers} if self.aux else {})

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Encoder -> hidden states that are joined on channels, channels of all of them."""
        widths = {"encoder": self.encoder.width}
        widths |= {"aux": self.aux.width} if self.aux else {}
        return {name: (1, width) for name, width in widths.items()}

    @property
    def width(self) -> int:
        """Channels of the joined feature."""
        more = self.aux.width if self.aux and self.join == "channels" else 0
        return self.encoder.width + more

    def tokens(self, tokens: int, aux: int = 0) -> int:
        """Visual tokens, of the patch tokens of both encoders.

        Raises:
            InputError: they differ and are to be joined on channels.
        """
        if self.aux is None:
            return tokens
        if self.join == "tokens":
            return tokens + aux
        if tokens != aux:
            raise InputError(
                "COMM: token grids",
                found=f"{counted(tokens, 'token')} of one encoder, {aux} of the other",
                expected="as many, to join them on channels",
                fix="choose encoders of one patch size, or join 'tokens'",
            )
        return tokens

    def build(self, *, rngs: nnx.Rngs) -> "COMM":
        return COMM(self, rngs=rngs)


class COMM(nnx.Module):
    """v = [merge(CLIP), MLP(merge(DINOv2))]; visual tokens = Linear(v) (section 3.2)."""

    def __init__(self, config: COMMConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.encoder = c.encoder.build(rngs=rngs)
        if c.aux is not None:
            self.aux = c.aux.build(rngs=rngs)
        self.projector = linear(c.width, c.dout, (None, "embed"), rngs=rngs)

    def __call__(self, states: Mapping[str, Sequence[Array]]) -> VisualTokens:
        """The memory.

        Args:
            states: "encoder" and, with a second encoder, "aux": hidden states [n, drop + s, d] at
                the taps.

        Returns:
            Tokens [n * s', D]; stages, vision_features and, with a second encoder, aux_features
            [n, s, d], merged; connector_features, joined; image_features [n, s', D].

        Raises:
            InputError: see `COMMConfig.tokens`.
        """
        c, dtype = self.config, self.projector.kernel.dtype
        features = {"vision_features": self.encoder(states["encoder"], dtype)}
        if c.aux is not None:
            features["aux_features"] = self.aux(states["aux"], dtype)
        c.tokens(*(x.shape[1] for x in features.values()))
        joined = jnp.concatenate(list(features.values()), axis=2 if c.join == "channels" else 1)
        return all_of(self.projector(joined), {**features, "connector_features": joined})


@dataclasses.dataclass(frozen=True)
class Comm(Tapped):
    """Each picture is one view, shown to one encoder or to two, to each as it was trained.

    Attributes:
        images: for the first encoder.
        aux: config of a second encoder; None without.
        images_aux: for the second.
    """

    aux: PatchEncoder | None = None
    images_aux: ImageSpec | None = None

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See `Architecture.encoders`."""
        return {**super().encoders, **({"aux": self.aux} if self.aux else {})}

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.connector.tokens(self.encoder.tokens, self.aux.tokens if self.aux else 0)

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs: of "encoder" and, with a second one, of "aux", both float32[n, s, s, 3]."""
        del frames  # all are whole
        n, tokens = bucket(len(pictures)) if slots is None else slots, self.tokens
        two = {} if self.images_aux is None else {"aux": whole(pictures, self.images_aux, n)}
        indices = [i * tokens + np.arange(tokens) for i in range(len(pictures))]
        return Shown(Inputs(whole(pictures, self.images, n), two), indices, n * tokens)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`."""
        return whole_regions(self.encoder, self.images, self.tokens, size)
