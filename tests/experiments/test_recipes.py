"""Recipes of `train.py` beside the authors' scripts, and what is checked before the first stage."""

import dataclasses
import re

import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments.configs import train as configs
from experiments.tasks import train as task
from vfjax import InputError, Model
from vfjax.architectures import Llava, MLPConfig, ProjectorConfig, Slime, SliMEConfig
from vfjax.llm import LlamaConfig
from vfjax.model import BranchConfig, ModelConfig
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.images import ImageSpec

HALF = (0.5, 0.5, 0.5)
COMMON = {"warmup": 0.03, "schedule": "cosine", "weight_decay": 0.0, "length": 2048, "window": 1}
ALIGN = COMMON | {"batch": 256, "template": "plain", "by_modality": False, "clip": None}
TUNE = COMMON | {"batch": 128, "template": "", "by_modality": True, "clip": None}
GLOBAL, LOCAL = {"shown": "global", "top_p": 1.0}, {"shown": "local", "top_p": 1.0}

SCRIPTS = {
    # LLaVA scripts/v1_5/pretrain.sh, finetune.sh, zero2.json, zero3.json; Dense Connector's alike
    "llava": {
        "align": (ALIGN | {"aspect": "crop"}, {"connector": 1e-3}),
        "tune": (TUNE | {"aspect": ""}, {"connector": 2e-5, "llm": 2e-5}),
    },
    # finetune_lora.sh: --learning_rate 2e-4 --mm_projector_lr 2e-5 --lora_r 128 --lora_alpha 256
    "lora": {
        "align": (ALIGN | {"aspect": "crop"}, {"connector": 1e-3}),
        "tune": (TUNE | {"aspect": ""}, {"connector": 2e-5, "adapter": 2e-4}),
    },
    # LLaVA-NeXT scripts/train/{pretrain,finetune}_clip.sh, zero3.json: "gradient_clipping": "auto"
    "next": {
        "align": (ALIGN | {"clip": 1.0, "length": 8192}, {"connector": 1e-3}),
        "tune": (
            TUNE | {"clip": 1.0, "length": 32768},
            {"encoder": 2e-6, "connector": 1e-5, "llm": 1e-5},
        ),
    },
    # SliME scripts/vicuna/vicuna_7b_{pt,sft}.sh
    "slime": {
        "global": (ALIGN | {"connector": GLOBAL | {"gate": 0}}, {"projector": 1e-3}),
        "experts": (ALIGN | {"connector": GLOBAL | {"gate": 1}}, {"expert": 1e-3}),
        "local": (ALIGN | {"connector": LOCAL}, {"sampler": 1e-3}),
        "tune": (TUNE | {"connector": {"top_p": 0.95}}, {"connector": 2e-5, "llm": 2e-5}),
    },
    # SliME scripts/llama/llama3_8b_{pt,sft}.sh
    "slime_llama3": {
        "global": (ALIGN | {"connector": GLOBAL | {"gate": 0}}, {"projector": 5e-4}),
        "experts": (ALIGN | {"connector": GLOBAL | {"gate": 1}}, {"expert": 5e-4}),
        "local": (ALIGN | {"connector": LOCAL}, {"sampler": 5e-4}),
        "tune": (TUNE | {"connector": {"top_p": 0.95}}, {"connector": 1e-5, "llm": 1e-5}),
    },
}
PARAMETERS = {
    "connector": "branches/clip/connector/other",
    "projector": "branches/clip/connector/projector/layers/0/kernel",
    "expert": "branches/clip/connector/expert/q/kernel",
    "sampler": "branches/clip/connector/sampler/q/kernel",
    "encoder": "branches/clip/encoder/blocks/0/attn/q/kernel",
    "llm": "llm/blocks/0/attn/q/kernel",
    "adapter": "llm/blocks/0/attn/q/a",
}


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_recipes_are_their_scripts(recipe: str) -> None:
    config = configs.get_config(recipe)
    stages = config.stages
    assert task.ordered(config) == list(SCRIPTS[recipe])
    for name, (expected, rates) in SCRIPTS[recipe].items():
        stage = stages[name].to_dict()
        assert {key: stage[key] for key in expected} == expected, name
        for part, parameter in PARAMETERS.items():
            found = next((rate for p, rate in stage["train"] if re.match(p, parameter)), None)
            whole = part in ("projector", "expert", "sampler") and rates.get("connector")
            adapted = part == "adapter" and rates.get("llm")
            assert found == (rates.get(part) or whole or adapted or None), (name, part)
    if recipe == "lora":
        assert dict(stages.tune.lora) == {"rank": 128, "alpha": 256.0, "pattern": "llm/blocks/.*"}


def toy(slime: bool = False) -> Model:
    spec = ImageSpec(28, 28, "squash", "pad", HALF, HALF)
    clip = CLIPConfig(128, 1, 1, 128, patch=14, image_size=28)
    mlp = MLPConfig(128, 8)
    path = Llava(clip, ProjectorConfig(mlp), spec)
    if slime:
        connector = SliMEConfig(mlp, 128, grid=2, queries=1, separator=3)
        path = Slime(clip, connector, dataclasses.replace(spec, aspect="crop"))
    branch = BranchConfig("clip", path)
    return ModelConfig((branch,), LlamaConfig(320, 8, 1, 2, 2, 4, 8, 600)).build(rngs=nnx.Rngs(0))


def stages(recipe: str, name: str, **changes) -> ConfigDict:
    config = configs.get_config(recipe)
    with config.unlocked():
        config.stages[name].update(changes)
    return config


def test_a_stage_has_its_own_pictures_and_switches() -> None:
    model, config = toy(), configs.get_config("llava")
    aspects = [
        task.staged(model.config, config.stages[name], name).branches[0].architecture.images.aspect
        for name in ("align", "tune")
    ]
    assert aspects == ["crop", "pad"]
    model, config = toy(slime=True), configs.get_config("slime")
    for name, stage in config.stages.items():
        here = task.staged(model.config, stage, name)
        task.switch(model, here)
        connector = model.branches["clip"].connector.config
        assert {k: getattr(connector, k) for k in stage.connector} == stage.connector.to_dict()
    task.switch(model, model.config)
    assert (
        model.branches["clip"].connector.config == model.config.branches[0].architecture.connector
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "tune",
            {"train": (("llmm/", 1.0),)},
            r"config.stages.tune.train\[0\].pattern: found 'llmm/'",
        ),
        ("tune", {"train": (("(", 1.0),)}, r"config.stages.tune.train\[0\].pattern: found '\('"),
        ("tune", {"aspect": "square"}, "config.stages.tune.aspect: found 'square', expected 'pad'"),
        (
            "tune",
            {"connector": {"top_p": 1.0}},
            "config.stages.tune.connector.top_p: found no such",
        ),
        ("tune", {"schedule": "step"}, "schedule: found 'step'"),
        ("align", {"lora": {"rank": 2, "alpha": 1.0, "pattern": "x"}}, "lora.pattern: found 'x'"),
    ],
)
def test_all_stages_are_checked_before_the_first(name: str, changes: dict, message: str) -> None:
    config = stages("llava", name, **changes)
    with pytest.raises(InputError, match=message):
        task.check(config, task.ordered(config), toy())


@pytest.mark.parametrize("recipe", ["llava", "lora", "next", "slime"])
def test_recipes_pass_the_check(recipe: str) -> None:
    config = configs.get_config(recipe)
    task.check(config, task.ordered(config), toy(slime=recipe == "slime"))
