"""Published weights: shipped members and their fusion answer questions about photographs."""

from ml_collections import ConfigDict

from experiments.configs import family_real


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            **family_real.get_config("shipped"),
            "task": "demo_real",
            "scenes": {"train": 1, "validation": 1, "test": 2},  # the last: of two questions
            "positions": "parallel",  # of the fusion's branches
            "mask": "block",  # of its branches, too
            "max_new_tokens": 20,  # of an answer
        }
    )
