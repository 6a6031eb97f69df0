"""The embedded default: the family that ships with vfjax, fused and measured on new pictures."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "demo",
            "members": ("clip", "dino"),  # of experiments/family/models, in their tokens' order
            "scenes": 200,  # pictures, each with a question of every kind
            "seed": 0,  # of the pictures
        }
    )
