"""A LLaVA loaded and run by vfjax and by transformers: same folder, float32, as many threads.

    python experiments/bench/basic.py [--quick] --out=FILE.json

Weights are random; sizes are those of CLIP ViT-L/14 at 336 pixels and of a Llama of 12 layers.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import converters
from converters.load import abstract, flatten, join
from experiments.bench.common import Row, arguments, cores, forget, interleaved, report, row
from vfjax import Batch, InputError, Model, Processor, forward, generate_ids
from vfjax.architectures import Inputs

Notes = dict[str, Any]

STEPS = 32
"""Tokens that a decode is timed over, after the first."""

MANY = 8
"""Rows of a batch, beside one."""

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "vfjax")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is built, the text tokens of a prompt, and how often each run is timed."""

    vision: dict[str, int]
    text: dict[str, int]
    words: int
    repeats: int


FULL = Sizes(
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    text={
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    words=60,
    repeats=5,
)

QUICK = Sizes(
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    text={
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    words=12,
    repeats=2,
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model in both libraries, and what it is asked.

    Attributes:
        model: ours.
        processor: its processor.
        peer: transformers' model of the same folder.
        picture: the picture.
        words: ids of the prompt's text.
        repeats: how often each run is timed.
    """

    model: Model
    processor: Processor
    peer: transformers.LlavaForConditionalGeneration
    picture: Image.Image
    words: list[int]
    repeats: int

    def batch(self, rows: int = 1) -> Batch:
        """Our inputs, equal rows: the picture, then the words."""
        return self.processor([self.picture] * rows, input_ids=[[1, -200, *self.words]] * rows)

    def pixels(self, rows: int = 1) -> torch.Tensor:
        """The picture as our processor makes it, in torch's layout."""
        (seen,) = self.batch(rows).images.values()
        assert isinstance(seen.given, Inputs)
        pixels = seen.given.pixels
        return torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2).contiguous()

    def peer_inputs(self) -> dict[str, torch.Tensor]:
        """Transformers' inputs: the picture, then the words."""
        (branch,) = self.model.config.branches
        marks = [self.peer.config.image_token_id] * branch.tokens
        ids = torch.tensor([[1, *marks, *self.words]])
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": self.pixels()}


def main(args: argparse.Namespace) -> None:
    """Measures everything, prints the table, writes the file."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(cores())
    sizes = QUICK if args.quick else FULL
    notes: Notes = dataclasses.asdict(sizes)
    notes |= {"threads": cores(), "load average before": os.getloadavg()[0], "first call": {}}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        write_folder(folder, sizes)
        rows = bench_load(folder, sizes.repeats)
        pair = make_pair(folder, sizes)
        notes["largest difference of logits, as a share"] = check(pair)
        for bench in BENCHES:
            rows += bench(pair, notes)
    report(rows, notes, PACKAGES, args.out)


def write_folder(folder: Path, sizes: Sizes) -> None:
    """A LLaVA as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes.vision),
        text_config=transformers.LlamaConfig(**sizes.text),
        image_token_index=sizes.text["vocab_size"] - 1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = sizes.vision["image_size"]
    crop = {"height": size, "width": size}
    images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "crop_size": crop}))


def load_ours(folder: Path) -> tuple[Model, Processor]:
    """Our model, on the device."""
    return jax.block_until_ready(converters.load(folder, dtype="float32"))


def load_peer(folder: Path) -> transformers.LlavaForConditionalGeneration:
    """Transformers' model, in memory: it only maps the file, so a value of each page is read."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for tensor in model.parameters():
        tensor.flatten()[::1024].sum()
    return model.eval()


def make_pair(folder: Path, sizes: Sizes) -> Pair:
    """Both models; picture and words drawn from a seed."""
    rng = np.random.default_rng(0)
    size = sizes.vision["image_size"]
    picture = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    words = rng.integers(3, sizes.text["vocab_size"] - 1, sizes.words).tolist()
    return Pair(*load_ours(folder), load_peer(folder), picture, words, sizes.repeats)


def check(pair: Pair) -> float:
    """Largest difference of the logits, as a share of the largest logit.

    Raises:
        InputError: the two do not compute the same.
    """
    batch = pair.batch()
    ours = np.asarray(forward(pair.model, batch))[batch.mask]
    theirs = pair.peer(**pair.peer_inputs()).logits[0].numpy()
    share = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if share > 1e-3:
        raise InputError(
            "logits",
            found=f"{share:.1e} of the largest as difference",
            expected="one model in both libraries",
            fix="report it with your versions",
        )
    return share


def bench_load(folder: Path, repeats: int) -> list[Row]:
    """Folder to arrays in memory, with the weights in the system's page cache and without."""
    rows = []
    caches: dict[str, Callable[[], object]] = {
        "file cached": lambda: None,
        "from disk": lambda: forget(folder),
    }
    for name, prepare in caches.items():
        runs = {"ours": lambda: load_ours(folder), "peer": lambda: load_peer(folder)}
        seconds = interleaved(runs, repeats, prepare=prepare)
        rows.append(
            row(f"load, {name}", seconds["ours"].rest, seconds["peer"].rest, "from_pretrained")
        )
    return rows


def bench_vision(pair: Pair, notes: Notes, rows: int = 1) -> list[Row]:
    """Pixels to visual tokens, connector included."""
    name = f"{times(rows)}{pair.model.config.branches[0].tokens} visual tokens"
    encode = jax.jit(Model.visual_tokens)
    images, pixels = jax.device_put(pair.batch(rows).images), pair.pixels(rows)
    runs = {
        "ours": lambda: jax.block_until_ready(encode(pair.model, images)),
        "peer": lambda: pair.peer.get_image_features(pixels),
    }
    seconds = interleaved(runs, pair.repeats)
    notes["first call"][name] = seconds["ours"].first
    return [row(name, seconds["ours"].rest, seconds["peer"].rest, "get_image_features")]


def bench_generate(
    name: str,
    notes: Notes,
    repeats: int,
    ours: Callable[[int], object],
    peer: Callable[[int], object],
) -> list[Row]:
    """A prompt to its first token, and each token after it.

    `ours` and `peer` write as many tokens as they are told.
    """
    runs = {
        f"{who} {n}": functools.partial(run, n)
        for n in (1, 1 + STEPS)
        for who, run in (("ours", ours), ("peer", peer))
    }
    seconds = interleaved(runs, repeats)
    notes["first call"][name] = seconds["ours 1"].first
    first = {who: seconds[f"{who} 1"].rest for who in ("ours", "peer")}
    each = {
        who: [1e3 * (b - a) / STEPS for a, b in zip(first[who], long.rest, strict=True)]
        for who in first
        for long in [seconds[f"{who} {1 + STEPS}"]]
    }
    return [
        row(f"{name}: first token", first["ours"], first["peer"], "generate"),
        row(f"{name}: each token", each["ours"], each["peer"], "generate", "ms"),
    ]


def bench_text(pair: Pair, notes: Notes, rows: int = 1) -> list[Row]:
    """The language model alone, with as many tokens of text as `bench_llava` has in all."""
    length = pair.peer_inputs()["input_ids"].shape[1]
    rng = np.random.default_rng(1)
    ids = rng.integers(3, pair.model.config.llm.vocab - 1, (rows, length)).tolist()
    batch = pair.processor(None, input_ids=ids)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(rows, length).long()}
    return bench_generate(
        f"{times(rows)}{length} tokens of text",
        notes,
        pair.repeats,
        lambda n: generate_ids(pair.model, batch, max_new_tokens=n),
        functools.partial(peer_generate, pair.peer, inputs),
    )


def bench_many(pair: Pair, notes: Notes) -> list[Row]:
    """Both again with many rows, less often."""
    less = dataclasses.replace(pair, repeats=2)
    return [*bench_vision(less, notes, MANY), *bench_text(less, notes, MANY)]


def times(rows: int) -> str:
    return f"{rows} x " if rows > 1 else ""


def bench_llava(pair: Pair, notes: Notes) -> list[Row]:
    """A picture and a question."""
    batch, inputs = pair.batch(), pair.peer_inputs()
    (branch,) = pair.model.config.branches
    return bench_generate(
        f"picture of {branch.tokens} + {len(pair.words) + 1} tokens",
        notes,
        pair.repeats,
        lambda n: generate_ids(pair.model, batch, max_new_tokens=n),
        functools.partial(peer_generate, pair.peer, inputs),
    )


def bench_fused(pair: Pair, notes: Notes) -> list[Row]:
    """Two branches, a question; the peer is put together from transformers' parts."""
    fused = copies(pair.model, 2)
    processor = dataclasses.replace(pair.processor, config=fused.config)
    batch = dataclasses.replace(pair, processor=processor).batch()
    llm = transformers.LlamaForCausalLM(pair.peer.config.text_config)
    llm.model, llm.lm_head = pair.peer.model.language_model, pair.peer.lm_head
    pixels, embed = pair.pixels(), llm.get_input_embeddings()

    def peer(n: int) -> None:
        visual = [pair.peer.get_image_features(pixels).pooler_output[0][None] for _ in range(2)]
        parts = [embed(torch.tensor([[1]])), *visual, embed(torch.tensor([pair.words]))]
        peer_generate(llm.eval(), {"inputs_embeds": torch.cat(parts, dim=1)}, n)

    tokens = " + ".join(str(branch.tokens) for branch in fused.config.branches)
    return bench_generate(
        f"two branches of {tokens}",
        notes,
        pair.repeats,
        lambda n: generate_ids(fused, batch, max_new_tokens=n),
        peer,
    )


def peer_generate(
    model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], n: int
) -> None:
    """Transformers' greedy generation of exactly n tokens."""
    model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)


def copies(model: Model, n: int) -> Model:
    """A fused model of n branches, all with the weights of a model's only one."""
    (branch,) = model.config.branches
    branches = tuple(dataclasses.replace(branch, name=f"{branch.name}{i + 1}") for i in range(n))
    config = dataclasses.replace(model.config, branches=branches)
    graph, params = abstract(config.build)
    found = flatten(nnx.state(model))
    for name in params:
        words = name.split("/")
        if words[0] == "branches":
            words[1] = branch.name
        params[name] = found["/".join(words)]
    return join(graph, params)


BENCHES = (bench_vision, bench_text, bench_llava, bench_fused, bench_many)
"""What is timed besides loading."""


if __name__ == "__main__":
    main(arguments("vfjax against transformers"))
