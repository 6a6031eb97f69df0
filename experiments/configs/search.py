"""The coefficients of a fusion: searched on one part of the questions, scored on the other."""

from ml_collections import ConfigDict, config_dict

from vfjax.eval import BENCHMARKS


def get_config(benchmark: str = "") -> ConfigDict:
    options = dict(BENCHMARKS[benchmark].options) if benchmark in BENCHMARKS else {}
    return ConfigDict(
        {
            "task": "search",
            # ("folder", ...) or ("name=folder", ...); default: the shipped clip and dino, asked
            # about validation scenes, and for the score about test scenes
            "members": (),
            "base": config_dict.placeholder(str),  # the LLM that all were fine-tuned from
            "method": "task_arithmetic",  # of vfjax.merge.METHODS, one with weights
            "grid": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),  # coefficients tried
            "groups": 1,  # coefficients a member: more are a gradient over the layers
            "rounds": 1,  # over the members, after one coefficient for all
            "objective": "score",  # or "consistency": of answers alone, without labels
            "metric": config_dict.placeholder(str),  # of the benchmark; default: its first
            "benchmark": benchmark,  # search.py:NAME, NAME a key of vfjax.eval.BENCHMARKS
            "data": config_dict.placeholder(str),  # its files as published
            "images": config_dict.placeholder(str),  # folder of the pictures
            "options": options,  # of the benchmark
            "limit": config_dict.placeholder(int),  # first questions, pairs kept whole
            "held_out": 0.5,  # share of the benchmark's pictures that the search never sees
            "scenes": 100,  # of each of the family's splits
            "batch": 8,  # questions asked together
            "max_new_tokens": config_dict.placeholder(int),  # default: the benchmark's
            "dtype": config_dict.placeholder(str),  # of the merged LLM; default: the base's
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
            "seed": 0,  # of the scenes, of the split, of the bootstrap
        }
    )
