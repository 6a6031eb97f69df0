"""The bridge to servers of plain LLMs: embeddings in a file, and the merged LLM as a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import converters
import vfjax
from experiments.configs.embed import get_config
from experiments.tasks.common import FAMILY
from experiments.tasks.embed import prompt_embeds, run
from vfjax import InputError

MEMBERS = {name: FAMILY / name for name in ("clip", "dino")}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(file)
    return file


def test_transformers_reads_them_as_vfjax_does(tmp_path: Path, scene: Path):
    base = FAMILY / "base"
    converters.fuse(MEMBERS, tmp_path / "fused", base=base)
    converters.fuse(MEMBERS, tmp_path / "llm", base=base, export="llm")
    config = get_config()
    config.update(model=str(tmp_path / "fused"), image=str(scene), prompt="where is the 3 ?")
    config.output = str(tmp_path / "out" / "embeds.safetensors")
    run(config, tmp_path)
    embeds = load_file(config.output)["prompt_embeds"]

    model, processor = converters.load(tmp_path / "fused")
    batch = processor([scene], [processor.chat(config.prompt)])
    mask = np.asarray(batch.mask[0])
    assert embeds.shape == (mask.sum(), model.config.llm.width)
    expected = np.asarray(vfjax.forward(model, batch))[0][mask]
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    with torch.no_grad():
        found = llm(inputs_embeds=embeds[None].float()).logits[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_what_embeddings_cannot_say_is_refused(scene: Path):
    how = {"positions": "parallel", "mask": "block"}
    model, processor = converters.load_fused(MEMBERS, base=FAMILY / "base", **how)
    batch = processor([scene], [processor.chat("where is the 3 ?")])
    with pytest.raises(InputError, match="found parallel positions and a block mask, expected"):
        prompt_embeds(model, batch)
    assert len(prompt_embeds(model, processor(prompts=["how many digits ?"]))) == 1


def test_the_file_is_named():
    config = get_config()
    config.update(model="m", prompt="p", output="embeds.npz")
    with pytest.raises(InputError, match="config.output: found 'embeds.npz'"):
        run(config, Path())
