"""The family's vision encoders, of which some see what others miss.

`train_clip` trains as CLIP (arXiv 2103.00020) against captions that name each object's colour and
digit but no place: a vision transformer, which in the time there is learns colours and hardly any
digits, the same at a higher resolution, and a ConvNeXt, Mini-Gemini's second encoder. `train_dino`
has DINOv2's architecture (arXiv 2304.07193) but is NOT trained by self-distillation: it is
supervised, each patch predicts the digit of its cell, with colours scrambled.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from converters.export import to_bytes
from converters.files.writer import write_folder
from converters.load import flatten
from converters.registry import find
from converters.towers import tower_files
from experiments.family.optim import fit
from experiments.family.scenes import COLOURS, SIZE, Scenes
from vfjax.vision.encoders import ConvNeXt, ViT

Array = jax.Array
Cells = TypeVar("Cells", Array, np.ndarray)
Report = Callable[[str], object]
PATCH, GRID = 8, 6
WIDTH = 96

CLIP: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": PATCH,
    "image_size": SIZE,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
FINE: dict[str, Any] = {**CLIP, "image_size": 72}  # 81 tokens of the same pictures
CONVNEXT: dict[str, Any] = {
    "model_type": "open_clip_convnext",
    "timm_model_name": "convnext_tiny",
    "image_size": SIZE,
    "golden_depths": [1, 1, 2, 1],
    "golden_dims": [32, 64, 96, 128],
}
CLIP_IMAGES: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
FINE_IMAGES = {
    **CLIP_IMAGES,
    "size": {"shortest_edge": FINE["image_size"]},
    "crop_size": {"height": FINE["image_size"], "width": FINE["image_size"]},
}
DINO: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "mlp_ratio": 3,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": PATCH,
    "image_size": SIZE,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "torch_dtype": "float32",
}
DINO_IMAGES: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def new(config: dict[str, Any], seed: int) -> nnx.Module:
    """An untrained tower: flax's default weights, places as sines, whole layer scales."""
    build = find(config, "encoder").config(config).build
    tower = nnx.jit(lambda: build(rngs=nnx.Rngs(seed)))()  # op by op it takes ten times as long
    if isinstance(tower, ConvNeXt):
        for stage in tower.stages:
            for block in stage.blocks:
                block.gamma.set_value(jnp.ones_like(block.gamma[...]))
        return tower
    places = np.zeros(tower.pos.shape, np.float32)
    places.reshape(-1, WIDTH)[1:] = sines(config["image_size"] // PATCH)
    tower.pos.set_value(jnp.asarray(places))
    for block in tower.blocks:
        if block.layer_scale:
            block.scale1.set_value(jnp.ones(WIDTH))
            block.scale2.set_value(jnp.ones(WIDTH))
    return tower


def sines(grid: int) -> np.ndarray:
    """Sines and cosines of row and column, float32[grid * grid, 96].

    As in MoCo v3 (arXiv 2104.02057), in units of a grid of six.
    """
    row, column = np.divmod(np.arange(grid * grid), grid)
    speed = 2 * np.pi / np.geomspace(2.5, 24, WIDTH // 4) * GRID / grid
    angles = np.concatenate([row[:, None] * speed, column[:, None] * speed], axis=1)
    return 0.5 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def pixels(pictures: Array | np.ndarray, images: dict[str, Any], side: int = SIZE) -> Array:
    """uint8 or float (0 to 255) [n, 48, 48, 3] -> what the tower is fed, float32 of `side`."""
    mean, std = (jnp.asarray(images[key], jnp.float32) for key in ("image_mean", "image_std"))
    x = jnp.asarray(pictures, jnp.float32) / 255
    if side != SIZE:
        x = jax.image.resize(x, (len(x), side, side, 3), "cubic").clip(0, 1)
    return (x - mean) / std


def cells(values: Cells) -> Cells:
    """[n, 9] of cells -> [n, 36] of patches, of NumPy or JAX."""
    grid = values.reshape(-1, 3, 3)
    return grid.repeat(2, axis=1).repeat(2, axis=2).reshape(len(values), -1)


class Captions(nnx.Module):
    """A caption's embedding: a set of (colour, digit) pairs, as an MLP of their MLPs' sum."""

    def __init__(self, width: int, tower: int, *, rngs: nnx.Rngs):
        self.pair = nnx.Linear(len(COLOURS) + 10, 2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, width, rngs=rngs)
        self.tower = nnx.Linear(tower, width, rngs=rngs)  # projects what the picture is
        self.scale = nnx.Param(jnp.log(10.0))

    def __call__(self, digits: Array, colours: Array) -> Array:
        """int[n, 9] twice, -1 where empty -> float32[n, width]."""
        one = [jax.nn.one_hot(colours, len(COLOURS)), jax.nn.one_hot(digits, 10)]
        pairs = jax.nn.gelu(self.pair(jnp.concatenate(one, axis=-1)))
        return self.out((pairs * (digits >= 0)[..., None]).sum(axis=1))


def train_clip(
    scenes: Scenes,
    *,
    config: dict[str, Any] = CLIP,
    steps: int = 400,
    batch: int = 128,
    rate: float = 4e-3,
    seed: int = 0,
    report: Report = print,
) -> nnx.Module:
    """A tower (CLIP, FINE, CONVNEXT) trained by InfoNCE on scenes and captions without places."""
    width = config["golden_dims"][-1] if config is CONVNEXT else WIDTH
    pair = nnx.List([new(config, seed), Captions(64, width, rngs=nnx.Rngs(seed + 1))])
    graph, params = nnx.split(pair)

    def loss(params: nnx.State, data: tuple[Array, Array, Array]) -> Array:
        pictures, digits, colours = data
        both: Any = nnx.merge(graph, params)
        tower, captions = both
        x = pixels(pictures, CLIP_IMAGES, config["image_size"])
        if config is CONVNEXT:
            whole = tower(x, [-1])[0].mean(axis=(1, 2))
        else:
            whole = tower(x, [-1], norm=True)[0][:, 0]  # the class token
        seen, told = captions.tower(whole), captions(digits, colours)
        seen, told = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (seen, told))
        scores = seen @ told.T * jnp.exp(captions.scale[...])
        own = jnp.arange(len(scores))
        pair = optax.softmax_cross_entropy_with_integer_labels
        return (pair(scores, own) + pair(scores.T, own)).mean() / 2

    params = fit(
        params,
        loss,
        _batches(scenes, batch, seed),
        steps=steps,
        rate=rate,
        every=min(25, steps),
        report=lambda line: report(f"clip: {line}"),
    )
    return nnx.merge(graph, params)[0]


def train_dino(
    scenes: Scenes,
    *,
    steps: int = 600,
    batch: int = 96,
    rate: float = 4e-3,
    seed: int = 0,
    report: Report = print,
) -> nnx.Module:
    """A DINOv2 tower trained with labels: each patch tells its cell's digit, or that it is empty.

    The loss is taken at the last two layers, since LLaVA reads the last but one. Empty cells weigh
    a third. Channels are mixed at random, every other picture is grey.
    """
    heads = [nnx.Linear(WIDTH, 11, rngs=nnx.Rngs(seed + i)) for i in (1, 2)]
    graph, params = nnx.split(nnx.List([new(DINO, seed), *heads]))

    def loss(params: nnx.State, data: tuple[Array, ...]) -> Array:
        pictures, digits, _, mix = data
        tower, *heads = nnx.merge(graph, params)
        mixed = jnp.einsum("nyxc,ncd->nyxd", pictures.astype(jnp.float32), mix)
        states = tower(pixels(mixed, DINO_IMAGES), [-1, -2], norm=True)
        target = cells(digits) % 11  # -1, empty, is class 10
        weight = jnp.where(target == 10, 0.3, 1.0)
        total = jnp.zeros(())
        for state, head in zip(states, heads, strict=True):
            losses = optax.softmax_cross_entropy_with_integer_labels(head(state[:, 1:]), target)
            total += (losses * weight).sum() / weight.sum()
        return total / 2

    def mixed(first: int, count: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([seed, first, 1])
        return *plain(first, count), mixes(count * batch, rng).reshape(count, batch, 3, 3)

    plain = _batches(scenes, batch, seed)
    params = fit(
        params,
        loss,
        mixed,
        steps=steps,
        rate=rate,
        every=min(25, steps),
        report=lambda line: report(f"dino: {line}"),
    )
    return nnx.merge(graph, params)[0]


def mixes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random colour maps float32[n, 3, 3]: near the identity, or to grey."""
    mix = np.eye(3) + rng.normal(0, 0.4, (count, 3, 3))
    grey = np.repeat(rng.dirichlet(np.ones(3), count)[..., None], 3, axis=2)
    return np.where(rng.random((count, 1, 1)) < 0.5, grey, mix).astype(np.float32)


def _batches(scenes: Scenes, batch: int, seed: int) -> Callable[[int, int], tuple[np.ndarray, ...]]:
    """Random batches of scenes: (first step, count) -> pictures, digits, colours, stacked."""

    def draw(first: int, count: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([seed, first])
        rows = rng.integers(len(scenes), size=(count, batch))
        return scenes.pictures[rows], scenes.digits[rows], scenes.colours[rows]

    return draw


def features(
    tower: nnx.Module, pictures: np.ndarray, images: dict[str, Any], tap: int = -2
) -> np.ndarray:
    """Patches' hidden states float32[n, 36, 96] at a tap of pictures uint8[n, 48, 48, 3]."""
    parts = [
        _patches(tower, pixels(pictures[i : i + 250], images), tap)
        for i in range(0, len(pictures), 250)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


@functools.partial(jax.jit, static_argnames="tap")
def _patches(tower: ViT, shown: Array, tap: int) -> Array:
    return tower(shown, [tap])[0][:, -GRID * GRID :]


def probe(train: np.ndarray, target: np.ndarray, test: np.ndarray, right: np.ndarray) -> float:
    """Accuracy of a linear probe (ridge regression to one-hot labels) on features [n, d]."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    x, y = ((np.c_[(a - mean) / std, np.ones(len(a))]).astype(np.float64) for a in (train, test))
    gram = x.T @ x + 1e-3 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ np.eye(target.max() + 1)[target])
    return float(((y @ weights).argmax(axis=1) == right).mean())


def probes(
    tower: nnx.Module, images: dict[str, Any], train: Scenes, test: Scenes, tap: int = -2
) -> dict[str, float]:
    """Linear probes of patches: digit and colour (of occupied cells), occupied, and which patch."""
    seen = [features(tower, s.pictures, images, tap) for s in (train, test)]
    labels = {
        "digit": [cells(s.digits) for s in (train, test)],
        "colour": [cells(s.colours) for s in (train, test)],
    }
    full = [d >= 0 for d in labels["digit"]]
    everywhere = [np.ones_like(f) for f in full]
    labels["occupied"] = [f.astype(int) for f in full]
    labels["patch"] = [np.broadcast_to(np.arange(GRID * GRID), f.shape) for f in full]
    out = {}
    for name, (known, right) in labels.items():
        mask = full if name in ("digit", "colour") else everywhere
        data = (seen[0][mask[0]], known[mask[0]], seen[1][mask[1]], right[mask[1]])
        out[name] = probe(*data)
    return out


def save(tower: nnx.Module, config: dict[str, Any], images: dict[str, Any], folder: Path) -> None:
    """Writes a tower as a Hugging Face folder, or OpenCLIP's: config, weights, preprocessor.

    Raises:
        InputError: `folder` exists.
    """
    params = flatten(nnx.split(tower)[1])
    table = find(config, str(folder))
    prefix = {"clip_vision_model": "vision_model.", "open_clip_convnext": "visual.trunk."}
    start = prefix.get(config["model_type"], "")
    tensors = {
        start + rule.source: rule.to_source(np.asarray(params[name].get_value()))
        for name, rule in table.match({name: p.shape for name, p in params.items()}).items()
    }
    record = tower_files(config, images)
    files = {name: to_bytes(content) for name, content in record.items()}
    write_folder(folder, {"": tensors}, files=files)
