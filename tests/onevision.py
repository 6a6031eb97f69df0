"""LLaVA-OneVision's folders as transformers writes them, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

from tests.checkpoints import SIGLIP, randomize, text_config, tokenizer_files, write_json

IMAGE, VIDEO = 318, 319
GRIDS = [[28 * rows, 28 * cols] for rows in range(1, 4) for cols in range(1, 4)]
HALF = [0.5, 0.5, 0.5]


def port_config(vocab: int = 320, **config: Any) -> transformers.LlavaOnevisionConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
        text_config=text_config(model_type="qwen2", vocab_size=vocab),
        **{
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": GRIDS,
            "vision_aspect_ratio": "anyres_max_3",
        }
        | config,
    )


def image_processor() -> transformers.LlavaOnevisionImageProcessorPil:
    return transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28},
        image_grid_pinpoints=GRIDS,
        image_mean=HALF,
        image_std=HALF,
    )


def port_folder(path: Path, llm: Any = None) -> transformers.LlavaOnevisionForConditionalGeneration:
    """Transformers' as its save_pretrained writes it, processor_config.json too."""
    model = transformers.LlavaOnevisionForConditionalGeneration(
        port_config(llm.config.vocab_size if llm else 320)
    )
    randomize(model, 5)
    if llm is not None:
        model.model.language_model.load_state_dict(llm.model.state_dict())
        model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.save_pretrained(path)
    tokenizer_files(path)
    write_json(
        path / "processor_config.json",
        {
            "processor_class": "LlavaOnevisionProcessor",
            "image_processor": json.loads(image_processor().to_json_string()),
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": 16,
            "vision_aspect_ratio": "anyres_max_3",
            "vision_feature_select_strategy": "full",
        },
    )
    return model


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
