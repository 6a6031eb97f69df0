"""Members + base -> merged LLM and branches, written as a folder."""

from ml_collections import ConfigDict, config_dict

from vfjax.merge import METHODS

PARAMS = sorted({key for method in METHODS.values() for key in method.params} - {"weights"})


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "fuse",
            # ("folder", ...) or ("name=folder", ...): the order in which their tokens are read; a
            # folder may be org/name[@revision] on the hub, here as everywhere.
            "members": (),
            "base": config_dict.placeholder(str),  # the LLM that all were fine-tuned from
            "output": config_dict.placeholder(str),  # default: WORKDIR/fused
            "method": "task_arithmetic",  # a key of vfjax.merge.METHODS
            # One a member, 1 / members each by default; lists vary over the layers. A text expert
            # that comes in late: --config.method=linear --config.weights="((1, 1, .4), (0, 0, .6))"
            "weights": config_dict.placeholder(tuple),
            # The method's others; default: its own.
            "params": {key: config_dict.placeholder(object) for key in PARAMS},
            "rules": (),  # (regex, changes): (("embed_tokens|lm_head", {"take": "base"}),)
            "recipe": config_dict.placeholder(str),  # a mergekit YAML file, in place of all these
            "vocab": config_dict.placeholder(str),  # members' added tokens: "base" or whose to keep
            "family": True,  # refuse weights that are no fine-tune of the base
            "seed": 0,  # of dare and della
            # "llm": a plain Hugging Face causal LM; "whole": members of one architecture, towers
            # and connectors merged, too, in their own layout.
            "export": "model",
            "template": config_dict.placeholder(str),  # default: the first member's
            "positions": "running",  # or "parallel": each branch where the picture stands
            "mask": "causal",  # or "block": a branch's tokens don't see another's
            "router": "merged",  # embeddings that SliME's router reads; or "member": its own
            "dtype": config_dict.placeholder(str),  # default: the base's
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
            "shard_gb": 5.0,  # largest weights file
            "checksums": True,  # SHA-256 of the sources; a file that has not changed is known
            "account": True,  # what the members did to the base, in MERGE.md
            "dry_run": False,  # read headers, say what would be written
            "resume": False,  # go on with a killed run
            "remote_code": False,  # add code, so that transformers needs no vfjax (needs torch)
            "push_to_hub": config_dict.placeholder(str),  # org/name: sent to the hub, too
            "private": config_dict.placeholder(bool),  # there; default: as the account has it
        }
    )
