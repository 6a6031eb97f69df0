"""Published sizes of LLMs and of members' branches, from their config.json files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from converters import open_source
from converters.files import hub
from converters.load import model_config as config_of
from vfjax import InputError
from vfjax.architectures import (
    Combine,
    Comm,
    COMMConfig,
    DeepMergersConfig,
    InternVL,
    Llava,
    MergeConfig,
    MergerConfig,
    MiniGemini,
    MiningConfig,
    MLPConfig,
    PixelShuffleConfig,
    ProjectorConfig,
    Qwen3VL,
    QwenVL,
    Slime,
    SliMEConfig,
    dense,
)
from vfjax.llm.llama import LlamaConfig
from vfjax.model import BranchConfig, ModelConfig
from vfjax.vision.encoders import (
    CLIPConfig,
    ConvNeXtConfig,
    DINOv2Config,
    InternViTConfig,
    QwenViTConfig,
    SigLIPConfig,
)
from vfjax.vision.images import ImageSpec

QWEN2_5 = LlamaConfig(152064, 3584, 28, 28, 4, 128, 18944, 32768, eps=1e-6, qkv_bias=True)
QWEN3 = LlamaConfig(151936, 4096, 36, 32, 8, 128, 12288, 40960, eps=1e-6, qk_norm=True)
LLMS = {
    # With M-RoPE, of which branches that don't place their tokens see nothing.
    "qwen2.5-7b": dataclasses.replace(
        QWEN2_5, rope_theta=1e6, rope_axes=(0,) * 16 + (1,) * 24 + (2,) * 24
    ),
    "qwen3-8b": dataclasses.replace(
        QWEN3, rope_theta=1e6, rope_axes=tuple(i % 3 if i < 60 else 0 for i in range(64))
    ),
    "vicuna-7b": LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, 4096),
    "vicuna-13b": LlamaConfig(32000, 5120, 40, 40, 40, 128, 13824, 4096),
    "llama-3-8b": LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, 8192, rope_theta=5e5),
    "llama-3-70b": LlamaConfig(128256, 8192, 80, 64, 8, 128, 28672, 8192, rope_theta=5e5),
}

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def images(size: int) -> ImageSpec:
    """Pictures of a side; what they hold does not matter here."""
    return ImageSpec(size, size, "shortest", "pad", MEAN, STD)


def llava(dout: int) -> BranchConfig:
    clip = CLIPConfig()
    connector = ProjectorConfig(MLPConfig(clip.width, dout))
    return BranchConfig("llava", Llava(clip, connector, images(336)))


def dense_clip(dout: int) -> BranchConfig:
    clip = CLIPConfig()
    combine = dense("dci", clip.layers, -2)
    connector = ProjectorConfig(MLPConfig(combine.width(clip.width), dout), combine)
    return BranchConfig("dense", Llava(clip, connector, images(336)))


def dense_siglip(dout: int) -> BranchConfig:
    siglip = SigLIPConfig()
    combine = dense("dci", siglip.layers - 1, 26, drop=0)
    connector = ProjectorConfig(MLPConfig(combine.width(siglip.width), dout), combine)
    return BranchConfig("dense", Llava(siglip, connector, images(384)))


def comm(dout: int) -> BranchConfig:
    clip, dino = CLIPConfig(), DINOv2Config(input_size=336)
    connector = COMMConfig(
        MergeConfig(clip.width, tuple(range(1, 25))),
        dout,
        MergeConfig(dino.width, tuple(range(19, 25)), blocks=1),
    )
    path = Comm(clip, connector, images(336), dino, images_aux=images(336))
    return BranchConfig("comm", path)


def mgm(dout: int) -> BranchConfig:
    clip, aux = CLIPConfig(), ConvNeXtConfig(image_size=768)
    connector = MiningConfig(MLPConfig(clip.width, dout), clip.width, sum(aux.widths))
    return BranchConfig("mgm", MiniGemini(clip, connector, images(768), aux, size=336))


def slime(dout: int) -> BranchConfig:
    clip = CLIPConfig()
    connector = SliMEConfig(MLPConfig(clip.width, dout), clip.width)
    return BranchConfig("slime", Slime(clip, connector, images(336)))


def internvl(dout: int) -> BranchConfig:
    """Of InternVL3 and 3.5 around 8B."""
    vit = InternViTConfig()
    connector = PixelShuffleConfig(MLPConfig(4 * vit.width, dout), Combine(((-1,),), drop=1))
    return BranchConfig("internvl", InternVL(vit, connector, images(448)))


def native(unit: int, least: int, most: int) -> ImageSpec:
    """Pictures of about their own size, sides multiples of `unit` pixels."""
    return ImageSpec(unit, unit, "native", "crop", MEAN, STD, pixels=(least, most))


def qwen2_5_vl(dout: int) -> BranchConfig:
    vit = QwenViTConfig(1280, 32, 16, 3420, act="silu", gated=True, window=4, full=(7, 15, 23, 31))
    spec = native(28, 3136, 12845056)
    path = QwenVL(vit, MergerConfig(vit.width, dout, rms=True), spec, spec, 151652, 151653)
    return BranchConfig("qwen2.5-vl", path)


def qwen3_vl(dout: int) -> BranchConfig:
    vit = QwenViTConfig(1152, 27, 16, 4304, patch=16, act="gelu_pytorch_tanh", side=48)
    connector = DeepMergersConfig(vit.width, dout, layers=(8, 16, 24))
    spec = native(32, 65536, 16777216)
    return BranchConfig("qwen3-vl", Qwen3VL(vit, connector, spec, spec, 151652, 151653))


BRANCHES: dict[str, Callable[[int], BranchConfig]] = {
    "llava": llava,
    "dense-clip": dense_clip,
    "dense-siglip": dense_siglip,
    "comm": comm,
    "mgm": mgm,
    "slime": slime,
    "internvl": internvl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
}


def model_config(name: str) -> ModelConfig:
    """The config of "branch+branch@llm", or of a checkpoint's folder or name on the hub.

    Raises:
        InputError: an unknown branch or LLM; a folder that `converters.load` does not read.
    """
    if Path(name).is_dir() or hub.parse(name):
        return config_of(open_source(name))
    branches, at, llm = name.partition("@")
    names = [(llm, list(LLMS)), *((b, list(BRANCHES)) for b in branches.split("+"))]
    for part, known in names:
        if not at or part not in known:
            raise InputError(
                "config.model",
                found=repr(part if at else name),
                expected="a folder, a name on the hub, or branch+branch@llm, of "
                f"{', '.join(BRANCHES)} and {', '.join(LLMS)}",
                fix="correct it",
            )
    config = LLMS[llm]
    return ModelConfig(tuple(BRANCHES[b](config.width) for b in branches.split("+")), config)
