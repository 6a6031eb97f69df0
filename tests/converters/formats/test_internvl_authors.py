"""The authors' folders of InternVL: the port of the same weights computes what they do."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file

import converters
from converters import open_source
from converters.inspect import inspect
from converters.tokenizer import load_tokenizer
from tests.checkpoints import changed, write_json
from tests.internvl import (
    IMAGE,
    VISION,
    assert_close,
    authors_folder,
    picture,
    port_folder,
    port_tokenizer,
    reference,
)
from vfjax import InputError
from vfjax.model import forward

WANXIANG = (
    "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家"
    "合作单位联合开发的多模态大语言模型。<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SHUSHENG = (
    "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫"
    "InternVL, 是一个有用无害的人工智能助手。<|im_end|><|im_start|>user\n<image>\nwhat?<|im_end|>"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("text", "llm", "config", "prompt", "views"),
    [
        ("qwen2", "Qwen2ForCausalLM", {}, WANXIANG, 7),
        (
            "llama",
            "InternLM2ForCausalLM",
            {
                "ps_version": "v1",
                "select_layer": -2,
                "template": "internlm2-chat",
                "system_message": SHUSHENG.split("\n")[1].removesuffix(
                    "<|im_end|><|im_start|>user"
                ),
                "use_thumbnail": False,
            },
            SHUSHENG,
            6,
        ),
    ],
)
def test_the_authors_folder(
    tmp_path: Path, text: str, llm: str, config: dict, prompt: str, views: int
):
    """Reads as the port of the same weights, but for pixels and norms' epsilon; export is exact."""
    theirs, _ = port_folder(tmp_path / "port", text)
    authors_folder(tmp_path / "own", theirs, llm, **config)
    model, processor = converters.load(tmp_path / "own")
    assert processor.chat("what?") == prompt
    processor.lengths = (320,)
    batch = processor([picture(84, 61)], [prompt])
    start, end = prompt.split("<image>")
    spelled = f"{start}<img>{'<IMG_CONTEXT>' * 4 * views}</img>{end}"
    ids = processor.tokenizer(spelled).input_ids
    assert np.where(batch.visual >= 0, IMAGE, batch.tokens)[batch.mask].tolist() == ids
    (seen,) = batch.images.values()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    canvas = np.asarray(picture(84, 61).resize((84, 56), Image.Resampling.BICUBIC)) / 255
    first = (canvas[:28, :28] - mean) / std
    np.testing.assert_allclose(seen.given.pixels[0], first, atol=1e-6)
    for layer in theirs.model.vision_tower.encoder.layer:
        for own in (layer.attention.q_norm, layer.attention.k_norm):
            own.variance_epsilon = VISION["layer_norm_eps"]
    theirs.config.vision_feature_layer = config.get("select_layer", -1)
    if config.get("ps_version") == "v1":
        blocks = theirs.model.pixel_shuffle
        theirs.model.pixel_shuffle = lambda *args, **more: blocks(*args, **more).transpose(1, 2)
    pixels = torch.from_numpy(np.moveaxis(seen.given.pixels[:views], -1, 1).copy())
    expected = reference(theirs, {"input_ids": torch.tensor([ids]), "pixel_values": pixels})
    assert_close(np.asarray(forward(model, batch))[batch.mask], expected)
    converters.export(model, tmp_path / "out")
    names, again = (load_file(tmp_path / x / "model.safetensors") for x in ("own", "out"))
    assert names.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in names.items())
    known, out = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("own", "out"))
    assert known == out


@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("authors") / "own"
    theirs, _ = port_folder(path.parent / "port")
    authors_folder(path, theirs, "Qwen2ForCausalLM")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "vicuna"}, "template: found 'vicuna', expected 'Hermes-2', "),
        ({"ps_version": "v3"}, "ps_version: found 'v3', expected 'v1', 'v2'"),
        ({"use_llm_lora": 16}, "use_llm_lora: found 16, expected 0"),
        ({"system_message": "Be brief."}, "system_message: found 'Be brief.', expected that of"),
        (
            {"llm_config": {"architectures": ["Qwen3MoeForCausalLM"]}},
            "architectures: found ['Qwen3MoeForCausalLM'], expected first one of InternLM2",
        ),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "found ['GptOssForCausalLM']"),
        ({"select_layer": -9}, "select_layer: found -9, expected a whole number from -4 to 3"),
    ],
)
def test_bad_authors_folders(authors, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(InputError) as error:
        open_source(changed(authors, tmp_path / "bad", "config.json", changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_view_of_a_picture(authors, tmp_path: Path):
    """Without tiles, on a square of the mean colour; squashed, if there may be tiles."""
    keys = {"dynamic_image_size": False, "pad2square": True, "force_image_size": None}
    model, processor = converters.load(changed(authors, tmp_path / "one", "config.json", keys))
    (branch,) = model.config.branches
    assert branch.architecture.tokens == 4 + 2 and branch.architecture.images.aspect == "pad"
    batch = processor([Image.new("RGB", (28, 14), "white")], input_ids=[[1, -200]])
    (seen,) = batch.images.values()
    edges, middle = seen.given.pixels[0, [0, -1]], seen.given.pixels[0, 14]
    assert np.abs(edges).max() < 0.02 and middle.min() > 2
    keys = {"max_dynamic_patch": 1, "pad2square": True}
    source = open_source(changed(authors, tmp_path / "tiled", "config.json", keys))
    assert source.branches[0].aspect == "crop"


def test_inspect(authors):
    said = inspect(authors)
    assert "intern_vit_6b, 3 layers x 24, taps [-1], 28 px crop, internvl, up to 30 tokens" in said
    assert "branches.intern.encoder: 52 tensors mapped" in said and "0 known, not read" in said


def test_a_tokenizer_without_marks(authors, tmp_path: Path):
    folder = changed(authors, tmp_path / "bad", "config.json", {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    port_tokenizer(folder, {"context_image_token": "<IMG_CONTEXT>"})
    with pytest.raises(InputError, match="tokenizer: found no token <img>, expected it: a member"):
        converters.load(folder)


def test_internlm2s_tokenizer(shared: Path, tmp_path: Path):
    """SentencePiece's ids of each piece between special tokens, as its own code gives."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes((shared / "tokenizers/llama2/tokenizer.model").read_bytes())
    words = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    added = {str(32000 + i): {"content": word, "special": True} for i, word in enumerate(words)}
    code = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    known = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": code}
    write_json(tmp_path / "tokenizer_config.json", known | {"added_tokens_decoder": added})
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\n你是 what  is it?<|im_end|>"
    pieces = sentencepiece.SentencePieceProcessor(str(model))
    expected = [1]
    for piece in re.split(f"({'|'.join(map(re.escape, words))})", text):
        expected += [32000 + words.index(piece)] if piece in words else pieces.encode(piece)
    assert load_tokenizer(tmp_path)(text).input_ids == expected


def test_internlm2_alone(tmp_path: Path):
    """Merged without towers it has the names of its own code, and is read under them."""
    theirs, _ = port_folder(tmp_path / "port", "llama")
    for name in "abc":
        authors_folder(tmp_path / name, theirs, "InternLM2ForCausalLM")
    members = {name: tmp_path / name for name in "ab"}
    converters.fuse(members, tmp_path / "llm", base=tmp_path / "c", export="llm", method="linear")
    names = load_file(tmp_path / "a/model.safetensors")
    own = {n.removeprefix("language_model.") for n in names if n.startswith("language_model.")}
    assert load_file(tmp_path / "llm/model.safetensors").keys() == own
    again = open_source(tmp_path / "llm").parts["llm"]
    assert again.keys() == open_source(tmp_path / "a").parts["llm"].keys()
