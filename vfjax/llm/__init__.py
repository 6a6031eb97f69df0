"""Decoder-only language models with an explicit cache.

An LLM's config is a frozen dataclass with `vocab`, `width`, `context` and `build(rngs=)`; the LLM
has `embed`, `new_cache`, `__call__(x, mask, cache)` and `logits`.
"""

from vfjax.llm.cache import Cache
from vfjax.llm.llama import Llama, LlamaConfig, RopeScaling

__all__ = ["Cache", "Llama", "LlamaConfig", "RopeScaling"]
