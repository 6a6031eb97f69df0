"""LLaVA-OneVision's branch: the twin of `vfjax.architectures.onevision`.

Tokens of views that are shrunk are weighted sums of others: data, which the processor makes.
"""

from converters.hf.branch import register
from converters.hf.llava_next import LlavaNext


@register("OneVision")
class OneVision(LlavaNext):
    """Views of pictures and frames of videos, projected; a newline behind them."""
