"""`mmproj` files of tiny LLaVAs beside their LLMs, as llama.cpp's tools write them, for tests.

Its rules (tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py): layers behind the deepest
feature are cut, the last norm is left out, fc1 is called ffn_down; newer files call it ffn_up.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tests.checkpoints import CLIP, SIGLIP, randomize
from tests.gguf import make

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]

PARTS = {
    "encoder.layers": "v.blk",
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "self_attn.out_proj": "attn_out",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "layer_norm": "ln",
}


def llava(kind: str = "llama", tower: str = "clip", **config: Any) -> tuple[Any, Any]:
    """A LLaVA of transformers', and its LLM alone; a LLaVA-1.6 where there are pinpoints."""
    llm = make(kind)
    vision = transformers.CLIPVisionConfig(**CLIP)
    if tower == "siglip":
        vision = transformers.SiglipVisionConfig(**SIGLIP)
        config["vision_feature_select_strategy"] = "full"
    family = "LlavaNext" if "image_grid_pinpoints" in config else "Llava"
    whole = {"text_config": llm.config, "vision_config": vision, "image_token_index": 287, **config}
    made = getattr(transformers, f"{family}Config")(**whole)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(made)
    randomize(model, 5)
    with torch.no_grad():
        model.model.language_model.load_state_dict(llm.model.state_dict())
        model.lm_head.load_state_dict(llm.lm_head.state_dict())
    return model.eval(), llm


def write(
    path: Path,
    model: Any,
    *,
    new: bool = False,
    keys: Mapping[str, Any] | None = None,
    more: tuple[str, ...] = (),
) -> None:
    """The file of what a LLaVA sees with.

    Args:
        path: of the file.
        model: of `llava`.
        new: whether fc1 is called ffn_up.
        keys: more keys, or others; None leaves one out.
        more: names of more tensors.
    """
    config, vision = model.config, model.config.vision_config
    taps = config.vision_feature_layer
    taps = [taps] if isinstance(taps, int) else taps
    taps = [tap if tap >= 0 else vision.num_hidden_layers + tap + 1 for tap in taps]
    values: dict[str, Any] = {
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.projection_dim": 64,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.block_count": max(taps),
        "clip.vision.feature_layer": taps,
        "clip.vision.image_mean": [0.48145466, 0.4578275, 0.40821073],
        "clip.vision.image_std": [0.26862954, 0.26130258, 0.27577711],
        "clip.use_gelu": vision.hidden_act != "quick_gelu",
    }
    if points := getattr(config, "image_grid_pinpoints", None):
        values |= {
            "clip.vision.image_grid_pinpoints": [x for high, wide in points for x in (wide, high)],
            "clip.vision.image_aspect_ratio": "anyres",
            "clip.vision.mm_patch_merge_type": "spatial_unpad",
        }
    writer = gguf.GGUFWriter(path, "clip")
    for key, value in (values | dict(keys or {})).items():
        if value is not None:
            add(writer, key, value)
    tensors = {"image_newline": model.model.image_newline} if points else {}
    tensors |= model.model.multi_modal_projector.state_dict(prefix="multi_modal_projector.")
    tensors |= model.model.vision_tower.state_dict()
    for name, tensor in tensors.items():
        own = name_of(name, max(taps), new)
        if own:
            writer.add_tensor(own, np.ascontiguousarray(tensor.detach().numpy()))
    for name in more:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a key by its value's type."""
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def name_of(name: str, layers: int, new: bool) -> str:
    """llama.cpp's name of a tensor; "" for one that it leaves out."""
    name = name.removeprefix("vision_model.")
    if name == "image_newline":
        return "v.image_newline" if new else "model.image_newline"
    if "multi_modal_projector" in name:
        return name.replace("multi_modal_projector.linear_1", "mm.0").replace(
            "multi_modal_projector.linear_2", "mm.2"
        )
    if name.startswith("head."):
        return "v." + name
    if name.startswith(("post_layernorm", "embeddings.position_ids")):
        return ""
    up, down = ("ffn_up", "ffn_down") if new else ("ffn_down", "ffn_up")
    for old, own in {**PARTS, "mlp.fc1": up, "mlp.fc2": down}.items():
        name = name.replace(old, own)
    number = name.split(".")[2] if name.startswith("v.blk") else "-1"
    return name if int(number) < layers else ""
