"""Idefics3's folders beside other members', and as the first repositories had them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

import converters
from converters import open_source
from converters.load import model_config
from tests.checkpoints import hf_llava_folder, llama_folder, make_llama, write_json
from tests.converters.formats.test_idefics import (
    MAKER,
    PICTURES,
    assert_close,
    ids_of,
    inputs_of,
    picture,
)
from tests.idefics import LONGEST, TILE, make_folder
from vfjax import Model
from vfjax.architectures import Film
from vfjax.model import forward


@torch.no_grad()
def test_fused_with_a_llava_of_its_base(tmp_path: Path):
    """Side by side, marks in the branch's own segment; as put together from torch's parts."""
    base = make_llama(0, max_position_embeddings=1024)
    folder = {name: tmp_path / name for name in ("base", "smol", "llava")}
    llama_folder(folder["base"], llm=base)
    smol = make_folder(folder["smol"], "smolvlm")
    llava = hf_llava_folder(folder["llava"], 3, text={"max_position_embeddings": 1024})
    for theirs, llm in ((smol, smol.model.text_model), (llava, llava.model.language_model)):
        llm.load_state_dict(base.model.state_dict())
        theirs.lm_head.load_state_dict(base.lm_head.state_dict())
    smol.save_pretrained(folder["smol"])
    llava.save_pretrained(folder["llava"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for other in ("base", "llava"):
            shutil.copy(folder["smol"] / name, folder[other] / name)
    members = {name: folder[name] for name in ("smol", "llava")}
    converters.fuse(members, tmp_path / "out", base=folder["base"])
    model, processor = converters.load(tmp_path / "out")
    image, row = PICTURES[1], [5, -200, 7]
    batch = processor([image], input_ids=[row])
    inputs = inputs_of([image], "<image>")
    ids = [5, *inputs["input_ids"][0].tolist(), 7]
    segments = [0, *[1] * (len(ids) - 2), *[2] * 16, 0]
    assert batch.segments[batch.mask].tolist() == segments
    embedded = base.get_input_embeddings()(torch.tensor(ids))
    seen = smol.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
    embedded[torch.tensor(ids) == MAKER.image_token_id] = seen.pooler_output[0]
    shown = torch.tensor(np.moveaxis(batch.images["llava"].given.pixels[:1], -1, 1).copy())
    other = llava.model.get_image_features(shown).pooler_output[0]
    whole = torch.cat([embedded[:-1], other, embedded[-1:]])
    expected = base(inputs_embeds=whole[None]).logits[0]
    assert_close(np.asarray(forward(model, batch))[batch.mask], expected)


def test_early_folders(tmp_path: Path):
    """Keys of the first repositories, and settings of pictures and videos in one file."""
    folder, plain = tmp_path / "early", tmp_path / "plain"
    make_folder(plain, "smolvlm")
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "architectures": ["VLlama3ForCausalLM"],
        "is_llama_config": True,
        "neftune_noise_alpha": 0.0,
        "perceiver_config": {"model_type": "vllama3"},
        "pixel_shuffle_factor": 2,
        "qk_layer_norms": False,
        "rope_interleaved": False,
        "use_resampler": False,
    }
    config["vision_config"] |= {
        "max_image_size": {"longest_edge": TILE},
        "model_type": "smolvlm",
        "size": {"longest_edge": LONGEST},
        "tie_word_embeddings": False,
        "use_base_siglip": True,
    }
    write_json(folder / "config.json", config | {"use_reentrant_checkpointing": False})
    whole = json.loads((folder / "processor_config.json").read_text())
    sampling = {"fps": 2, "max_frames": 16, "video_size": {"longest_edge": 2 * TILE}}
    images = {**whole["image_processor"], "video_sampling": sampling}
    write_json(folder / "preprocessor_config.json", images)
    short = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}
    write_json(folder / "processor_config.json", short)
    (found,), (expected,) = (model_config(open_source(path)).branches for path in (folder, plain))
    film = Film(LONGEST, TILE, 16, 2.0)  # transformers puts the pictures' size in place of videos'
    assert found.architecture == dataclasses.replace(expected.architecture, film=film)


@pytest.mark.parametrize(
    ("images", "tokens"),
    [
        ({"do_image_splitting": False}, 4),
        ({"size": {"longest_edge": 101}, "max_image_size": {"longest_edge": 42}}, 9),
        ({"size": {"longest_edge": 20}}, 4),
        ({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3}, 4),
    ],
)
@torch.no_grad()
def test_other_settings_of_pictures(tmp_path: Path, images: dict, tokens: int):
    """Pixels and ids; and the tower on tiles of another size than its table's."""
    folder = tmp_path / "port"
    theirs = make_folder(folder, "idefics3", **images)
    whole = json.loads((folder / "processor_config.json").read_text())
    write_json(folder / "processor_config.json", whole | {"image_seq_len": tokens})
    maker = transformers.AutoProcessor.from_pretrained(folder)
    model, processor = converters.load(folder)
    for image in [*PICTURES[:2], picture(1, 1), picture(900, 2)]:
        inputs = maker(images=[[image]], text=["a <image> b"], return_tensors="pt")
        batch = processor([image], ["a <image> b"])
        np.testing.assert_array_equal(ids_of(batch, 0, maker.image_token_id), inputs.input_ids[0])
        (seen,), (pixels,) = batch.images.values(), inputs.pixel_values.numpy()
        found = np.moveaxis(seen.given.pixels, -1, 1)[: len(pixels)]
        np.testing.assert_allclose(found, pixels, atol=1e-6)
    if tokens != 4:
        out = theirs.model.get_image_features(inputs.pixel_values, inputs.pixel_attention_mask)
        (memory,) = jax.jit(Model.memories)(model, batch.images)
        found = memory.values[: tokens * len(pixels)]
        assert_close(found, out.pooler_output[0])
