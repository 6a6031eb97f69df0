"""Checkpoint folders with random weights, written by PyTorch and transformers, for tests.

A builder makes the folder as the published repositories have it and returns the torch modules that
it wrote, in evaluation mode, as the reference. Sizes are tiny unless overridden by the keys of the
Hugging Face config; every weight is drawn from `seed`.
"""

import copy
import dataclasses
import json
import math
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.initialization import no_init_weights

from converters.files.reader import DTYPES

transformers.utils.logging.disable_progress_bar()

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "layer_norm_eps": 1e-3,
}
"""16 patches a picture; not the default `layer_norm_eps`, so that a lost one shows."""

SIGLIP = {**CLIP, "hidden_size": 24, "layer_norm_eps": 2e-3}

DINOV2 = {
    "hidden_size": 32,
    "mlp_ratio": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 35,
    "patch_size": 7,
    "layer_norm_eps": 1e-3,
}
"""A position table of 5 x 5, fed 28 pixels, which is 4 x 4, by `preprocessor`."""

LLAMA = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
}

TOWERS = {
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, CLIP),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, SIGLIP),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, DINOV2),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
        DINOV2,
    ),
}
"""Kind of vision tower -> config class, model class, tiny sizes."""

IMAGE_TOKEN = 319
"""`image_token_index` of `hf_llava_folder`: the last id of the tiny vocabulary."""


@dataclasses.dataclass
class Member:
    """The torch modules of an MLLM that is not one class of transformers."""

    tower: nn.Module
    connector: nn.Sequential
    llm: transformers.LlamaForCausalLM


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Draws all parameters such that each one moves the output; evaluation mode.

    Matrices keep the variance of their input, scales of norms and layers are about one, biases are
    not zero.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if p.ndim > 1:
            p.copy_(noise * (p[0].numel() if p.ndim == 4 else p.shape[-1]) ** -0.5)
        else:
            scale = name.endswith((".weight", ".lambda1"))
            p.copy_(0.2 * noise + (1.0 if scale else 0.0))
    return module.eval()


@torch.no_grad()
def tuned(llm: transformers.LlamaForCausalLM, seed: int, size: float = 0.1) -> nn.Module:
    """A copy as fine-tuning leaves it: every weight moved by `size` of its spread."""
    llm, rng = copy.deepcopy(llm), torch.Generator().manual_seed(seed)
    for p in llm.parameters():
        p.add_(size * p.std() * torch.randn(p.shape, generator=rng))
    return llm


def make_tower(kind: str, seed: int, **config: Any) -> nn.Module:
    """A vision tower of `TOWERS`."""
    config_class, model_class, sizes = TOWERS[kind]
    with no_init_weights():
        tower = model_class(config_class(**{**sizes, **config}))
    return randomize(tower, seed)


def text_config(**config: Any) -> transformers.PretrainedConfig:
    """A tiny decoder's config, of Llama or of another `model_type`."""
    return transformers.AutoConfig.for_model(**{"model_type": "llama", **LLAMA, **config})


def make_llama(seed: int, **config: Any) -> transformers.LlamaForCausalLM:
    """A decoder; of another kind if `model_type` says so."""
    with no_init_weights():
        llm = transformers.AutoModelForCausalLM.from_config(text_config(**config))
    llm.tie_weights()  # left out with the rest of the initialisation
    return randomize(llm, seed)


def make_connector(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Linear layers from each size to the next, GELU between: LLaVA's `mlpNx_gelu`."""
    layers: list[nn.Module] = []
    for i, (din, dout) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.GELU()] * (i > 0) + [nn.Linear(din, dout)]
    return randomize(nn.Sequential(*layers), seed)


def preprocessor(config: transformers.PretrainedConfig) -> dict[str, Any]:
    """preprocessor_config.json of a tower, with the keys that the published ones have."""
    size = config.image_size
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    if config.model_type == "siglip_vision_model":
        return common | {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": size, "width": size},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    common |= {"do_center_crop": True, "do_convert_rgb": True}
    if config.model_type == "clip_vision_model":
        return common | {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    return common | {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def tower_folder(path: Path, kind: str, seed: int = 0, **config: Any) -> nn.Module:
    """A vision tower's own repository: weights, config.json, preprocessor_config.json."""
    tower = make_tower(kind, seed, **config)
    tower.save_pretrained(path)
    write_json(path / "preprocessor_config.json", preprocessor(tower.config))
    return tower


def llama_folder(
    path: Path,
    seed: int = 0,
    *,
    llm: transformers.LlamaForCausalLM | None = None,
    **config: Any,
) -> transformers.LlamaForCausalLM:
    """A causal LM with its tokenizer; `llm` is written in place of a new one."""
    llm = llm or make_llama(seed, **config)
    llm.save_pretrained(path)
    tokenizer_files(path)
    return llm


def hf_llava_folder(
    path: Path,
    seed: int = 0,
    *,
    kind: str = "clip",
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **config: Any,
) -> transformers.LlavaForConditionalGeneration:
    """Transformers' LLaVA as its save_pretrained writes it.

    Args:
        path: folder to make.
        seed: of the weights.
        kind: of the tower, see `TOWERS`.
        vision: keys of the tower's config.
        text: keys of the LLM's config.
        config: keys of LlavaConfig, as vision_feature_layer.
    """
    config_class, _, sizes = TOWERS[kind]
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=config_class(**{**sizes, **(vision or {})}),
            text_config=text_config(**(text or {})),
            **{"image_token_index": IMAGE_TOKEN} | config,
        )
    )
    randomize(model, seed).save_pretrained(path)
    write_json(path / "preprocessor_config.json", preprocessor(model.config.vision_config))
    tokenizer_files(path)
    return model


NEXT_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
"""Canvases of `CLIP`'s tiles, in the order of the published ones."""


def llava_next_folder(
    path: Path, seed: int = 0, *, text: Mapping[str, Any] | None = None, **config: Any
) -> transformers.LlavaNextForConditionalGeneration:
    """Transformers' LLaVA-1.6 as its save_pretrained writes it."""
    model = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP),
            text_config=text_config(**(text or {})),
            **{"image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": NEXT_PINPOINTS} | config,
        )
    )
    randomize(model, seed).save_pretrained(path)
    transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=NEXT_PINPOINTS,
    ).save_pretrained(path)
    tokenizer_files(path)
    return model


def upstream_llava_folder(
    path: Path,
    seed: int = 0,
    *,
    llm: transformers.LlamaForCausalLM | None = None,
    tower: str | Path = "vision_tower",
    weights: str = "bin",
    tensors: Mapping[str, torch.Tensor] | None = None,
    vision: Mapping[str, Any] | None = None,
    **config: Any,
) -> Member:
    """LLaVA-1.5 as its authors publish it: LLM and projector in one file, the tower named.

    Args:
        path: folder to make.
        seed: of the weights.
        llm: written in place of a new one.
        tower: the folder that `mm_vision_tower` names. The default one is made inside `path`, where
            the loader looks first; another must be there already, as `tower_folder` makes it.
        weights: "bin" or "safetensors".
        tensors: more tensors for the file, as a tuned tower under `model.vision_tower.`.
        vision: keys of the tower's config, if it is made here.
        config: more keys of config.json.
    """
    if tower == "vision_tower":
        encoder = tower_folder(path / tower, "clip", seed, **(vision or {}))
    else:
        encoder = transformers.CLIPVisionModel.from_pretrained(tower).eval()
    llm = llm or make_llama(seed + 1)
    width = llm.config.hidden_size
    connector = make_connector((encoder.config.hidden_size, width, width), seed + 2)
    state = {
        **published(llm),
        **{f"model.mm_projector.{name}": x for name, x in connector.state_dict().items()},
        **(tensors or {}),
    }
    own = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": encoder.config.hidden_size,
        "image_aspect_ratio": "pad",
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_padding_side": "right",
        "rope_scaling": None,
    }
    text = llm.config.to_dict()
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]  # as before transformers 5
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", text | own | config)
    if weights == "bin":
        torch.save(state, path / "pytorch_model.bin")
    else:
        save_file(state, path / "model.safetensors", {"format": "pt"})
    tokenizer_files(path)
    return Member(encoder, connector, llm)


def fused_folder(
    path: Path,
    llm: transformers.LlamaForCausalLM,
    branches: Mapping[str, tuple[nn.Module, nn.Sequential, Mapping[str, Any]]],
) -> None:
    """Vfjax's own folder.

    Args:
        path: folder to make.
        llm: under the standard names.
        branches: name -> tower, connector and how they are used: `taps`, hidden states that are
            joined on channels; `drop`, leading tokens that are left out; `aspect`; perhaps
            `code`, as in config.json.
    """
    state, entries = published(llm), []
    for name, (tower, connector, entry) in branches.items():
        start = f"branches.{name}"
        state |= {f"{start}.encoder.{k}": x for k, x in published(tower).items()}
        state |= {f"{start}.connector.{k}": x for k, x in connector.state_dict().items()}
        entries.append(
            {
                "name": name,
                "encoder": tower.config.to_dict(),
                "preprocessor": preprocessor(tower.config),
                "aspect": entry["aspect"],
                **{key: entry[key] for key in ("code",) if key in entry},
                "connector": {
                    "model_type": "mlp",
                    "mm_projector_type": f"mlp{(len(connector) + 1) // 2}x_gelu",
                    "din": connector[0].in_features,
                    "dout": connector[-1].out_features,
                    "groups": [[tap] for tap in entry["taps"]],
                    "drop": entry["drop"],
                },
            }
        )
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    write_json(
        path / "config.json",
        {
            "architectures": ["VisionFuse"],
            "model_type": "visionfuse",
            "text_config": llm.config.to_dict(),
            "branches": entries,
            "template": "vicuna_v1",
            "recipe": {},
        },
    )
    tokenizer_files(path)


@torch.no_grad()
def reference_logits(
    llm: transformers.LlamaForCausalLM,
    branches: Mapping[str, tuple[nn.Module, nn.Sequential, Mapping[str, Any]]],
    ids: Sequence[int],
    pixels: Mapping[str, np.ndarray],
) -> np.ndarray:
    """What a fused model must say, put together from torch's modules alone.

    Args:
        llm: reads text and visual tokens.
        branches: as for `fused_folder`.
        ids: one row, -200 at each picture.
        pixels: branch -> float32[n, h, w, 3], the row's pictures.

    Returns:
        float32[t, vocab], t with the visual tokens.
    """
    embed = llm.get_input_embeddings()
    scale = getattr(embed, "embed_scale", 1.0)  # Gemma's
    pictures: list[list[torch.Tensor]] = []
    for name, (tower, connector, entry) in branches.items() if -200 in ids else ():
        x = torch.from_numpy(np.moveaxis(pixels[name], -1, 1).copy())
        states = tower(x, output_hidden_states=True).hidden_states
        kept = [states[tap][:, entry["drop"] :] for tap in entry["taps"]]
        tokens = connector(torch.cat(kept, dim=-1))
        pictures.append(list(tokens * scale if entry.get("code") != "transformers" else tokens))
    parts, seen = [], 0
    for token in ids:
        if token == -200:
            parts += [branch[seen] for branch in pictures]
            seen += 1
        else:
            parts.append(embed(torch.tensor([token])))
    return llm(inputs_embeds=torch.cat(parts)[None]).logits[0].numpy()


def header_file(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """A safetensors file whose data is a hole: any size, no bytes on the disk, all zeros.

    Args:
        path: file to make.
        tensors: name -> safetensors dtype and shape.
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def tokenizer_files(path: Path) -> None:
    """A byte-level tokenizer of 259 ids with Llama's special ones; every text survives it."""
    words = ["<unk>", "<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    vocab = {word: i for i, word in enumerate(words)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)


def published(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors under their names on disk, which transformers 5 no longer uses in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))


def changed(folder: Path, place: Path, file: str, changes: dict) -> Path:
    """A folder of links to the files of `folder`, with other keys in one JSON file."""
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).symlink_to(path)
    whole = json.loads((folder / file).read_text()) | changes
    (place / file).unlink()
    write_json(place / file, whole)
    return place
