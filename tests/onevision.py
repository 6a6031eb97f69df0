"""LLaVA-OneVision's folders as transformers writes them, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


@torch.no_grad()
def reference(theirs: Any, row: Sequence[int], images: list, film: Sequence | None) -> np.ndarray:
    """Transformers' logits of one row; -200 at each of its pictures, -201 at a video."""
    inputs: dict[str, Any] = {}
    counts = []
    if images:
        inputs = dict(image_processor()([images], return_tensors="pt"))
        features = theirs.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=[len(images)]
        ).pooler_output
        counts = [len(x) for x in features]
    if film is not None:
        # As its video processor, which needs torchvision, has them.
        small = [
            torch.nn.functional.interpolate(
                torch.from_numpy(np.array(x)).permute(2, 0, 1)[None].contiguous(),
                (28, 28),
                mode="bicubic",
                antialias=True,
            )
            for x in film
        ]
        inputs["pixel_values_videos"] = ((torch.cat(small) / 255 - 0.5) / 0.5)[None]
    rest, ids = iter(counts), []
    for token in row:
        if token == -200:
            ids += [IMAGE] * next(rest)
        elif token == -201:
            assert film is not None
            ids += [VIDEO] * (4 * len(film) + 1)
        else:
            ids.append(token)
    return theirs(input_ids=torch.tensor([ids]), **inputs).logits[0].numpy()
