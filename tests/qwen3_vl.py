"""Folders of Qwen3-VL as transformers writes them, and its processor, for tests.

Without torchvision transformers keeps its video processor shut; what is left of it is opened here.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import image_processing_backends, video_processing_utils
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

import converters
from tests import qwen_vl
from tests.checkpoints import LLAMA, randomize, write_json
from tests.qwen_vl import END, FILM, IMAGE, START, VIDEO, Port

TEXT = {
    **LLAMA,
    "head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_interleaved": True,
        "mrope_section": [3, 2, 1],
    },
}
VISION = {
    "depth": 4,
    "num_heads": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 40,
    "patch_size": 4,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}


def config(**options: Any) -> transformers.Qwen3VLConfig:
    settings = {
        "text_config": TEXT,
        "vision_config": VISION,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    return transformers.Qwen3VLConfig(**settings | options)


def make(seed: int = 5, **options: Any) -> Any:
    """A random model of transformers."""
    with no_init_weights():
        model = transformers.Qwen3VLForConditionalGeneration(config(**options))
    model.tie_weights()
    return randomize(model, seed)


def write(path: Path, theirs: Any) -> Any:
    """The folder as transformers writes it; its tokenizer."""
    tokenizer = qwen_vl.write(path, theirs)
    file = path / "processor_config.json"
    whole = json.loads(file.read_text())
    whole["video_processor"] = json.loads(video_processor().to_json_string())
    write_json(file, whole)
    return tokenizer


def open_port(path: Path) -> Port:
    """A folder, transformers' model and ours."""
    theirs = make()
    tokenizer = write(path, theirs)
    model, processor = converters.load(path)
    processor.lengths = (128,)  # one compilation
    return Port(path, theirs, model, processor, tokenizer)


def _videos() -> ModuleType:
    name = "transformers.models.qwen3_vl.video_processing_qwen3_vl"
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_alone", found.origin)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VIDEOS = _videos()
"""The module of Qwen3VLVideoProcessor."""


def video_processor(**options: Any) -> Any:
    return VIDEOS.Qwen3VLVideoProcessor(**{"size": FILM, "patch_size": 4} | options)


def _resized(x: torch.Tensor, size: Any, interpolation: str, antialias: bool) -> torch.Tensor:
    out = torch.nn.functional.interpolate(
        x.flatten(0, -4), size, mode=interpolation, antialias=antialias
    )
    return out.reshape(*x.shape[:-2], *out.shape[-2:])


def _normalized(x: torch.Tensor, mean: Any, std: Any, inplace: bool) -> torch.Tensor:
    mean, std = (torch.as_tensor(values)[:, None, None] for values in (mean, std))
    return (x - mean) / std


VISIONS = SimpleNamespace(
    InterpolationMode=SimpleNamespace(BICUBIC="bicubic", LANCZOS="lanczos"),
    grayscale_to_rgb=lambda x: x,
    normalize=_normalized,
    resize=_resized,
)
"""What of torchvision.transforms.v2.functional is called for coloured bytes."""


def process(port: Port, text: str, images: list, videos: list) -> dict[str, Any]:
    """The inputs of one row that transformers' processor makes.

    Args:
        port: whose tokenizer is used.
        text: with <|image_pad|> and <|video_pad|> at pictures and videos.
        images: pictures.
        videos: `vfjax.Video`s; frames with times were shown at 10 a second.
    """
    films = [torch.stack([_tensor(frame) for frame in x.frames]) for x in videos]
    known = [
        {
            "total_num_frames": 1000,
            "fps": 10.0 if x.times else len(x.frames) / x.duration if x.duration else None,
            "frames_indices": [round(10 * t) for t in x.times or ()] or [*range(len(x.frames))],
        }
        for x in videos
    ]
    with contextlib.ExitStack() as stack:
        for module in (video_processing_utils, image_processing_backends, VIDEOS):
            stack.enter_context(mock.patch.object(module, "tvF", VISIONS, create=True))
        modes = {"pil_torch_interpolation_mapping": {Image.Resampling.BICUBIC: "bicubic"}}
        stack.enter_context(mock.patch.multiple(image_processing_backends, **modes))
        stack.enter_context(mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"))
        made = Qwen3VLProcessor(qwen_vl.image_processor(), port.tokenizer, video_processor())
        return dict(
            made(
                text=[text],
                images=images or None,
                videos=films or None,
                video_metadata=known or None,
                do_sample_frames=False,
                return_tensors="pt",
            )
        )


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
