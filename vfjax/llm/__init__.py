"""Decoder-only language models with an explicit cache.

An LLM's config is a frozen dataclass with `vocab`, `width`, `context` and `build(rngs=)`; the LLM
has `embed`, `new_cache`, `__call__(x, mask, cache)` and `logits`.
"""

from vfjax.llm.cache import Cache
from vfjax.llm.internlm2 import InternLM2Config
from vfjax.llm.llama import Llama, LlamaConfig, RopeScaling
from vfjax.llm.mixtral import MixtralConfig
from vfjax.llm.phi import PhiConfig
from vfjax.llm.phi3 import Phi3Config

__all__ = [
    "Cache",
    "InternLM2Config",
    "Llama",
    "LlamaConfig",
    "MixtralConfig",
    "Phi3Config",
    "PhiConfig",
    "RopeScaling",
]
