"""A small trained family: base, encoders, members, and what their fusion gains; from nothing.

`family.py:shipped` measures the members that ship with vfjax alone, in minutes.
"""

from ml_collections import ConfigDict, config_dict


def get_config(which: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "task": "family",
            # Take base and members, of one seed, from experiments/family/models.
            "shipped": {"": False, "shipped": True}[which],
            "seed": 0,  # of scenes, base and encoders
            "seeds": (0, 1, 2),  # of members: connector, order of the data
            "members": (  # that are made; of tasks.family.MEMBERS
                *("clip", "dino", "sti", "sci", "dci", "comm", "mgm", "slime"),
                *("distilled", "fine", "clip-long", "dino-long"),
            ),
            "pairs": (  # that are fused
                "clip+dino",
                *("clip+dci", "clip+mgm", "clip+slime"),  # with one CLIP tower
                *("clip+dino+dci", "clip+dino+mgm+slime"),
            ),
            # Steps and rate of the last stage of the first pair, beside the others' below.
            "sweep": ((50, 2e-4), (200, 2e-4), (800, 2e-4), (200, 1e-3), (800, 1e-3)),
            # Pictures that encoders and members learn from, that choose weights, that are scored.
            "scenes": {"encoders": 30_000, "train": 6_000, "validation": 200, "test": 500},
            "encoders": {  # steps
                **{"clip": 250, "dino": 500, "distilled": 600, "fine": 250, "convnext": 250},
            },
            # Of a member, see experiments.family.members.
            "align": 1_500,  # steps of its connector towards the base's word embeddings
            "first": 100,  # steps of its connector through the LLM
            "tune": 200,  # steps of connector and LLM
            "rate": 2e-4,  # largest learning rate of the LLM in these
            "ship": config_dict.placeholder(str),  # a folder for base and members of the first seed
        }
    )
    if config.shipped:
        config.update({"seeds": (0,), "members": ("clip", "dino", "dci"), "sweep": ()})
        config.pairs = ("clip+dino", "clip+dci", "clip+dino+dci")
    return config
