"""Members of one base with one position a token and with three, fused by pairs, for tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image

import converters
from tests import idefics, internvl, onevision, qwen3_vl, qwen_vl
from tests.checkpoints import hf_llava_folder, make_llama, tuned
from tests.qwen_vl import END, START


class Shown(NamedTuple):
    """A member's share of a picture: ids, -1 at visual tokens; values; places; positions taken;
    what is added to its visual tokens after the first layers.
    """

    ids: list[int]
    values: torch.Tensor
    place: torch.Tensor
    span: int
    deep: tuple[torch.Tensor, ...] = ()


def in_line(ids: Sequence[int], values: torch.Tensor) -> Shown:
    place = torch.arange(len(ids))[:, None].expand(-1, 3)
    return Shown(list(ids), values, place, len(ids))


def see_onevision(theirs: Any, image: Image.Image) -> Shown:
    inputs = onevision.image_processor()([[image]], return_tensors="pt")
    values = theirs.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"], batch_num_images=[1]
    ).pooler_output[0]
    return in_line([-1] * len(values), values)


def see_qwen(theirs: Any, image: Image.Image) -> Shown:
    inputs = qwen_vl.image_processor()([image], return_tensors="pt")
    found = theirs.model.get_image_features(**inputs)
    (values,) = found.pooler_output
    deep = tuple(each[0] for each in getattr(found, "deepstack_features", ()))
    _, high, wide = (inputs["image_grid_thw"][0] // 2).tolist()
    at = torch.cartesian_prod(torch.arange(high), torch.arange(wide))
    place = torch.cat([torch.zeros(len(at), 1, dtype=at.dtype), at], dim=1) + 1
    edge = max(high, wide) + 1
    whole = torch.cat([torch.zeros(1, 3, dtype=at.dtype), place, torch.full((1, 3), edge)])
    return Shown([START, *[-1] * len(values), END], values, whole, edge + 1, deep)


def see_internvl(theirs: Any, image: Image.Image) -> Shown:
    size = {"height": 28, "width": 28}
    cut = transformers.GotOcr2ImageProcessorPil(size=size, max_patches=6, crop_to_patches=True)
    pixels = cut([image], return_tensors="pt").pixel_values
    values = torch.cat(list(theirs.model.get_image_features(pixels).pooler_output)).reshape(-1, 32)
    return in_line([318, *[-1] * len(values), 319], values)


def see_smolvlm(theirs: Any, image: Image.Image) -> Shown:
    maker = idefics.make_processor()
    inputs = maker(text="<image>", images=[image], return_tensors="pt")
    values = torch.cat(
        theirs.model.get_image_features(
            inputs["pixel_values"], inputs["pixel_attention_mask"]
        ).pooler_output
    ).reshape(-1, 32)
    ids = inputs["input_ids"][0]
    return in_line(torch.where(ids == maker.image_token_id, -1, ids).tolist(), values)


def see_llava(theirs: Any, image: Image.Image) -> Shown:
    cut = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    pixels = cut([image], return_tensors="pt").pixel_values
    (values,) = theirs.model.get_image_features(pixels).pooler_output
    return in_line([-1] * len(values), values)


def given(theirs: Any, llm: Any, path: Path) -> Any:
    """Transformers' model with the weights of an LLM, its folder's too."""
    theirs.model.get_decoder().load_state_dict(llm.model.state_dict())
    theirs.lm_head.load_state_dict(llm.lm_head.state_dict())
    theirs.tie_weights()
    theirs.save_pretrained(path)
    return theirs


def grown(llm: Any, rows: int) -> Any:
    """With random rows more."""
    torch.manual_seed(rows)
    llm.resize_token_embeddings(rows, mean_resizing=False)
    return llm


def make_onevision(path: Path, base: Any) -> Any:
    return onevision.port_folder(path, grown(tuned(base, 1), 328))


def make_qwen3(path: Path, base: Any) -> Any:
    theirs = qwen3_vl.make()
    qwen3_vl.write(path, theirs)
    return given(theirs, tuned(base, 2), path)


def make_qwen(kind: str) -> Callable[[Path, Any], Any]:
    def make(path: Path, base: Any) -> Any:
        theirs = qwen_vl.make(kind)
        qwen_vl.write(path, theirs)
        return given(theirs, tuned(base, 2), path)

    return make


def make_internvl(path: Path, base: Any) -> Any:
    """Its tokenizer has Qwen's tokens, and its own behind them."""
    kind = base.config.model_type
    llm = {"vocab_size": 328} | ({"head_dim": 12} if kind == "qwen3" else {})
    theirs, _ = internvl.port_folder(path, kind, llm=llm, image_token_id=320)
    qwen_vl.write(path.parent / "tokenizer", qwen_vl.make("qwen2_vl"))
    first = transformers.AutoTokenizer.from_pretrained(path.parent / "tokenizer")
    words = {"start_image_token": "<img>", "end_image_token": "</img>"}
    words |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=first.backend_tokenizer, eos_token="<|im_end|>", extra_special_tokens=words
    ).save_pretrained(path)
    (path / "chat_template.jinja").write_text(internvl.CHAT)
    return given(theirs, grown(tuned(base, 1), 328), path)


def make_smolvlm(path: Path, base: Any) -> Any:
    theirs = idefics.make_folder(path, "smolvlm", tied=True, vocab=328)
    return given(theirs, grown(tuned(base, 1), 328), path)


def make_llava(path: Path, base: Any) -> Any:
    text = {"tie_word_embeddings": True, "vocab_size": 321, "max_position_embeddings": 1024}
    theirs = hf_llava_folder(path, 3, text=text, tie_word_embeddings=True, image_token_index=320)
    write_base_tokenizer(path)
    return given(theirs, grown(tuned(base, 2), 321), path)


def write_base_tokenizer(path: Path) -> None:
    idefics.make_tokenizer(idefics.SPECIAL[:2]).save_pretrained(path)


QWEN = {"model_type": "qwen2"}
PAIRS: dict[str, tuple] = {
    "onevision": (QWEN, "base", (make_onevision, see_onevision), (make_qwen("qwen2_vl"), see_qwen)),
    "internvl": (
        QWEN,
        "internvl",
        (make_internvl, see_internvl),
        (make_qwen("qwen2_5_vl"), see_qwen),
    ),
    "internvl3_5": (
        {"model_type": "qwen3", "head_dim": 12},
        "internvl3_5",
        (make_internvl, see_internvl),
        (make_qwen3, see_qwen),
    ),
    "smolvlm": (
        {"tie_word_embeddings": True, "max_position_embeddings": 1024},
        "smolvlm",
        (make_smolvlm, see_smolvlm),
        (make_llava, see_llava),
    ),
}
"""Keys of the base, whose rows are kept, how each member is made and what it has of a picture."""


def fuse_pair(kind: str, home: Path) -> tuple[Any, list[Any]]:
    """Writes members, their base and, as "out", the fused folder; the base and the members."""
    config, vocab, *members = PAIRS[kind]
    base = make_llama(0, **config)
    base.save_pretrained(home / "base")
    if kind == "smolvlm":
        write_base_tokenizer(home / "base")
    folders = {name: home / name for name in (kind, "other")}
    made = zip(folders.values(), members, strict=True)
    theirs = [make(path, base) for path, (make, _) in made]
    converters.fuse(folders, home / "out", base=home / "base", vocab=vocab)
    return base, theirs


BEFORE, AFTER = [1, 9], [7, 200]
"""Words around the picture."""
