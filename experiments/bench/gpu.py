"""Encode, prefill and decode at published shapes, beside what the device could and transformers.

    python experiments/bench/gpu.py [--quick] --out=FILE.json

For one accelerator of 80 GB or more; weights are random, bfloat16. "roofline" rows compare with the
least time that the data sheet allows, so that their ratio is the share reached: of operations for
encode and prefill, of memory traffic for decode. transformers runs on the same GPU, where torch
sees one: SDPA, and for text a static cache and torch.compile.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part

import jax
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from converters.load import abstract, join
from experiments.bench.common import Row, arguments, interleaved, report, row
from experiments.tasks.chips import CHIPS, Chip
from experiments.tasks.shapes import llava, model_config
from vfjax import Batch, Model, Processor, encode, generate_ids
from vfjax.architectures import MLPConfig
from vfjax.model import ModelConfig
from vfjax.sharding import nbytes
from vfjax.vision.encoders import CLIPConfig

FULL = ("llava@vicuna-7b", "llava@llama-3-8b", "llava+dense-clip@llama-3-8b")
BATCHES = (1, 8)
WORDS = 128
STEPS = 64
REPEATS = 5
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "vfjax")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and transformers' of the same shapes.

    Attributes:
        name: of the shapes.
        model: random weights.
        processor: for its batches.
        vision: transformers' tower of its first branch.
        llm: transformers' LLM.
        steps: tokens that are decoded after the first.
    """

    name: str
    model: Model
    processor: Processor
    vision: Any
    llm: Any
    steps: int

    def batch(self, rows: int) -> Batch:
        """One picture and `WORDS` tokens of text a row, on the device."""
        rng = np.random.default_rng(0)
        pictures = list(rng.integers(0, 256, (rows, 336, 336, 3), np.uint8))
        ids = rng.integers(3, self.model.config.llm.vocab - 1, (rows, WORDS)).tolist()
        return jax.device_put(self.processor(pictures, input_ids=[[1, -200, *row] for row in ids]))


@dataclasses.dataclass(frozen=True)
class Least:
    """Seconds that the device needs at least."""

    encode: float
    prefill: float
    token: float


def main(args: argparse.Namespace) -> None:
    device = jax.devices()[0]
    chip = next((c for name, c in CHIPS.items() if name in device.device_kind.lower()), None)
    if chip is None:
        chip = CHIPS["h100"]
        print(f"{device.device_kind} is not in CHIPS: shares are of an H100")
    rows: list[Row] = []
    found: dict[tuple[str, int], tuple[dict[str, list[float]], Least]] = {}
    names, batches = (FULL[:1], (1,)) if args.quick else (FULL, BATCHES)
    for name in names:
        case = make_case(name, quick=args.quick)
        for b in batches:
            seconds = timed(case, b, 1 if args.quick else REPEATS)
            found[name, b] = seconds, least(case, b, chip)
            rows += figures(f"{name}, batch {b}", *found[name, b])
        del case
    if not args.quick:
        rows += [row for b in batches for row in fused(b, *(found[name, b] for name in FULL[1:]))]
    notes = {"device": device.device_kind, "words": WORDS, "steps": STEPS}
    report(rows, notes, PACKAGES, args.out)


def make_case(name: str, *, quick: bool) -> Case:
    """Random weights for both libraries; quick: narrow ones, float32."""
    config, dtype = model_config(name), "bfloat16"
    if quick:
        llm = dataclasses.replace(
            config.llm, vocab=320, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128
        )
        branch = llava(llm.width)
        path: Any = branch.architecture
        tower = dataclasses.replace(path.encoder, width=64, heads=2, mlp=128)
        connector = dataclasses.replace(path.connector, projector=MLPConfig(tower.width, llm.width))
        path = dataclasses.replace(path, encoder=tower, connector=connector)
        branch = dataclasses.replace(branch, architecture=path)
        config, dtype = ModelConfig((branch,), llm), "float32"
    processor = Processor(config, lengths=tuple(range(64, 8192, 64)))
    theirs = peers(config, getattr(torch, dtype))
    return Case(name, random_model(config, dtype), processor, *theirs, 4 if quick else STEPS)


def random_model(config: ModelConfig, dtype: str) -> Model:
    """A model drawn from normal(0.02), tensor by tensor on the default device."""
    draw = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1
    )
    graph, params = abstract(config.build)
    for i, (name, param) in enumerate(params.items()):
        params[name] = param.replace(draw(jax.random.key(i), param.shape))
    return join(graph, params)


def peers(config: ModelConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """The vision tower and LLM of transformers in the same shapes, where torch runs best."""
    tower, llm = config.branches[0].architecture.encoders["encoder"], config.llm
    assert isinstance(tower, CLIPConfig)
    sizes = transformers.LlamaConfig(
        vocab_size=llm.vocab,
        hidden_size=llm.width,
        intermediate_size=llm.mlp,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        max_position_embeddings=llm.context,
    )
    sight = transformers.CLIPVisionConfig(
        hidden_size=tower.width,
        intermediate_size=tower.mlp,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch,
    )
    models = []
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for build, its in (
            (transformers.CLIPVisionModel, sight),
            (transformers.LlamaForCausalLM, sizes),
        ):
            models.append(build._from_config(its, dtype=dtype, attn_implementation="sdpa").eval())
    return models[0], models[1]


def timed(case: Case, b: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of "encode", "prefill" and "token", and of the same of "peer ..."."""
    batch, more = case.batch(b), 1 + case.steps
    text = dataclasses.replace(encode(case.model, batch), labels=None)
    ids = torch.randint(3, case.llm.config.vocab_size - 1, (b, text.read), device=case.llm.device)
    pixels = torch.randn(b, 3, 336, 336, dtype=case.llm.dtype, device=case.llm.device)

    def peer_generate(n: int) -> None:
        with torch.inference_mode():
            case.llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",  # which transformers compiles, on a GPU
            )
            _wait()

    def peer_encode() -> None:
        with torch.inference_mode():
            case.vision(pixels)
            _wait()

    runs = {
        "encode": lambda: jax.block_until_ready(encode(case.model, batch).images),
        "peer encode": peer_encode,
    }
    for n in (1, more):
        runs[f"{n}"] = functools.partial(generate_ids, case.model, text, max_new_tokens=n)
        runs[f"peer {n}"] = functools.partial(peer_generate, n)
    found = {name: timing.rest for name, timing in interleaved(runs, repeats).items()}
    for who in ("", "peer "):
        first, long = found.pop(f"{who}1"), found.pop(f"{who}{more}")
        found[f"{who}prefill"] = first
        found[f"{who}token"] = [(b - a) / case.steps for a, b in zip(first, long, strict=True)]
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def least(case: Case, b: int, chip: Chip) -> Least:
    """By operations where many tokens are read at once, by memory where one is.

    A multiplication and an addition for each parameter and token; causal attention reads half of
    the pairs. A token reads all parameters but the table of embeddings, and the rows' cache.
    """
    model, llm = case.model, case.model.config.llm
    heads = llm.layers * llm.heads * llm.head_dim
    towers = 0.0
    for branch in model.config.branches:
        tower = branch.architecture.encoders["encoder"]
        assert isinstance(tower, CLIPConfig)
        n = tower.tokens + tower.prefix
        blocks = jax.tree.leaves(model.branches[branch.name])
        towers += 2 * n * sum(x.size for x in blocks) + 4 * n * n * tower.layers * tower.width
    t = 1 + WORDS + sum(branch.tokens for branch in model.config.branches)
    held = nbytes(model.llm) - nbytes(model.llm.embedding[...])
    item = model.llm.embedding.dtype.itemsize
    products = held / item - llm.vocab * llm.width  # the head reads the last token alone
    prefill = b * (2 * t * products + 2 * t * t * heads) + 2 * b * llm.vocab * llm.width
    kept = 2 * llm.layers * llm.kv_heads * llm.head_dim * item * b * (t + case.steps / 2)
    return Least(b * towers / chip.flops, prefill / chip.flops, (held + kept) / chip.bytes)


def figures(label: str, seconds: Mapping[str, list[float]], bound: Least) -> list[Row]:
    """Milliseconds of each, beside the roofline and transformers."""
    rows = []
    for what in ("encode", "prefill", "token"):
        ours = [1e3 * x for x in seconds[what]]
        limit = [1e3 * getattr(bound, what)]
        theirs = [1e3 * x for x in seconds[f"peer {what}"]]
        rows.append(row(f"{label}: {what}", ours, limit, "roofline", "ms"))
        rows.append(row(f"{label}: {what}", ours, theirs, "transformers", "ms"))
    return rows


def fused(
    b: int,
    one: tuple[Mapping[str, list[float]], Least],
    two: tuple[Mapping[str, list[float]], Least],
) -> list[Row]:
    """Two branches beside one, times what the tokens that they add imply."""
    rows = []
    for what in ("prefill", "token"):
        implied = getattr(two[1], what) / getattr(one[1], what)
        expected = [1e3 * implied * x for x in one[0][what]]
        ours = [1e3 * x for x in two[0][what]]
        rows.append(row(f"K=2, batch {b}: {what}", ours, expected, "K=1, more tokens", "ms"))
    return rows


if __name__ == "__main__":
    main(arguments(__doc__.splitlines()[0]))
