"""Records what Cambrian's own code computes with tiny random weights, as tests/data/cambrian.npz.

Its pins exclude ours, so it has an environment of its own; weights are drawn by name on both sides
(`tests.cambrian.draw`), shapes and results are stored:

    pip install transformers==4.37.2 timm==0.9.16 open_clip_torch==2.24.0 einops torch torchvision
    PYTHONPATH=. python tests/peers/cambrian.py CLONE_OF_CAMBRIAN tests/data/cambrian.npz

The authors' modules run as they are, on a CPU; only what loads published weights, logs, or moves
tensors to a GPU is replaced. Pixels, features and the language model's input and logits are those
of `generate`, which is where that code calls the samplers within the language model. The file holds

* `shapes`: JSON, case -> folder -> tensor -> shape;
* `published`: the same of Cambrian-8B at full size;
* `CASE/SAMPLE.STAGE`: float32 results.
"""

import functools
import json
import logging
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests import cambrian as toy

logger = types.ModuleType("ezcolorlog")
logger.root_logger = logging.getLogger("cambrian")  # type: ignore[attr-defined]
sys.modules["ezcolorlog"] = logger
for name in ("diffusers", "diffusers.models", "diffusers.models.unets"):
    sys.modules[name] = mock.MagicMock()  # of towers that are not run
sys.modules["diffusers.models.unets.unet_2d_condition"] = mock.MagicMock()
torch.Tensor.half = torch.Tensor.cuda = lambda self, *_: self  # type: ignore[assignment]


def fill(module: torch.nn.Module, start: str = "") -> dict[str, list[int]]:
    """Draws all parameters; name -> shape."""
    state = module.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(toy.draw(start + name, tensor.shape)))
    module.eval()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def open_clip_tower(config: dict[str, Any], mean: list, std: list, mode: str, **sizes: Any) -> Any:
    """In place of `create_model_from_pretrained`: a toy trunk, and OpenCLIP's own transform."""
    import timm
    from open_clip.transform import image_transform

    vision = config["vision_cfg"]
    trunk = timm.create_model(vision["timm_model_name"], pretrained=False, **sizes)
    side = vision["image_size"]
    transform = image_transform(
        side, is_train=False, mean=mean, std=std, resize_mode=mode, interpolation="bicubic"
    )
    holder = types.SimpleNamespace(visual=types.SimpleNamespace(trunk=trunk))
    return holder, transform


def siglip(name: str) -> Any:
    assert name == f"hf-hub:{toy.SIGLIP}"
    v = toy.SIGLIP_CONFIG["vision_cfg"]
    return open_clip_tower(
        toy.SIGLIP_CONFIG,
        *toy.HALF,
        "squash",
        num_classes=0,
        global_pool="map",
        embed_dim=v["golden_dim"],
        depth=v["golden_depth"],
        num_heads=v["golden_heads"],
        mlp_ratio=v["golden_mlp_ratio"],
        patch_size=v["golden_patch"],
        img_size=v["image_size"],
    )


def convnext(name: str) -> Any:
    assert name == f"hf-hub:{toy.CONVNEXT}"
    v = toy.CONVNEXT_CONFIG["vision_cfg"]
    return open_clip_tower(
        toy.CONVNEXT_CONFIG,
        *toy.OPENAI,
        "shortest",
        depths=v["golden_depths"],
        dims=v["golden_dims"],
        drop_path_rate=v["timm_drop_path"],
    )


def build(config: dict[str, Any]) -> tuple[Any, dict[str, dict[str, list[int]]]]:
    """The model with its towers, and shapes by folder."""
    from cambrian.model.language_model import cambrian_llama, cambrian_phi3
    from cambrian.model.multimodal_encoder import clip_convnext_encoder, siglip_encoder

    siglip_encoder.create_model_from_pretrained = siglip
    clip_convnext_encoder.create_model_from_pretrained = convnext
    # Before they are loaded, the published towers' widths are assumed.
    siglip_encoder.SiglipVisionTower.hidden_size = toy.SIGLIP_CONFIG["vision_cfg"]["golden_dim"]
    widths = toy.CONVNEXT_CONFIG["vision_cfg"]["golden_dims"]
    clip_convnext_encoder.CLIPConvNextTower.hidden_size = sum(widths)
    phi = config["model_type"] == "cambrian_phi3"
    kind = cambrian_phi3 if phi else cambrian_llama
    keys = {k: v for k, v in config.items() if k != "model_type"}
    own = kind.CambrianConfig(**keys, attn_implementation="eager" if phi else "sdpa")
    made = kind.CambrianPhi3ForCausalLM if phi else kind.CambrianLlamaForCausalLM
    model = made(own)
    shapes = {"": fill(model)}
    towers = model.get_vision_tower_aux_list()
    for tower, start in zip(towers, ("", "_aux_1", "_aux_2", "_aux_3"), strict=True):
        tower.load_model()
        folder = f"vision_tower{start}"
        shown = "visual.trunk." if folder in toy.OPEN else ""
        found = fill(tower.vision_tower, f"{folder}/{shown}")
        shapes[folder] = {shown + name: shape for name, shape in found.items()}
    return model, shapes


@torch.no_grad()
def sample(model: Any, pictures: list[np.ndarray], rows: list[np.ndarray]) -> dict[str, Any]:
    """All stages of a batch of rows with a picture each, filled on the right."""
    from cambrian.mm_utils import process_images

    towers = model.get_vision_tower_aux_list()
    images = [Image.fromarray(each) for each in pictures]
    pixels = process_images(images, [tower.image_processor for tower in towers], model.config)
    out: dict[str, Any] = {f"pixel_values_{i}": x for i, x in enumerate(pixels)}
    for i, features in enumerate(model.encode_images(pixels)):
        out[f"vision_features_{i}"] = features
    hooks = []

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, result: torch.Tensor) -> None:
            out[name] = result.reshape(len(pictures), -1, result.shape[-1])

        return hook

    inner = model.get_model()
    for i in range(len(towers)):
        hooks.append(
            getattr(inner, f"mm_projector_aux_{i}").register_forward_hook(keep(f"projected_{i}"))
        )
    for i in range(model.config.num_query_group):
        hooks.append(getattr(inner, f"vision_sampler_{i}").register_forward_hook(keep(f"sva_{i}")))
    hooks.append(inner.mm_projector.register_forward_hook(keep("image_features")))
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for i, each in enumerate(rows):
        ids[i, : len(each)], mask[i, : len(each)] = each, True
    tokens, mask_in = torch.from_numpy(ids), torch.from_numpy(mask)
    sizes = [image.size for image in images]
    found = model.prepare_inputs_labels_for_multimodal(
        tokens, None, mask_in, None, None, pixels, image_sizes=sizes
    )
    for hook in hooks:
        hook.remove()
    _, positions, attention, _, embeds, _, *within = found
    model.vision_tower_aux_feature_list, model.vision_tower_aux_attention_masks_list = within[:2]
    model.final_vision_feature_size, model.global_context_feature = within[2:]
    out["inputs_embeds"], out["attention_mask"] = embeds, attention
    result = model(inputs_embeds=embeds, attention_mask=attention, use_cache=False)
    out["logits"] = result.logits
    if len(rows) == 1:
        out["generated"] = model.generate(
            tokens,
            images=pixels,
            image_sizes=sizes,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=-1,
            use_cache=True,
        )[:, 1:]  # behind the BOS that stands for the embeddings
    return {name: np.asarray(x) for name, x in out.items()}


def published() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of Cambrian-8B and of its towers, without weights."""
    import timm
    from cambrian.model.language_model.cambrian_llama import (
        CambrianConfig,
        CambrianLlamaForCausalLM,
    )
    from cambrian.model.multimodal_encoder import clip_convnext_encoder, siglip_encoder
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

    siglip_encoder.SiglipVisionTower.hidden_size = 1152
    clip_convnext_encoder.CLIPConvNextTower.hidden_size = 5760
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    giant = Dinov2Config(**toy.GIANT)
    keys = {k: v for k, v in {**toy.CONFIG, **toy.PUBLISHED}.items() if k != "model_type"}
    torch.linspace = functools.partial(torch.linspace, device="cpu")  # timm reads its numbers
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        before = Path.cwd()
        os.chdir(folder)
        clip.save_pretrained(toy.CLIP)
        giant.save_pretrained(toy.DINO)
        model = CambrianLlamaForCausalLM(CambrianConfig(**keys))
        os.chdir(before)
        trunks = {
            "vision_tower": timm.create_model("vit_so400m_patch14_siglip_384", num_classes=0),
            "vision_tower_aux_3": timm.create_model("convnext_xxlarge"),
        }
        parts = {
            "": model,
            "vision_tower_aux_1": CLIPVisionModel(clip),
            "vision_tower_aux_2": Dinov2Model(giant),
            **trunks,
        }
    return {
        name: {
            f"{'visual.trunk.' if name in trunks else ''}{key}": list(tensor.shape)
            for key, tensor in part.state_dict().items()
        }
        for name, part in parts.items()
    }


def main(clone: str, target: str) -> None:
    sys.path.insert(0, clone)
    torch.set_num_threads(1)
    data: dict[str, Any] = {}
    shapes = {}
    for case, keys in toy.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

            made = (
                (toy.CLIP, CLIPVisionModel, CLIPVisionConfig, toy.CLIP_CONFIG, "CLIP", 42),
                (toy.DINO, Dinov2Model, Dinov2Config, toy.DINO_CONFIG, "Bit", 32),
            )
            for name, model_class, config_class, config, kind, side in made:
                model_class(config_class(**config)).save_pretrained(home / name)
                shown = toy.OPENAI if kind == "CLIP" else toy.IMAGENET
                (home / name / "preprocessor_config.json").write_text(
                    json.dumps(toy.processor(kind, side, *shown))
                )
            before = Path.cwd()
            os.chdir(home)
            model, shapes[case] = build({**toy.CONFIG, **keys})
            os.chdir(before)
        for k, size in enumerate(toy.SIZES):
            found = sample(model, [toy.picture(k, size)], [toy.row(k, 9 + 2 * k)])
            data |= {f"{case}/s{k}.{name}": x for name, x in found.items()}
        two = sample(
            model,
            [toy.picture(k, toy.SIZES[k]) for k in (1, 3)],
            [toy.row(k, 9 + 2 * k) for k in (1, 3)],
        )
        data |= {f"{case}/batch.{name}": x for name, x in two.items()}
    if "full" not in sys.argv:
        data = {name: chosen(name, x) for name, x in data.items() if STORED.fullmatch(name)}
    full = json.dumps(published())
    np.savez_compressed(target, shapes=json.dumps(shapes), published=full, **data)


STORED = re.compile(r"samplers/batch\..*|connector/batch\.(sva_.|image_features)")
"""Names of what is stored, unless `full` is asked for behind the file's name."""


def chosen(name: str, x: np.ndarray) -> np.ndarray:
    """Of pixels and of many tokens every few."""
    if "pixel_values" in name:
        return x[:, :, 1::5, 1::5]
    return x[:, 1::5] if x.ndim == 3 and x.shape[1] == 144 else x


if __name__ == "__main__":
    main(*sys.argv[1:3])
