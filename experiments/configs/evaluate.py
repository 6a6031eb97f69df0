"""A benchmark on a model: `evaluate.py:NAME`, NAME a key of vfjax.eval.BENCHMARKS."""

from ml_collections import ConfigDict, config_dict

from vfjax.eval import BENCHMARKS


def get_config(benchmark: str = "mmvp") -> ConfigDict:
    options = dict(BENCHMARKS[benchmark].options) if benchmark in BENCHMARKS else {}
    return ConfigDict(
        {
            "task": "evaluate",
            "benchmark": benchmark,  # NAME
            "data": config_dict.placeholder(str),  # its files as published: a folder, or one file
            "images": config_dict.placeholder(str),  # folder of the pictures; default: below `data`
            "options": options,  # of the benchmark, such as original_labels of MMVP
            "mode": "all",  # ask and score; or "predict", or "score", alone
            "model": config_dict.placeholder(str),  # default: the shipped clip and dino, fused
            "constant": config_dict.placeholder(str),  # answers this to everything
            "against": config_dict.placeholder(str),  # predictions.jsonl of another model
            "limit": config_dict.placeholder(int),  # first questions, pairs kept whole
            "batch": 8,  # questions asked together
            "max_new_tokens": config_dict.placeholder(int),  # default: the benchmark's
            "template": config_dict.placeholder(str),  # default: the checkpoint's
            "dtype": config_dict.placeholder(str),  # default: as stored
            # (data, model[, fsdp]) devices; default: one a process.
            "mesh": config_dict.placeholder(tuple),
            "int8": False,  # weights of the LLM's products
            "int8_cache": False,  # keys and values of what was read
            # Share of the visual tokens that the LLM reads, (one,) or one a branch; (): all.
            "prune": {"keep": (), "by": "attention", "depth": 2},
            "shard": (),  # (("^branches/", {}),) keeps those parameters whole on every device
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
            "chunks": 1,  # jobs that share the questions, as in LLaVA's scripts
            "chunk": 0,  # which of them this is
            "frames": 8,  # of a video
            "pool": 2,  # visual tokens of a frame that become one
            "judge": config_dict.placeholder(str),  # an OpenAI-compatible address, ending in /v1
            "judge_model": "gpt-4o-2024-11-20",  # its name there
            "seed": 0,  # of the bootstrap
        }
    )
