"""LLaVA-NeXT's branch: the twin of `vfjax.architectures.llava_next`.

Tiles, unpadding and newlines are the order in which tokens are read: data, which the processor
makes. What is computed is LLaVA's.
"""

from converters.hf.branch import register
from converters.hf.llava import Llava


@register("LlavaNext")
class LlavaNext(Llava):
    """The whole picture and tiles of it, each one view."""
