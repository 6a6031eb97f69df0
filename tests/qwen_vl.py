"""Folders of Qwen2-VL and Qwen2.5-VL as transformers writes them, and its inputs, for tests.

Its own processors of both need torchvision, for videos; here their parts are put together.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.initialization import no_init_weights

import converters
from tests.checkpoints import LLAMA, randomize, tokenizer_files, write_json
from vfjax import Model, Processor

START, END, IMAGE, VIDEO = 312, 313, 314, 315
MARKS = {
    "<|vision_start|>": START,
    "<|vision_end|>": END,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As the published one."""

TEXT = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
TEXT["rope_parameters"]["mrope_section"] = [2, 1, 1]
VISION = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "window_size": 24,  # three tokens a side
        "fullatt_block_indexes": [1],
        "tokens_per_second": 3,
    },
}
COMMON = {"depth": 3, "num_heads": 2, "patch_size": 4}
PIXELS = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 40}
FILM = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 16}


IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "size": PIXELS}


class Port(NamedTuple):
    path: Path
    theirs: Any
    model: Model
    processor: Processor
    tokenizer: Any


def image_processor(**options: Any) -> Any:
    settings = {"size": PIXELS, "patch_size": 4} | options
    return transformers.Qwen2VLImageProcessorPil(**settings)


def make(kind: str, seed: int = 5, **text: Any) -> Any:
    """A random model of transformers."""
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text},
        vision_config={**COMMON, **VISION[kind]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    with no_init_weights():
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.tie_weights()
    return randomize(model, seed)


def write(path: Path, theirs: Any) -> Any:
    """The folder as transformers writes it; its tokenizer."""
    theirs.save_pretrained(path)
    tokenizer = write_tokenizer(path)
    image = json.loads(image_processor().to_json_string())
    video = {k: v for k, v in image.items() if k != "image_processor_type"}
    video |= {"video_processor_type": "Qwen2VLVideoProcessor", "size": FILM}
    write_json(
        path / "processor_config.json",
        {
            "processor_class": type(theirs.config).__name__.replace("Config", "Processor"),
            "image_processor": image,
            "video_processor": video,
        },
    )
    return tokenizer


def write_tokenizer(path: Path) -> Any:
    """Files of a tokenizer with the marks, and a chat template; the tokenizer."""
    tokenizer_files(path)
    engine = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    engine.add_special_tokens([f"<unused{i}>" for i in range(START - engine.get_vocab_size())])
    engine.add_special_tokens([*MARKS, "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, eos_token="<|im_end|>"
    )
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in MARKS} == MARKS
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return tokenizer


def open_port(path: Path, kind: str) -> Port:
    """A folder, transformers' model and ours."""
    theirs = make(kind)
    tokenizer = write(path, theirs)
    model, processor = converters.load(path)
    processor.lengths = (128,)  # one compilation
    return Port(path, theirs, model, processor, tokenizer)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_close(found: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(what)
    )


SIZES = [(30, 500), (120, 90), (20, 20), (61, 47), (200, 33)]


class Given(NamedTuple):
    """A video as transformers' processor takes it: frames that are not resized."""

    frames: list
    seconds: float


def film(media: Given) -> dict[str, Any]:
    """What Qwen2VLVideoProcessor, which only torchvision has, makes of frames of the right size.

    Two frames are one grid step, in the place of the same picture twice.
    """
    frames = [*media.frames, *media.frames[-1:] * (len(media.frames) % 2)]
    each = [image_processor(size=PIXELS)(x, return_tensors="pt").pixel_values for x in frames]
    parts = [x.reshape(len(x), 3, 2, 16) for x in each]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    steps = [torch.stack([a[:, :, 0], b[:, :, 0]], dim=2).flatten(1) for a, b in pairs]
    width, height = media.frames[0].size
    return {
        "pixel_values_videos": torch.cat(steps),
        "video_grid_thw": torch.tensor([[len(steps), height // 4, width // 4]]),
        "second_per_grid_ts": torch.tensor([2 / (len(media.frames) / media.seconds)]),
    }


def given(port: Port, prompt: str, media: list) -> dict[str, Any]:
    """The inputs of one row that transformers' processor makes (processing_qwen2_vl.py)."""
    out: dict[str, Any] = {}
    parts = [x for x in media if isinstance(x, Image.Image)]
    if parts:
        out |= dict(image_processor()(parts, return_tensors="pt"))
    for x in media:
        if isinstance(x, Given):
            out |= film(x)
    if port.theirs.config.model_type == "qwen2_vl":
        out.pop("second_per_grid_ts", None)  # of Qwen2.5-VL's processor alone
    for token, key in (("<|image_pad|>", "image_grid_thw"), ("<|video_pad|>", "video_grid_thw")):
        for grid in out.get(key, ()):
            prompt = prompt.replace(token, "<|placeholder|>" * (int(grid.prod()) // 4), 1)
        prompt = prompt.replace("<|placeholder|>", token)
    ids = port.tokenizer(prompt, return_tensors="pt").input_ids
    kinds = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    return {"input_ids": ids, "mm_token_type_ids": kinds, **out}


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
MOVIE = "<|vision_start|><|video_pad|><|vision_end|>"
SIZES = [(30, 500), (120, 90), (20, 20), (61, 47), (200, 33)]


def assert_ids(batch: Any, row: int, expected: torch.Tensor) -> None:
    """Marks and text are transformers'; so is where visual tokens stand."""
    ids = np.where(batch.visual[row] >= 0, IMAGE, batch.tokens[row])[batch.mask[row]]
    assert ids.tolist() == torch.where(expected == VIDEO, IMAGE, expected).tolist()
