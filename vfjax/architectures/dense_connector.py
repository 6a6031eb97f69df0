"""Dense Connector (arXiv 2405.13800): LLaVA's or LLaVA-NeXT's path, with more layers read.

The path itself is `Llava`, or `LlavaNext` for tiles; what is read of the encoder is a `Combine`.
"""

from typing import Literal

from vfjax.architectures.combine import Combine
from vfjax.errors import InputError


def dense(kind: str, layers: int, plain: int, *, drop: int = 1, side: int = 0) -> Combine:
    """What Dense Connector reads of an encoder of any depth (arXiv 2405.13800, section 3).

    STI and SCI read the last hidden states of the first two thirds of the layers, STI's pooled by
    8; DCI the means of both halves. At 24 layers (CLIP-L) and at 26 (SigLIP-so400m without its last
    layer) these are the published ones, DenseConnector llava/model/multimodal_encoder; other depths
    are ours. Hidden state 0 is the embedding output.

    Args:
        kind: "sti", "sci" or "dci".
        layers: hidden states that are shared out, from the first on.
        plain: tap of the plain feature.
        drop: see `Combine`.
        side: see `Combine`; the efficient variant, of "sci" and "dci" only.

    Raises:
        InputError: another kind, too few layers for it, or a side for tokens of several layers.
    """
    third, half = layers // 3, layers // 2
    kinds = {
        "sti": ((third - 1,), (2 * third - 1,)),
        "sci": ((third - 1,), (2 * third - 1,)),
        "dci": (tuple(range(half)), tuple(range(half, layers))),
    }
    fix = "choose another connector or encoder"
    if kind not in kinds:
        raise InputError("dense connector", found=repr(kind), expected=", ".join(kinds), fix=fix)
    least = 2 if kind == "dci" else 3
    if layers < least:
        raise InputError(
            f"dense connector {kind!r}: layers", found=layers, expected=f"{least} or more", fix=fix
        )
    if kind == "sti" and side:
        raise InputError("dense connector 'sti': side", found=side, expected="none", fix=fix)
    axis: Literal["channels", "tokens"] = "tokens" if kind == "sti" else "channels"
    pool = 8 if kind == "sti" else 1
    return Combine(((plain,), *kinds[kind]), axis, pool, drop, side)
