"""Members + base -> merged LLM and branches, written as a folder."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "fuse",
            # ("folder", ...) or ("name=folder", ...): the order in which their tokens are read.
            "members": (),
            "base": config_dict.placeholder(str),  # the LLM that all were fine-tuned from
            "output": config_dict.placeholder(str),  # default: WORKDIR/fused
            "method": "task_arithmetic",
            "weights": config_dict.placeholder(tuple),  # one a member; default: 1 / members each
            "params": ConfigDict(convert_dict=False),
            "export": "model",  # or "llm": a plain Hugging Face causal LM
            "template": config_dict.placeholder(str),  # default: the first member's
            "router": "merged",  # embeddings that SliME's router reads; or "member": its own
            "dtype": config_dict.placeholder(str),  # default: the base's
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
        }
    )
