"""Models at published shapes on one GPU, beside what the device could and transformers.

    python experiments/bench/gpu.py [--quick] [--seconds=660] --out=FILE.json

For one accelerator of 80 GB or more; weights are random, bfloat16. The lines are run in the order
of their worth: encode, prefill and decode of a fused pair, then of its first member alone, a
training step with one, two and three encoders, merges on the device, LLaVA-1.5. The file is written
after each, and none is begun after `--seconds`.

"roofline" rows compare with the least time that the data sheet allows, so that their ratio is the
share reached: of operations for encode, prefill and training, of memory traffic for decode and
merges. transformers runs on the same GPU, where torch sees one: SDPA, and for text a static cache
and torch.compile.
"""

import argparse
import dataclasses
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its part

import jax
import numpy as np
import torch
import transformers
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from converters.load import abstract, join
from experiments.bench.common import Row, interleaved, report, row, save
from experiments.configs.train import ADAPTERS, CONNECTOR
from experiments.tasks.chips import CHIPS, Chip
from experiments.tasks.shapes import llava, model_config
from vfjax import Batch, Model, Processor, encode, generate_ids
from vfjax.architectures import MLPConfig
from vfjax.merge import merge_arrays
from vfjax.model import ModelConfig
from vfjax.sharding import AXES, nbytes
from vfjax.train import Group, LoRAConfig, Optim, add_lora, init, make_step, split
from vfjax.train.flops import step_flops
from vfjax.vision.encoders import CLIPConfig

PAIR, FIRST, OLD = "llava+dense-clip@llama-3-8b", "llava@llama-3-8b", "llava@vicuna-7b"
TRAINED = (FIRST, PAIR, "llava+dense-clip+dense-siglip@llama-3-8b")
"""Models of one, two and three encoders' branches."""

LINES = (
    "pair",
    "first member",
    *(f"training, {k} encoders" for k in (1, 2, 3)),
    "merges",
    "LLaVA-1.5",
)
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
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


@dataclasses.dataclass(frozen=True)
class Least:
    """Seconds that the device needs at least."""

    encode: float
    prefill: float
    token: float


Found = dict[tuple[str, int], tuple[dict[str, list[float]], Least]]
"""Name and rows -> seconds of each, and the least."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="models on one GPU, beside its data sheet")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=LINES, default=LINES, help="lines to run")
    parser.add_argument("--seconds", type=float, default=660, help="no line is begun after them")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    start, device = time.monotonic(), jax.devices()[0]
    chip = next((c for name, c in CHIPS.items() if name in device.device_kind.lower()), None)
    if chip is None:
        chip = CHIPS["h100"]
        print(f"{device.device_kind} is not in CHIPS: shares are of an H100")
    found: Found = {}
    model = functools.partial(bench_model, chip=chip, found=found, quick=args.quick)
    training = functools.partial(bench_training, chip=chip, quick=args.quick)
    runs: tuple[Callable[[], list[Row]], ...] = (
        lambda: model(PAIR),
        lambda: model(FIRST),
        *(functools.partial(training, name) for name in TRAINED),
        lambda: bench_merges(chip, quick=args.quick),
        lambda: model(OLD),
    )
    lines = {name: run for name, run in zip(LINES, runs, strict=True) if name in args.only}
    rows: list[Row] = []
    notes: dict[str, Any] = {"device": device.device_kind, "words": WORDS, "steps": STEPS}
    notes |= {"seconds of each line": {}, "not begun": list(lines)}
    for name, line in lines.items():
        begun = time.monotonic()
        if begun - start > args.seconds:
            break
        print(f"{begun - start:.0f} s: {name}", flush=True)
        rows += line()
        gc.collect()  # models and their owners refer to each other
        notes["seconds of each line"][name] = time.monotonic() - begun
        notes["not begun"].remove(name)
        save({"rows": rows}, notes, PACKAGES, args.out)
    report(rows, notes, PACKAGES, args.out)


def bench_model(name: str, chip: Chip, found: Found, *, quick: bool) -> list[Row]:
    """Encode, prefill and decode; of two branches beside one, where both were run."""
    case, rows = make_case(name, quick=quick), list[Row]()
    for b in (1,) if quick else BATCHES:
        seconds = timed(case, b, 1 if quick else REPEATS)
        found[name, b] = seconds, least(case, b, chip)
        rows += figures(f"{name}, batch {b}", *found[name, b])
        if (PAIR, b) in found and name == FIRST:
            rows += fused(b, found[FIRST, b], found[PAIR, b])
    return rows


def bench_training(name: str, chip: Chip, *, quick: bool) -> list[Row]:
    """A step of connectors and adapters of rank 16, each LLM block computed again in the backward
    pass, beside `vfjax.train.flops`, which does not count that.
    """
    config, dtype = sized(name, quick=quick)
    model = random_model(config, dtype)
    model.llm.remat = True
    add_lora(model, LoRAConfig(16, 32.0))
    groups = (Group(CONNECTOR, 1e-3), Group(ADAPTERS, 1e-3))
    graph, params, frozen = split(model, groups)
    tx = Optim(1000, warmup=0.0, schedule="constant").build(groups)
    state = init(params, tx, None)
    step = make_step(graph, tx, state, dtype=dtype)
    rows = 1 if quick else 8
    batch = sample(Processor(config, lengths=tuple(range(64, 8192, 64))), rows, labelled=True)
    batches = jax.tree.map(lambda x: x[None], batch)
    bound = [1e3 * step_flops(graph, params, frozen, batches) / chip.flops]

    def once() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batches)
        jax.block_until_ready(metrics)

    times = interleaved({"step": once}, 1 if quick else REPEATS)["step"].rest
    label = f"training, {len(config.branches)} encoders, {rows} rows"
    return [row(label, [1e3 * x for x in times], bound, "roofline", "ms")]


def bench_merges(chip: Chip, *, quick: bool) -> list[Row]:
    """Two members of eight layers of Llama-3-8B, merged where they lie.

    Beside the least traffic: both members and the base read once, the result written once.
    """
    width, mlp, layers = (64, 128, 1) if quick else (4096, 14336, 8)
    shapes = {"up_proj": (mlp, width), "down_proj": (width, mlp), "q_proj": (width, width)}
    mesh = Mesh(np.reshape(jax.devices()[:1], (1,) * len(AXES)), AXES)
    names = [f"model.layers.{i}.{name}.weight" for i in range(layers) for name in shapes]
    draw = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype("bfloat16"),
        static_argnums=1,
    )

    def weights(seed: int) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(names))
        sizes = [shapes[name.split(".")[3]] for name in names]
        with jax.set_mesh(mesh):
            return {n: draw(k, s) for n, k, s in zip(names, keys, sizes, strict=True)}

    base, members = weights(0), {"a": weights(1), "b": weights(2)}
    values, rows = sum(x.size for x in base.values()), []
    for method in METHODS:
        params: dict[str, Any] = {"weights": (0.5, 0.5)}
        if method.endswith("ties"):
            params["density"] = 0.5
        read = 3 if method == "linear" else 4  # and the one that is written
        reference = None if method == "linear" else base
        merge = functools.partial(merge_arrays, reference, members, method, params, mesh)
        run = functools.partial(waited, merge)
        times = interleaved({method: run}, 1 if quick else REPEATS)[method].rest
        bound = [1e3 * read * 2 * values / chip.bytes]
        rows.append(
            row(
                f"{method}, {values / 1e9:.1f} B", [1e3 * x for x in times], bound, "roofline", "ms"
            )
        )
    return rows


def waited(run: Callable[[], object]) -> None:
    """Runs it, until its arrays are there."""
    jax.block_until_ready(run())


def make_case(name: str, *, quick: bool) -> Case:
    """Random weights for both libraries."""
    config, dtype = sized(name, quick=quick)
    processor = Processor(config, lengths=tuple(range(64, 8192, 64)))
    theirs = peers(config, getattr(torch, dtype))
    return Case(name, random_model(config, dtype), processor, *theirs, 4 if quick else STEPS)


def sized(name: str, *, quick: bool) -> tuple[ModelConfig, str]:
    """A model's config and dtype; quick: narrow ones, as many branches of LLaVA, float32."""
    config, labels = model_config(name), name.partition("@")[0].split("+")
    llm, branches, dtype = config.llm, config.branches, "bfloat16"
    if quick:
        llm = dataclasses.replace(
            llm, vocab=320, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128
        )
        branch, dtype = llava(llm.width), "float32"
        path: Any = branch.architecture
        tower = dataclasses.replace(path.encoder, width=64, heads=2, mlp=128, layers=2)
        connector = dataclasses.replace(path.connector, projector=MLPConfig(tower.width, llm.width))
        path = dataclasses.replace(path, encoder=tower, connector=connector)
        branches = (dataclasses.replace(branch, architecture=path),) * len(branches)
    pairs = zip(branches, labels, strict=True)
    named = tuple(dataclasses.replace(branch, name=label) for branch, label in pairs)
    return ModelConfig(named, llm), dtype


def sample(processor: Processor, rows: int, *, labelled: bool = False) -> Batch:
    """One picture and `WORDS` tokens of text a row, on the device."""
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (rows, 336, 336, 3), np.uint8))
    words = rng.integers(3, processor.config.llm.vocab - 1, (rows, WORDS)).tolist()
    ids = [[1, -200, *row] for row in words]
    labels = [[-100, -100, *row] for row in words] if labelled else None
    return jax.device_put(processor(pictures, input_ids=ids, labels=labels))


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
    batch, more = sample(case.processor, b), 1 + case.steps
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
    main(arguments())
