"""SigLIP 2 of fixed resolution: SigLIP's architecture and names, beside a larger text half."""

import pytest
import torch
import transformers

import converters
from tests.checkpoints import SIGLIP, randomize
from tests.vfjax.vision.encoders.common import assert_all_taps, pixels, published, spec
from vfjax.vision.encoders import SigLIPConfig


@pytest.fixture
def folder(tmp_path):
    """Both halves, as it is published."""
    text = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 2560,
        "max_position_embeddings": 64,
        "projection_size": 24,
    }
    config = transformers.SiglipConfig(vision_config=SIGLIP, text_config=text)
    model = randomize(transformers.SiglipModel(config), seed=3)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_every_tap(folder):
    path, model = folder
    assert_all_taps(model.vision_model, converters.load_encoder(path), pixels(2, 28, 28))


def test_published_file(shared):
    model = spec(shared, "siglip2-so400m-patch14-384")
    config = {"model_type": model["config"]["model_type"], **model["config"]["vision_config"]}
    tensors = model["files"]["model"]
    ours, unread, count = published(config, tensors)
    assert ours == SigLIPConfig()
    beside = ("text_model.", "vision_model.head.", "logit_scale", "logit_bias")
    assert unread == sorted(n for n in tensors if n.startswith(beside))
    with torch.device("meta"):
        theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
    theirs.head = None
    assert count == sum(p.numel() for p in theirs.parameters())
