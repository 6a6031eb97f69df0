"""OpenCLIP's ConvNeXt against a twin in PyTorch and against recorded features of Mini-Gemini."""

import json
from collections import OrderedDict

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

import converters
from converters.registry import find
from tests.checkpoints import randomize, write_json
from tests.vfjax.vision.encoders.common import (
    assert_close,
    channels_first,
    pixels,
    products,
    published,
    run,
    spec,
)
from vfjax import InputError
from vfjax.vision.encoders import ConvNeXtConfig, convnext

DEPTHS, WIDTHS = (1, 2, 3, 1), (8, 12, 16, 24)
KIND = "open_clip_convnext"
TAPS = (0, 1, 2, 3)
WEIGHTS = "model.safetensors"


class ChannelNorm(nn.LayerNorm):
    """Over the channels of [n, d, h, w]."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        layers = {
            "fc1": nn.Linear(width, 4 * width),
            "act": nn.GELU(),
            "fc2": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        return x + (self.mlp(y) * self.gamma).permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, before: int, width: int, depth: int):
        super().__init__()
        self.downsample = nn.Sequential()
        if before:
            self.downsample.extend([ChannelNorm(before), nn.Conv2d(before, width, 2, stride=2)])
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.downsample(x))


class Twin(nn.Module):
    """Stem and stages under timm's names (timm/models/convnext.py)."""

    def __init__(self):
        super().__init__()
        first = WIDTHS[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, stride=4), ChannelNorm(first))
        befores = (0, *WIDTHS[:-1])
        self.stages = nn.ModuleList(map(Stage, befores, WIDTHS, DEPTHS))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> list[np.ndarray]:
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 2, 3, 1).numpy())
        return maps


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple:
    """A twin and ours, read from a file with its names, head and text half beside them."""
    path, twin = tmp_path_factory.mktemp("convnext"), randomize(Twin(), seed=4)
    state = {f"visual.trunk.{name}": x for name, x in twin.state_dict().items()}
    for name in ("visual.trunk.head.norm.weight", "visual.head.mlp.fc1.weight", "logit_scale"):
        state[name] = torch.ones(3)
    save_file(state, path / WEIGHTS)
    sizes = {"golden_depths": DEPTHS, "golden_dims": WIDTHS}
    write_json(
        path / "config.json",
        {"model_type": KIND, "timm_model_name": "convnext_large", "image_size": 64, **sizes},
    )
    return twin, converters.load_encoder(path)


@pytest.mark.parametrize("size", [(64, 64), (75, 102)], ids=str)
def test_every_stage(pair, size: tuple[int, int]):
    """The last size is no multiple of the strides."""
    twin, ours = pair
    x = pixels(2, *size)
    for k, found, expected in zip(TAPS, run(ours, x, TAPS), twin(channels_first(x)), strict=True):
        assert_close(found, expected, k)


def test_taps_in_any_order(pair):
    twin, ours = pair
    x, taps = pixels(1, 64, 64), (2, 0, -1, 2)
    expected = twin(channels_first(x))
    for tap, found in zip(taps, run(ours, x, taps), strict=True):
        assert_close(found, expected[tap], tap)


def test_nothing_is_computed_past_the_last_stage(pair):
    """A block has two products beside its sums, a stage but the first one convolution."""
    _, ours = pair
    x = pixels(1, 64, 64)
    for k in TAPS:
        assert products(ours, x, k) == 1 + k + 2 * sum(DEPTHS[: k + 1])


@pytest.mark.parametrize("taps", [(), (4,), (0, -5)], ids=str)
def test_bad_taps(pair, taps: tuple[int, ...]):
    with pytest.raises(InputError, match=r"taps: found .* expected at least one index"):
        pair[1](pixels(1, 64, 64), taps)


@pytest.mark.parametrize("case", ["mgm_plain", "mgm_hd"])
def test_recorded_features(shared, tmp_path, case: str):
    """Stages resized to the first one's size and joined on channels; limit of golden/README.md."""
    folder = shared / "golden" / case
    config = json.loads((folder / "vision_tower_aux_open_clip_config.json").read_text())
    write_json(tmp_path / "config.json", {"model_type": KIND, **config["model_cfg"]["vision_cfg"]})
    (tmp_path / WEIGHTS).symlink_to(folder / "vision_tower_aux.safetensors")
    ours = converters.load_encoder(tmp_path)
    recorded = load_file(folder / "outputs.safetensors")
    samples = json.loads((folder / "case.json").read_text())["samples"]
    for name, sample in samples.items():
        x = recorded[f"{name}.pixel_values_aux"].transpose(0, 2, 3, 1)
        maps = [channels_first(np.asarray(y)) for y in run(ours, x, TAPS)]
        size, stride = maps[0].shape[2:], sample["aux_stride"]
        assert list(size) == sample["aux_stage0_hw"]
        found = torch.cat([nn.functional.interpolate(y, size, mode="bilinear") for y in maps], 1)
        expected = recorded[f"{name}.aux_features_strided"]
        found = found[:, :, 1::stride, 1::stride].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", ["", "module."])
def test_published_file(shared, start: str):
    """Training with several processes leaves `module.` before the names."""
    model = spec(shared, "CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup")
    config = {"model_type": KIND, **model["config"]["vision_cfg"]}
    tensors = {start + name: tensor for name, tensor in model["files"]["model"].items()}
    ours, unread, count = published(config, tensors)
    assert ours == ConvNeXtConfig()
    parts = tuple(f"{start}visual.trunk.{part}." for part in ("stem", "stages"))
    assert unread == sorted(n for n in tensors if not n.startswith(parts))
    assert count == 196_227_264  # stem and stages of the published tower


def test_copy_inside_mini_gemini(shared):
    """The same tensors after a longer prefix, in a checkpoint of an LLM and two towers."""
    start = "model.vision_tower_aux.vision_"
    tensors = {
        name.removeprefix(start): tensor
        for file in spec(shared, "MGM-7B-HD")["files"].values()
        for name, tensor in file.items()
        if name.startswith(start)
    }
    config = {"model_type": KIND, "timm_model_name": "convnext_large", "image_size": 320}
    assert published(config, tensors) == (ConvNeXtConfig(), [], 196_227_264)


def test_unknown_size():
    table = find({"model_type": KIND}, "test")
    with pytest.raises(InputError, match="timm_model_name: found 'convnext_huge', expected .*tiny"):
        table.config({"timm_model_name": "convnext_huge"})


@pytest.mark.parametrize(
    ("shape", "side"), [((2, 9, 12, 8), 7), ((1, 3, 2, 4), 7), ((2, 5, 5, 3), 3)]
)
def test_depthwise_is_the_convolution_of_xla(shape: tuple[int, ...], side: int):
    """Values and gradients, also of maps smaller than the kernel."""
    x, kernel, seen = (
        jax.random.normal(jax.random.key(i), size)
        for i, size in enumerate([shape, (side, side, 1, shape[-1]), shape])
    )
    found, expected = (
        jax.vjp(jax.jit(f), x, kernel) for f in (convnext.depthwise, convnext.convolved)
    )
    for a, b in zip((found[0], *found[1](seen)), (expected[0], *expected[1](seen)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
