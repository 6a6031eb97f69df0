"""The embedded default: two small LLaVA checkpoints made on the fly, fused, exported, checked."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"task": "demo", "seed": 0, "max_new_tokens": 12})
