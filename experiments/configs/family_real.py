"""A family of published weights: SmolLM2-135M-Instruct, DINOv2-S and a small tower, from packages.

`family_real.py:shipped` measures the members that ship with vfjax, without training them.
"""

from ml_collections import ConfigDict, config_dict


def get_config(which: str = "") -> ConfigDict:
    return ConfigDict(
        {
            "task": "family_real",
            # Take members, of one seed, from experiments/family/real/members.
            "shipped": {"": False, "shipped": True}[which],
            "seed": 0,  # of scenes and questions
            "seeds": (0,),  # of members: connector, adapters, order of the data
            "members": ("digits", "dino"),  # that are made; of tasks.family_real.MEMBERS
            "pairs": ("digits+dino",),  # that are fused, in their tokens' order
            # Beside the plain fusion, the cache and the averaged logits; of family.study.WAYS.
            "ways": ("fused: tokens, parallel and block",),
            "who": (),  # is asked, members and "fused: ..." by name; (): everybody
            "side": 84,  # pixels of DINOv2's pictures: as many patches as a scene has words
            "scenes": {"train": 2_000, "test": 40},  # pictures: to learn from, to be asked about
            "mmvp": "../shared/data/mmvp",  # its folder; absent: its row is left out
            "photos": 40,  # of its questions
            # Of a member, see experiments.family.members.
            "align": 1_500,  # steps of its connector towards the base's word embeddings
            "first": 0,  # steps of its connector through the LLM
            "tune": 130,  # steps of connector and adapters
            "rate": 1.5e-3,  # largest learning rate of the adapters
            "first_rate": 1e-3,  # of the connector in `first`; half of it in `tune`
            "rank": 8,  # of the adapters
            "batch": 2,  # talks of a step
            "turns": 7,  # questions of a talk, before the list of all that is seen
            "length": 320,  # tokens of a talk
            "rows": 30,  # questions that are asked together
            "ship": config_dict.placeholder(str),  # a folder for the first seed's members
        }
    )
