"""Where a model came from: beside it, not in what JAX compiles for."""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import converters
from tests.checkpoints import llama_folder, make_llama, upstream_llava_folder, write_json
from vfjax import InputError, encode, forward, generate
from vfjax.atomic import read_json

PROGRAMS = ("jit(forward)", "jit(_encoded)", "jit(prefill)", "jit(first_tokens)", "jit(decode)")
"""What `ask` compiles that depends on the model."""


def ask(folder: Path) -> tuple[np.ndarray, list[str]]:
    """A folder's logits and its answer."""
    model, processor = converters.load(folder)
    batch = processor([Image.new("RGB", (40, 30), "teal")], ["USER: <image>\nWhat? ASSISTANT:"])
    encode(model, batch)
    return np.asarray(forward(model, batch)), generate(model, processor, batch, max_new_tokens=4)


def test_two_folders_of_one_architecture_share_their_programs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for seed, name in enumerate("ab"):
        upstream_llava_folder(tmp_path / name, seed, llm=make_llama(seed, num_hidden_layers=1))
    write_json(
        tmp_path / "b/config.json", read_json(tmp_path / "b/config.json") | {"_name_or_path": "b"}
    )
    compiled, logits = [], []
    for name in "ab":
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            logits.append(ask(tmp_path / name)[0])
        found = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
        compiled.append([x for x in found if any(f in x for f in PROGRAMS)])
    assert all(any(f in x for x in compiled[0]) for f in PROGRAMS), compiled
    assert compiled[1] == []
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@nnx.jit
def twice(model: nnx.Module) -> None:
    """A step that changes a model in place."""
    model.llm.embedding[...] *= 2


def test_each_model_keeps_its_own(tmp_path: Path):
    """Though JAX takes one for the other, and gives back the structure that it saw first."""
    models = {}
    for seed, name in enumerate("ab"):
        llama_folder(tmp_path / name, llm=make_llama(seed, num_hidden_layers=1))
        (tmp_path / name / "generation_config.json").write_text(
            f'{{"transformers_version": "{name}"}}'
        )
        models[name], _ = converters.load(tmp_path / name)
    twice_each = jax.jit(lambda model: jax.tree.map(lambda x: 2 * x, model))
    for name, model in models.items():
        twice(model)
        converters.export(model, tmp_path / f"{name} in place")
        copy = twice_each(model)
        with pytest.raises(InputError, match="^model: found one that no checkpoint was read into"):
            converters.export(copy, tmp_path / "none")
        converters.export(copy, tmp_path / f"{name} copied", like=model)
        for how in ("in place", "copied"):
            file = tmp_path / f"{name} {how}" / "generation_config.json"
            assert read_json(file) == {"transformers_version": name}
