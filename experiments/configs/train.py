"""A connector, and what else a stage names, is trained; `train.py:RECIPE` names the stages.

Figures of the recipes: LLaVA scripts/v1_5 (its adapters have dropout, ours none), SliME's and
DenseConnector's scripts, COMM (arXiv 2310.08825, section 4.1). What COMM does not print is ours:
warm-up, length, steps of the second stage.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

CONNECTOR = r"branches/[^/]*/connector/"
LLM = "llm/"
ADAPTERS = r".*/[ab]$"


def stage(train: tuple[tuple[str, float], ...], batch: int, **more: Any) -> dict[str, Any]:
    """One stage: (pattern, learning rate) pairs, rows a step."""
    return {
        "data": (),  # ("rows.json=folder of pictures", ...)
        "weights": (),  # of the data sets, default: by their rows
        "train": train,
        "batch": batch,
        "accumulate": 1,  # parts of `batch` rows that make one step
        "steps": 0,  # 0: one pass over the data, each row at least once
        "by_modality": False,  # the rows of a step all have pictures, or none has
        "window": 1,  # steps over which rows are sorted by length, to save padding; 1: none
        "frames": 8,  # of a video
        "length": 2048,  # tokens of a row, visual ones included; the rest is cut off
        "template": "",  # "": the model's
        "warmup": 0.03,
        "schedule": "cosine",
        "clip": 1.0,
        "weight_decay": 0.0,
        "lora": {"rank": 0, "alpha": 256.0, "pattern": "llm/blocks/.*"},  # rank 0: none
        **more,
    }


def llava(rate: float = 2e-5) -> dict[str, Any]:
    return {
        "align": stage(((CONNECTOR, 1e-3),), 256, template="plain"),
        "tune": stage(((CONNECTOR, rate), (LLM, rate)), 128, by_modality=True),
    }


def lora() -> dict[str, Any]:
    tune = stage(((CONNECTOR, 2e-5), (ADAPTERS, 2e-4)), 128, by_modality=True)
    tune["lora"]["rank"] = 128
    return {**llava(), "tune": tune}


def comm() -> dict[str, Any]:
    both = ((CONNECTOR, 2e-5), (LLM, 2e-5))
    return {"align": stage(both, 64, steps=100_000), "tune": stage(both, 64)}


def slime() -> dict[str, Any]:
    connector = CONNECTOR
    return {
        "global": stage(((connector + "projector", 1e-3),), 256, template="plain"),
        "experts": stage(((connector + "(expert|gate)", 1e-3),), 256, template="plain"),
        "local": stage(((connector + "sampler", 1e-3),), 256, template="plain"),
        "tune": stage(((connector, 2e-5), (LLM, 2e-5)), 128, by_modality=True),
    }


RECIPES = {"llava": llava, "lora": lora, "comm": comm, "slime": slime}


def get_config(recipe: str = "llava") -> ConfigDict:
    return ConfigDict(
        {
            "task": "train",
            "model": config_dict.placeholder(str),  # a folder to go on with; or a new one of:
            "llm": config_dict.placeholder(str),
            "encoder": config_dict.placeholder(str),
            "aux": config_dict.placeholder(str),  # a second encoder, for comm
            "connector": "comm" if recipe == "comm" else "mlp",  # a kind of converters.create
            "options": config_dict.placeholder(object),  # of the connector, a dict
            "aspect": "pad",  # pictures are padded to a square, or cropped ("crop")
            "stages": RECIPES[recipe](),  # in this order; each makes WORKDIR/NAME/model
            "dtype": "bfloat16",  # of the computation; what is stored keeps its own
            "mesh": (1, 1),  # (data, model[, fsdp]) devices, see vfjax.sharding
            "remat": True,
            "sequence": False,  # activations between blocks divided by tokens over the model axis
            "seed": 0,
            "skip_broken": False,  # leave broken rows and pictures out, counted and named
            "save_every": 500,
            "keep": 2,
            "log_every": 10,
            "profile": config_dict.placeholder(tuple),  # (first, last) step
            "tensorboard": False,
            "wandb": config_dict.placeholder(str),  # a project
            "report": True,  # train_report.png
        }
    )
