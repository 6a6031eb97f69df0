"""Full-size ports, by transformers' classes without weights: names, shapes, rows of MODELS.md."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from converters import open_source
from converters.load import check, model_config
from tests.checkpoints import header_file, write_json
from tests.converters.test_published import MODELS, row, shapes

INTERNVIT = {
    "attention_bias": True,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
PORTS: Mapping[str, dict[str, Any]] = {
    "InternVL3-8B-hf": {
        "model_type": "internvl",
        "vision_config": INTERNVIT,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0},
            "vocab_size": 151674,
        },
        "tie_word_embeddings": False,
    },
    "InternVL3_5-8B-HF": {
        "model_type": "internvl",
        "image_token_id": 151671,
        "vision_config": INTERNVIT,
        "text_config": {
            "model_type": "qwen3",
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
    },
}
"""Configs of the published repositories."""

PROCESSORS = {
    "internvl": {
        "image_processor": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 448, "width": 448},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        "image_seq_length": 256,
    },
}
"""`model_type` -> processor_config.json."""

SIZES = ((336, 336), (1024, 768), (500, 3000))


@pytest.mark.parametrize("name", PORTS)
def test_port(tmp_path: Path, name: str):
    """Every tensor of the class is a parameter, and the other way round."""
    given = PORTS[name]
    config = transformers.AutoConfig.for_model(**given)
    with no_init_weights(), torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(config)
    named = {n: ("BF16", list(x.shape)) for n, x in theirs.state_dict().items()}
    write_json(tmp_path / "config.json", config.to_dict())
    write_json(tmp_path / "processor_config.json", PROCESSORS[given["model_type"]])
    header_file(tmp_path / "model.safetensors", named)
    source = open_source(tmp_path)
    params = shapes(source)
    check(source, params)
    assert sum(math.prod(p.shape) for p in params.values()) == theirs.num_parameters()
    (branch,) = model_config(source).branches
    counts = [str(len(branch.architecture.regions(size))) for size in SIZES]
    lines = MODELS.read_text().splitlines()
    assert row(name, source) in lines
    assert f"| {' | '.join([name, *counts])} |" in lines
