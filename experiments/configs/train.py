"""A connector, and what else a stage names, is trained; `train.py:RECIPE` names the stages.

What the recipes are made of, file by file, stands in docs/recipes.md:

- llava: LLaVA-1.5's scripts/v1_5/{pretrain,finetune}.sh, which Dense Connector's are, too;
- lora: finetune_lora.sh in place of the second (its adapters have dropout 0.05, ours none);
- next: LLaVA-NeXT's scripts/train/{pretrain,finetune}_clip.sh, which tune the encoder as well;
- slime, slime_llama3: SliME's scripts/{vicuna,llama}; they name DeepSpeed files that it has not
  published: taken for LLaVA's, which do not clip;
- comm: COMM, arXiv 2310.08825, section 4.1. What it does not print is ours: warm-up, length,
  clipping, steps of the second stage.

One thing is as in transformers today, not as in these scripts' version of it: the loss of a step is
the mean of all its labelled tokens, whatever device they are on, where the scripts average the
devices' means, so that a token of a short answer counted more.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from vfjax.atomic import JSON

CONNECTOR = r"branches/[^/]*/connector/"
ENCODER = r"branches/[^/]*/encoder/"
LLM = "llm/"
ADAPTERS = r".*/[ab]$"


def stage(train: tuple[tuple[str, float], ...], batch: int, **more: JSON) -> dict[str, Any]:
    """One stage: (pattern, learning rate) pairs, rows a step."""
    return {
        "data": (),  # ("rows.json=folder of pictures", ...)
        "weights": (),  # of the data sets, default: by their rows
        "train": train,  # (pattern of parameters' names, largest learning rate), ...
        "batch": batch,  # rows that are run together
        "accumulate": 1,  # parts of `batch` rows that make one step
        "steps": 0,  # 0: one pass over the data, each row at least once
        "by_modality": False,  # the rows of a step all have pictures, or none has
        "window": 1,  # steps over which rows are sorted by length, to save padding; 1: none
        "aspect": "",  # "pad" pictures to a square, or "crop" them; "": as the model does
        # Of the model's connector, in this stage alone: SliME's gate, shown, temperature, top_p.
        "connector": ConfigDict(),
        "frames": 8,  # of a video
        "length": 2048,  # tokens of a row, visual ones included; the rest is cut off
        "template": "",  # of the talks, a key of vfjax.text.prompts.TEMPLATES; "": the model's
        "warmup": 0.03,  # share of the steps in which the rates rise from 0
        "schedule": "cosine",  # of the rates then, or "linear"; both fall to 0; or "constant"
        "clip": config_dict.placeholder(float),  # largest norm of all gradients; None: any
        "weight_decay": 0.0,  # AdamW's, not of biases and norms
        # Adapters on the dense layers whose names match; rank 0: none.
        "lora": {"rank": 0, "alpha": 256.0, "pattern": "llm/blocks/.*"},
        **more,
    }


def align(rate: float = 1e-3, **more: JSON) -> dict[str, Any]:
    """The first stage of LLaVA and what grew from it: captions, the connector alone."""
    return stage(((CONNECTOR, rate),), 256, template="plain", **more)


def llava(rate: float = 2e-5) -> dict[str, Any]:
    tune = stage(((CONNECTOR, rate), (LLM, rate)), 128, by_modality=True)
    return {"align": align(aspect="crop"), "tune": tune}


def lora() -> dict[str, Any]:
    tune = stage(((CONNECTOR, 2e-5), (ADAPTERS, 2e-4)), 128, by_modality=True)
    tune["lora"]["rank"] = 128
    return {**llava(), "tune": tune}


def llava_next() -> dict[str, Any]:
    every = ((ENCODER, 2e-6), (CONNECTOR, 1e-5), (LLM, 1e-5))
    return {
        "align": align(aspect="crop", clip=1.0, length=8192),
        "tune": stage(every, 128, by_modality=True, clip=1.0, length=32_768),
    }


def comm() -> dict[str, Any]:
    both = ((CONNECTOR, 2e-5), (LLM, 2e-5))
    first = stage(both, 64, steps=100_000, clip=1.0)
    return {"align": first, "tune": stage(both, 64, clip=1.0)}


def slime(first: float = 1e-3, rate: float = 2e-5) -> dict[str, Any]:
    def part(pattern: str, **switches: str | float) -> dict[str, Any]:
        one = ((CONNECTOR + pattern, first),)
        return stage(one, 256, template="plain", connector={"top_p": 1.0, **switches})

    both = ((CONNECTOR, rate), (LLM, rate))
    return {
        "global": part("projector", shown="global", gate=0),
        "experts": part("expert", shown="global", gate=1),
        "local": part("sampler", shown="local"),
        "tune": stage(both, 128, by_modality=True, connector={"top_p": 0.95}),
    }


def slime_llama3() -> dict[str, Any]:
    return slime(5e-4, 1e-5)


RECIPES = {
    "llava": llava,
    "lora": lora,
    "next": llava_next,
    "comm": comm,
    "slime": slime,
    "slime_llama3": slime_llama3,
}
CONNECTORS = {"comm": "comm", "slime": "slime", "slime_llama3": "slime"}


def get_config(recipe: str = "llava") -> ConfigDict:
    stages = RECIPES[recipe]()
    return ConfigDict(
        {
            "task": "train",
            "model": config_dict.placeholder(str),  # a folder to go on with; or a new one of:
            "llm": config_dict.placeholder(str),  # a folder,
            "encoder": config_dict.placeholder(str),  # a folder,
            "aux": config_dict.placeholder(str),  # and for comm a second encoder's
            "connector": CONNECTORS.get(recipe, "mlp"),  # a kind of converters.create
            "options": config_dict.placeholder(object),  # of the connector, a dict
            "aspect": "pad",  # of a new model: pictures padded to a square, or cropped ("crop")
            "stages": stages,  # each makes WORKDIR/NAME/model
            "order": tuple(stages),  # of the stages: a ConfigDict sorts them by name
            "dtype": "bfloat16",  # of the computation; what is stored keeps its own
            "mesh": (1, 1),  # (data, model[, fsdp]) devices, see vfjax.sharding
            "remat": True,  # activations of a block are computed again in the backward pass
            "sequence": False,  # activations between blocks divided by tokens over the model axis
            "seed": 0,  # of new weights and of the rows' order
            "skip_broken": False,  # leave broken rows and pictures out, counted and named
            "save_every": 500,  # steps
            "keep": 2,  # saved states, the newest ones
            "log_every": 10,  # steps
            "profile": config_dict.placeholder(tuple),  # (first, last) step that a trace is kept of
            "tensorboard": False,  # its files, too
            "wandb": config_dict.placeholder(str),  # a Weights & Biases project to log to
            "report": True,  # draw train_report.png
        }
    )
