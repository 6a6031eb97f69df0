"""InternVL's folders with random weights, and their reference, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.checkpoints import published, randomize, text_config, tokenizer_files, write_json

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": [28, 28],
    "patch_size": [7, 7],
    "layer_norm_eps": 1e-3,
    "attention_bias": True,
    "use_qk_norm": True,
}
IMAGE = 261
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<IMG_CONTEXT>\n"
    "{% elif p.type == 'video' %}<video>\n{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


class Videos:
    """In place of InternVLVideoProcessor, which needs torchvision: its resize is this of torch."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, images: Any):
        self.images = images

    def __call__(self, videos: Sequence, **_: Any) -> dict[str, Any]:
        return {"pixel_values_videos": torch.stack([self._frames(video) for video in videos])}

    def _frames(self, video: Sequence) -> torch.Tensor:
        size = (self.images.size.height, self.images.size.width)
        frames = torch.from_numpy(np.stack([np.asarray(x) for x in video])).permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(
            frames.contiguous(), size, mode="bicubic", antialias=True
        )
        mean, std = (
            torch.tensor(x)[:, None, None] for x in (self.images.image_mean, self.images.image_std)
        )
        return (small / 255 - mean) / std


def port_tokenizer(
    path: Path, tokens: dict[str, str] = TOKENS
) -> transformers.PreTrainedTokenizerFast:
    """The tokens around pictures have the ids 259 to 262."""
    tokenizer_files(path)
    engine = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    engine.add_special_tokens(list(tokens.values()))  # in this order
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, **special, extra_special_tokens=tokens
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def port_processor(tokenizer: Any, **images: Any) -> transformers.InternVLProcessor:
    """Transformers' own, but for the video processor."""

    class Processor(transformers.InternVLProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> None: ...

    own = transformers.GotOcr2ImageProcessorPil(
        **{"size": {"height": 28, "width": 28}, "max_patches": 6} | images
    )
    return Processor(own, tokenizer, Videos(own), image_seq_length=4, chat_template=CHAT)


def port_folder(
    path: Path,
    text: str = "qwen2",
    vision: dict | None = None,
    *,
    llm: dict | None = None,
    **config: Any,
) -> tuple[transformers.InternVLForConditionalGeneration, Any]:
    """Transformers' as save_pretrained writes it, and its processor."""
    model = transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config={**VISION, **(vision or {})},
            text_config=text_config(model_type=text, **(llm or {})).to_dict(),
            **{"image_token_id": IMAGE, "tie_word_embeddings": False} | config,
        )
    )
    randomize(model, 5)
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layer:
            layer.lambda_1 += 1
            layer.lambda_2 += 1
    model.save_pretrained(path)
    processor = port_processor(port_tokenizer(path))
    (path / "chat_template.jinja").write_text(CHAT)
    write_json(
        path / "processor_config.json",
        {
            "processor_class": "InternVLProcessor",
            "image_processor": json.loads(processor.image_processor.to_json_string()),
            "image_seq_length": 4,
        },
    )
    return model, processor


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_close(found: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(what)
    )


@torch.no_grad()
def reference(theirs: Any, inputs: dict) -> np.ndarray:
    return theirs(**inputs).logits[0].float().numpy()


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: int) -> torch.Tensor:
    """InternLM2's wqkv: of each group its queries, its key, its value."""
    groups = k.shape[0] // head
    return torch.cat([x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)], 1).flatten(0, 1)


NAMES = (
    ("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    (
        "vision_tower.embeddings.patch_embeddings.projection.",
        "vision_model.embeddings.patch_embedding.",
    ),
    ("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    ("attention.projection_layer.", "attn.proj."),
    ("attention.", "attn."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("lambda_", "ls"),
    ("multi_modal_projector.layer_norm.", "mlp1.0."),
    ("multi_modal_projector.linear_1.", "mlp1.1."),
    ("multi_modal_projector.linear_2.", "mlp1.3."),
)
INTERNLM2 = (
    ("model.embed_tokens.", "model.tok_embeddings."),
    ("lm_head.", "output."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.o_proj.", "attention.wo."),
    ("mlp.gate_proj.", "feed_forward.w1."),
    ("mlp.up_proj.", "feed_forward.w3."),
    ("mlp.down_proj.", "feed_forward.w2."),
)


def authors_folder(path: Path, theirs: Any, llm: str, **config: Any) -> None:
    """The same weights as the authors' code has them."""
    state, old = {}, published(theirs)
    for name, value in old.items():
        q, k = name.replace(".k_proj.", ".q_proj."), name
        parts = [old[k.replace(".k_proj.", f".{x}_proj.")] for x in "qkv"] if q != k else []
        if any(f".{x}_proj." in name for x in "qv") and "self_attn" not in name:
            continue
        new = name
        if parts and "self_attn" not in name:
            new, value = name.replace(".k_proj.", ".qkv."), torch.cat(parts)
        if llm == "InternLM2ForCausalLM" and "self_attn" in name and "o_proj" not in name:
            if not parts:
                continue
            new, value = name.replace("self_attn.k_proj", "attention.wqkv"), grouped(*parts, 8)
        renamed = NAMES if not name.startswith("language_model") else ()
        for was, now in INTERNLM2 if llm == "InternLM2ForCausalLM" and not renamed else renamed:
            new = new.replace(was, now)
        state[new] = value.clone()
    path.mkdir()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    text = theirs.config.text_config.to_dict()
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text |= {"architectures": [llm], "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    if llm == "InternLM2ForCausalLM":
        text |= {"model_type": "internlm2", "bias": False, "attn_implementation": "eager"}
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **{key: VISION[key] for key in VISION if key not in ("attention_bias", "use_qk_norm")},
        "image_size": 28,
        "patch_size": 7,
        "qkv_bias": True,
        "qk_normalization": True,
        "norm_type": "layer_norm",
        "drop_path_rate": 0.1,
        "num_experts": 8,
        "use_moe": False,
        "use_flash_attn": True,
    }
    own = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 28,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
    }
    write_json(path / "config.json", own | {"llm_config": text, "vision_config": vision} | config)
    port_tokenizer(path)
