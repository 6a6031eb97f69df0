"""What a fusion's choices do, on the shipped family: weights, methods, order, members, scope."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "ablate",
            "members": ("clip", "dino"),  # of experiments/family/models
            "more": (),  # "name=folder" of members beside the shipped ones, of the same base
            "subsets": True,  # fuse every one, two, three ... of all these too
            "split": "validation",  # never one that scores are reported on
            "scenes": 200,  # pictures, each with a question of every kind
            "seed": 1,  # of the pictures, and of the member of another origin
        }
    )
