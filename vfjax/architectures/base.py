"""The contract of a member family's visual path; `vfjax.architectures.tapped` has what many share.

An `Architecture` is a frozen config. On the host it says what its encoders are shown of a batch's
pictures and where their tokens stand in the text (`prepare`), and which part of a picture each
token saw (`regions`). The module that it builds computes hidden states (`encode`) and from them
the visual tokens (`visual_tokens`). Nothing else in vfjax knows of a family: a new one is a file.

A branch turns its inputs into a flat memory of visual tokens of static size; each picture's tokens
are read out of it by a weighted gather, so that tiling, unpadding, newlines, pooling and shrinking
are data.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.run import Run
from vfjax.vision.images import ImageSpec
from vfjax.vision.video import Video

Array = jax.Array
AnyArray = jax.Array | np.ndarray
Size = tuple[int, int]
Embed = Callable[[Array], Array]
"""The LLM's embedding table: int32[...] ids -> [..., d]."""

Media = Image.Image | Video
"""What stands at a placeholder: a picture, RGB, or a video."""

Rows = Sequence[Sequence[Media]]
"""Of each row of a batch its pictures and videos, in the order of their placeholders."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a branch's encoders are shown; a family that needs more adds it in a class of its own.

    Attributes:
        pixels: float32[n, h, w, 3] of the first encoder.
        others: of each other one, by its name, float32[n', h', w', 3].
    """

    pixels: AnyArray
    others: Mapping[str, AnyArray] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Hidden states, and of the inputs what the connector still needs.

    Attributes:
        states: encoder, by its name -> hidden states at the taps, each [n, s, d].
    """

    states: dict[str, list[Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """The words that stand around each picture or frame.

    Attributes:
        ids: int32[n, l] of the row that it stands in.
        mask: bool[n, l], False at padding.
    """

    ids: AnyArray
    mask: AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """A branch's memory.

    Attributes:
        values: [m, d] in the LLM's width.
        keep: bool[m], False at tokens that the connector leaves out.
        deep: [k, m, d], what is added to the hidden states after each of the LLM's first k layers;
            None: nothing.
        seen: what `Branch.within` reads of the first tokens, arrays that have these on their first
            axis; None: it is not asked.
        stages: what was computed on the way, by the names of the authors' code; for comparisons.
    """

    values: Array
    keep: Array
    deep: Array | None = None
    seen: tuple[Array, ...] | None = None
    stages: dict[str, Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gather:
    """Visual tokens that are made of others.

    Attributes:
        indices: int32[m, p] of a memory's tokens.
        weights: float32[m, p] of their sum; None takes the largest of their values.
    """

    indices: AnyArray
    weights: AnyArray | None = None

    def __call__(self, tokens: VisualTokens) -> VisualTokens:
        """The memory with m tokens more behind it; those made of one that is left out are, too."""
        indices = jnp.asarray(self.indices)

        def more(x: Array) -> Array:  # [..., tokens, d]
            if self.weights is None:
                made = x[..., indices, :].max(axis=-2)
            else:
                made = jnp.zeros((*x.shape[:-2], len(indices), x.shape[-1]), jnp.float32)
                for k in range(indices.shape[1]):  # at once, [m, p, d] would be held
                    share = jnp.asarray(self.weights)[:, k, None]
                    made += share * x[..., indices[:, k], :].astype(jnp.float32)
            return jnp.concatenate([x, made.astype(x.dtype)], axis=-2)

        keep = tokens.keep[indices]
        if self.weights is not None:
            keep |= jnp.asarray(self.weights) == 0
        return VisualTokens(
            more(tokens.values),
            jnp.concatenate([tokens.keep, keep.all(axis=1)]),
            None if tokens.deep is None else more(tokens.deep),
            tokens.seen,
            tokens.stages,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pictures:
    """A branch's share of a batch's pictures.

    Attributes:
        given: what was prepared, or what `vfjax.model.encode` made of it: hidden states if the
            visual tokens hang on the prompt, else the visual tokens as the LLM reads them.
        gather: tokens that are made of those of the memory; None: none are.
        prompt: of branches that read it (`Architecture.reads_text`).
        key: of the random numbers that connectors add in training; None: they add none.
    """

    given: Inputs | Encoded | VisualTokens
    gather: Gather | None = None
    prompt: Prompt | None = None
    key: Array | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A branch's share of a batch, on the host.

    Attributes:
        inputs: arrays of static shape.
        runs: one a picture or video.
        size: tokens in the branch's memory.
        shared: of these, the last ones, which belong to no picture. (The others are in the order of
            the inputs' first axis: inputs of several processes put together make a memory of all
            their own tokens and the shared ones once.)
        room: tokens made of others that there is room for, and of how many each is made, so that
            processes agree; None: as there are.
    """

    inputs: Inputs
    runs: list[Run]
    size: int
    shared: int = 0
    room: tuple[int, int] | None = None


class Encoder(Protocol):
    """Config of an encoder (`vfjax.vision.encoders`), whose module is called (pixels, taps)."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    def __hash__(self) -> int: ...
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module: ...


class PatchEncoder(Encoder, Protocol):
    """Config of an encoder whose hidden states are tokens [n, prefix + tokens, width].

    Attributes:
        prefix: tokens before the patches.
        tokens: patches of one picture.
    """

    @property
    def prefix(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class Connector(Protocol):
    """Config of a connector, which makes visual tokens of hidden states.

    Attributes:
        taps: encoder, by its name -> hidden states that are read.
        channels: encoder -> how many of them are joined on channels, channels of all of them.
        dout: the LLM's width.
    """

    @property
    def taps(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def channels(self) -> dict[str, tuple[int, int]]: ...
    @property
    def dout(self) -> int: ...
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module: ...


class Architecture(Protocol):
    """A member family's visual path; implementations are frozen dataclasses.

    Attributes:
        reads_text: whether the visual tokens hang on the prompt, so that `Prompt` is made.
        axes: of the positions that its tokens are placed by: 1, or 3 if runs have `place`.
    """

    reads_text: ClassVar[bool]
    axes: ClassVar[int]

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that stand for a picture or video as -200 does, as those of the folder's processor.

        Where the marks that a run begins and ends with stand around a placeholder, they are its.
        """

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """Name -> config of each encoder; the first one's name is "encoder".

        A module of the branch has that name, and so have its parameters and a folder's tensors.
        """

    @property
    def connector(self) -> Connector:
        """Config of the connector."""

    @property
    def images(self) -> ImageSpec:
        """How pictures are converted and prepared."""

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most, marks included."""

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """Arrays for `encode`, and where each picture's tokens stand.

        Args:
            rows: of a batch.
            slots: pictures to make room for, so that processes with other numbers of pictures agree
                on shapes; None for the fewest that fit, rounded up to a bucket.
        """

    def regions(self, size: Size) -> np.ndarray:
        """The part of a picture that each token saw, in the order of reading.

        Args:
            size: its width and height.

        Returns:
            float64[k, 4]: left, top, right, bottom in shares of the picture; beyond 0 to 1 is
            padding. NaN for tokens without a place of their own.
        """

    def build(self, *, rngs: nnx.Rngs) -> "Branch":
        """The module."""


class OneEncoder:
    """What an `Architecture` says that shows all to one encoder and reads no prompt; to inherit."""

    encoder: PatchEncoder
    reads_text: ClassVar[bool] = False
    axes: ClassVar[int] = 1
    placeholders: ClassVar[tuple[int, ...]] = ()

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See `Architecture.encoders`; a family may add to it."""
        return {"encoder": self.encoder}


class Branch(nnx.Module):
    """Pictures -> visual tokens: encoders, tapped, and a connector.

    A family whose encoders are called in another way has a class of its own with these methods.
    """

    encoder: Any  # whoever looks inside (analysis, training) knows the families' own parts

    def __init__(self, config: Architecture, *, rngs: nnx.Rngs):
        self.config = config
        for name, encoder in config.encoders.items():
            setattr(self, name, encoder.build(rngs=rngs))
        self.connector: Any = config.connector.build(rngs=rngs)

    def encode(self, inputs: Inputs) -> Encoded:
        """Hidden states at the connector's taps."""
        return Encoded(self.states(inputs))

    def states(self, inputs: Inputs) -> dict[str, list[Array]]:
        """Encoder -> the hidden states that the connector taps."""
        first, *_ = self.config.encoders
        shown, taps = {first: inputs.pixels, **inputs.others}, self.config.connector.taps
        return {
            name: list(getattr(self, name)(jnp.asarray(shown[name]), taps[name]))
            for name in self.config.encoders
        }

    def visual_tokens(
        self,
        encoded: Encoded,
        embed: Embed,
        *,
        prompt: Prompt | None = None,
        key: Array | None = None,
    ) -> VisualTokens:
        """The branch's memory.

        Args:
            encoded: of `encode`.
            embed: the LLM's embedding table (`Llama.lookup`).
            prompt: of architectures that read it.
            key: of noise in training.
        """
        del embed, prompt, key
        return self.connector(encoded.states)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the LLM, from 0, after which `within` is called."""
        return ()

    def within(self, layer: int, x: Array, seen: tuple[Array, ...]) -> Array:
        """What visual tokens are given within the LLM, of families that have such a thing.

        The tokens may stand anywhere in the text. The module that answers stays the branch's own
        when LLMs are merged.

        Args:
            layer: of `layers`.
            x: [m, d], the hidden states of the branch's first m tokens after it.
            seen: `VisualTokens.seen`.

        Returns:
            [m, d], what is added to x.
        """
        raise NotImplementedError


def bucket(count: int) -> int:
    """Pictures or tiles that a batch is filled up to: the next power of two."""
    return 1 << (count - 1).bit_length()


def stacked(views: Sequence[np.ndarray], count: int, side: int) -> np.ndarray:
    """Views as float32[count, side, side, 3], black after the last."""
    out = np.zeros((count, side, side, 3), np.float32)
    for slot, view in zip(out[: len(views)], views, strict=True):
        slot[...] = view
    return out


def all_of(features: Array, stages: Mapping[str, Array]) -> VisualTokens:
    """A memory of all tokens [n, s, d], a picture after another; a stage, "image_features"."""
    flat = features.reshape(-1, features.shape[-1])
    named = {**stages, "image_features": features}
    return VisualTokens(flat, jnp.ones(len(flat), bool), stages=named)
