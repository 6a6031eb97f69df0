"""The pre-norm vision transformer that CLIP, SigLIP, DINO, DINOv2 and InternViT share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.errors import InputError
from vfjax.nn.layers import MLP, RMSNorm, attention, layer_norm, linear, param
from vfjax.vision.resize import bicubic

Array = jax.Array


class Sizes(Protocol):
    """What the configs of vision transformers have in common."""

    @property
    def width(self) -> int:
        """Channels of a token."""

    @property
    def layers(self) -> int:
        """Number of blocks."""

    @property
    def heads(self) -> int:
        """Number of attention heads."""

    @property
    def mlp(self) -> int:
        """Channels inside a block's MLP."""

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""

    @property
    def image_size(self) -> int:
        """Side of the pictures that the position table was trained for."""

    @property
    def act(self) -> str:
        """Key of `ACTIVATIONS`, of the MLPs."""

    @property
    def eps(self) -> float:
        """What the norms add to a variance."""


class ViT(nnx.Module):
    """Pixels -> hidden states. Hidden state 0 is what the first block reads.

    Pooling heads are not part of it: no MLLM reads them.

    Args:
        config: sizes.
        patch_bias: the patch embedding has a bias.
        class_token: one stands before the patches.
        batch_axis: the class token and the position table have a first axis of 1, as in their
            checkpoints.
        mask_token: hold one, which only masked training reads.
        registers: number of register tokens between the class token and the patches; they have no
            position.
        interpolate: take pictures of any size, the position table interpolated to their grid of
            patches; otherwise only of `image_size`.
        antialias: of that interpolation.
        offset: of its steps, see `bicubic`.
        pre_norm: a norm stands before the blocks.
        layer_scale: the blocks scale what they add.
        qkv_bias: queries, keys and values have a bias.
        swiglu: the blocks' MLPs are `SwiGLU`.
        qk_norm: epsilon of the norms of queries and keys, over all heads at once; None: none.
        rms_norm: the blocks' norms are `RMSNorm`.
        final_norm: a norm stands behind the blocks.
        rngs: for the weights.
    """

    def __init__(
        self,
        config: Sizes,
        *,
        patch_bias: bool = True,
        class_token: bool = True,
        batch_axis: bool = True,
        mask_token: bool = False,
        registers: int = 0,
        interpolate: bool = True,
        antialias: bool = False,
        offset: float = 0.0,
        pre_norm: bool = False,
        layer_scale: bool = False,
        qkv_bias: bool = True,
        swiglu: bool = False,
        qk_norm: float | None = None,
        rms_norm: bool = False,
        final_norm: bool = True,
        rngs: nnx.Rngs,
    ):
        c = self.config = config
        self.interpolate, self.antialias, self.offset = interpolate, antialias, offset
        self.class_token, self.register_tokens, self.pre_normed = class_token, registers, pre_norm

        def tokens(*shape: int) -> nnx.Param:
            shape = (1, *shape) if batch_axis else shape
            return param(shape, (None,) * len(shape), rngs=rngs)

        self.patch = patch_conv(c.width, c.patch, bias=patch_bias, rngs=rngs)
        if class_token:
            self.cls = tokens(1, c.width) if batch_axis else tokens(c.width)
        if mask_token:
            self.mask = param((1, c.width), (None, None), rngs=rngs)
        if registers:
            self.registers = tokens(registers, c.width)
        self.pos = tokens((c.image_size // c.patch) ** 2 + class_token, c.width)
        if pre_norm:
            self.pre_norm = layer_norm(c.width, c.eps, rngs=rngs)

        def mlp() -> nnx.Module:
            if swiglu:
                return SwiGLU(c.width, c.mlp, rngs=rngs)
            return MLP(c.width, c.mlp, c.act, rngs=rngs)

        self.blocks = nnx.List(
            Block(
                c.width,
                c.heads,
                mlp(),
                c.eps,
                layer_scale=layer_scale,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                rms_norm=rms_norm,
                rngs=rngs,
            )
            for _ in range(c.layers)
        )
        if final_norm:
            self.norm = layer_norm(c.width, c.eps, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, prefix + patches, width] at the taps.

        The prefix is the class token, then the registers.

        Args:
            pixels: float[n, h, w, 3], normalised; h and w are cut to multiples of the patch.
            taps: see `run`.
            norm: apply the final norm, which there must be: transformers' `last_hidden_state` is
                tap -1 with it, but for CLIP, where it norms the class token alone.

        Raises:
            InputError: a tap outside the hidden states.
        """
        patches = self.patch(pixels.astype(self.patch.kernel.dtype))
        n, h, w, d = patches.shape
        x = patches.reshape(n, h * w, d)
        if self.class_token:
            x = jnp.concatenate([_expand(self.cls, n), x], axis=1)
        x = x + self.positions(h, w)
        if self.register_tokens:
            x = jnp.concatenate([x[:, :1], _expand(self.registers, n), x[:, 1:]], axis=1)
        if self.pre_normed:
            x = self.pre_norm(x)
        states = run(self.blocks, x, taps)
        return [self.norm(s) for s in states] if norm else states

    def positions(self, h: int, w: int) -> Array:
        """The position table for a grid of h x w patches, the class token's first.

        Interpolated as transformers does with `interpolate_pos_encoding=True`.

        Returns:
            [1, 1 + h * w, width] of the table's dtype; the table itself where nothing is
            interpolated.
        """
        table = self.pos[...]
        side = self.config.image_size // self.config.patch
        if not self.interpolate or (h, w) == (side, side):
            return table
        rows, cols = (
            jnp.asarray(bicubic(side, k, antialias=self.antialias, offset=self.offset), jnp.float32)
            for k in (h, w)
        )
        grid = table[0, 1:].reshape(side, side, -1).astype(jnp.float32)
        grid = jnp.einsum("yi,xj,ijd->yxd", rows, cols, grid, precision="highest")
        grid = grid.reshape(1, h * w, -1).astype(table.dtype)
        return jnp.concatenate([table[:, :1], grid], axis=1)


def _expand(token: nnx.Param, n: int) -> Array:
    """[..., k, width] or [width] -> [n, k, width]."""
    values = token[...].reshape(1, -1, token.shape[-1])
    return jnp.broadcast_to(values, (n, *values.shape[1:]))


class Attention(nnx.Module):
    """Multi-head self-attention, [n, s, width] -> [n, s, width]."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.qk_norm = heads, qk_norm
        self.q, self.k, self.v = (
            linear(width, width, ("embed", "heads"), bias=qkv_bias, rngs=rngs) for _ in range(3)
        )
        self.out = linear(width, width, ("heads", "embed"), bias=out_bias, rngs=rngs)
        if qk_norm is not None:
            self.q_norm, self.k_norm = (RMSNorm(width, qk_norm, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(split) for y in (q, k, v))
        return self.out(attention(q, k, v).reshape(x.shape))


class SwiGLU(nnx.Module):
    """Gated MLP of DINOv2-giant (Dinov2SwiGLUFFN), [n, s, width] -> [n, s, width]."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gated = linear(width, 2 * hidden, ("embed", "mlp"), rngs=rngs)
        self.out = linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gated(x), 2, axis=-1)
        return self.out(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); each branch scaled if `layer_scale`."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: nnx.Module,
        eps: float,
        *,
        layer_scale: bool = False,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: float | None = None,
        rms_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        norm = RMSNorm if rms_norm else layer_norm
        self.norm1 = norm(width, eps, rngs=rngs)
        self.attn = Attention(
            width, heads, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm, rngs=rngs
        )
        self.norm2 = norm(width, eps, rngs=rngs)
        self.mlp = mlp
        self.layer_scale = layer_scale
        if layer_scale:
            self.scale1 = param((width,), (None,), rngs=rngs)
            self.scale2 = param((width,), (None,), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.attn(self.norm1(x))
        x = x + (y * self.scale1[...] if self.layer_scale else y)
        y = self.mlp(self.norm2(x))
        return x + (y * self.scale2[...] if self.layer_scale else y)


def patch_conv(width: int, patch: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Conv:
    """The patch embedding, float32[n, h, w, 3] -> [n, h // patch, w // patch, width]."""
    return nnx.Conv(
        3,
        width,
        (patch, patch),
        strides=patch,
        padding="VALID",
        use_bias=bias,
        kernel_metadata={"axes": (None, None, None, "embed")},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )


def run(
    blocks: Sequence[nnx.Module | Callable[[Array], Array]], x: Array, taps: Sequence[int]
) -> list[Array]:
    """Hidden states of the layers asked for, and nothing computed past the last one.

    Args:
        blocks: the transformer blocks, in order.
        x: [n, s, d] embedding output, which is hidden state 0.
        taps: indices into the len(blocks) + 1 hidden states; k is the output of block k, negative
            counts from the end, as in transformers' `hidden_states`.

    Returns:
        One [n, s, d] array a tap, in the order asked for.

    Raises:
        InputError: no tap, or one outside the hidden states.
    """
    wanted = resolve_taps(taps, len(blocks))
    states = {0: x}
    for k in range(1, max(wanted) + 1):
        x = blocks[k - 1](x)
        if k in wanted:
            states[k] = x
    return [states[k] for k in wanted]


def resolve_taps(taps: Sequence[int], layers: int, where: str = "taps") -> list[int]:
    """Taps as indices 0..layers of the hidden states; see `run`. `where` is for the error."""
    size = layers + 1
    if not taps or any(not -size <= t < size for t in taps):
        raise InputError(
            where,
            found=list(taps),
            expected=f"at least one index within -{size}..{layers}",
            fix="choose layers that the encoder has",
        )
    return [t % size for t in taps]
