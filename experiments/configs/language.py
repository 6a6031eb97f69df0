"""What tuning does to an LLM's language, and what a merge gives back: base, members, merges."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "language",
            "base": config_dict.placeholder(str),  # a folder or a GGUF file; all are beside it
            "members": (),  # ("folder", ...) or ("name=folder", ...): tuned from the base
            "method": "task_arithmetic",  # of vfjax.merge.METHODS, one with weights
            "weights": (0.25, 0.5, 0.75, 1.0),  # of each member, a merged LLM each
            "window": 128,  # tokens that are read together, for perplexity
            "tokens": 128,  # of each document, from its beginning
            "documents": 24,  # of each kind of text, at most
            "limit": 12,  # facts and instructions of each kind, at most
            "batch": 16,  # rows read together
            "max_new_tokens": 48,  # of an answer to an instruction
            "dtype": "float32",  # of all LLMs
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
            "draws": 5000,  # of the bootstrap
            "seed": 0,  # of the bootstrap
        }
    )
