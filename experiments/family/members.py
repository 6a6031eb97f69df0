"""Members of the family: an encoder, a projector aligned to the base's words, a short tuning."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

import converters
from experiments.configs.train import ADAPTERS, CONNECTOR, LLM
from experiments.family import encoders, language, scenes
from vfjax import (
    Batch,
    CacheFusion,
    LogitsFusion,
    MemberProcessors,
    Model,
    Processor,
    Prune,
    encode,
)
from vfjax.architectures import Prompt
from vfjax.architectures.base import Branch, Encoded, PatchEncoder
from vfjax.data import Batches, Conversations
from vfjax.eval.data import read_lines
from vfjax.generate import Generator
from vfjax.train import Group, LoRAConfig, Optim, Options, add_lora, fit

Array = jax.Array
Report = Callable[[str], object]

Given = Batch | tuple[Batch, ...]
"""What is asked: one batch, or one a member."""

Shown = tuple[dict[str, list[Array]], Encoded, Prompt | None]
"""See `states`."""

Carry = tuple[nnx.State, optax.OptState]
"""Parameters, the optimiser's state."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a member is made.

    Attributes:
        encoder: folder of the vision encoder.
        captions: digits and colours int8[n, 9] of scenes -> the words that the tokens of a grid
            of 6 x 6 are aligned to, int32[n, 36] or, of several words each, [n, 36, words].
        connector: of `converters.create`.
        aux: folder of a second encoder.
        align: steps of the regression to word embeddings, the LLM not run.
        first: steps of the connector alone, through the LLM.
        tune: steps of connector and LLM.
        rate: peak learning rate of the LLM, or of its adapters, in the last.
        seed: of the connector and of the data's order.
        batch: rows of a step of the last two.
        lora: adapters that are trained in place of the LLM; None: the LLM itself.
        template: of the talks.
        rows: file of them, in the folder of the scenes.
        length: of rows in tokens, to which all are padded or cut; None: as the processor does.
        first_rate: peak learning rate of the connector alone; later it is half of that.
        save_every: steps between two states.
    """

    encoder: Path
    captions: Callable[[np.ndarray, np.ndarray], np.ndarray]
    connector: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "mlp"})
    aux: Path | None = None
    align: int = 1500
    first: int = 100
    tune: int = 200
    rate: float = 2e-4
    seed: int = 0
    batch: int = 32
    lora: LoRAConfig | None = None
    template: str = language.TEMPLATE
    rows: str = "rows.json"
    length: int | None = None
    first_rate: float = 1e-3
    save_every: int = 10_000


def make(
    recipe: Recipe, base: Path, data: Path, workdir: Path, *, report: Report = print
) -> tuple[Model, Processor]:
    """A member in LLaVA's architecture; `workdir` keeps the two stages' states and metrics.

    Its adapters, if it has any, are not merged yet: `vfjax.train.merge_lora`.

    Args:
        recipe: tower, rows, steps and rates.
        base: folder of the base LLM.
        data: folder of `scenes.write`'s training split.
        workdir: to write to.
        report: called with a line of text.
    """
    model, processor = converters.create(
        base,
        recipe.encoder,
        recipe.connector,
        aux=recipe.aux,
        template=recipe.template,
        seed=recipe.seed,
        init="flax",
        dtype="float32",
    )
    if not any(state.name.isdigit() for state in workdir.glob("*/states/*")):
        align(model, data, recipe, report=report)  # a state has what came after it
    if recipe.lora:
        add_lora(model, recipe.lora, seed=recipe.seed)
    rows = Conversations(data / recipe.rows, data / "images")
    shown = processor
    if recipe.length:  # one shape, one program
        shown = dataclasses.replace(processor, lengths=(recipe.length,))
    llm = Group(ADAPTERS if recipe.lora else LLM, recipe.rate)
    stages = (
        ("first", recipe.first, (Group(CONNECTOR, recipe.first_rate),)),
        ("tune", recipe.tune, (Group(CONNECTOR, recipe.first_rate / 2), llm)),
    )
    for number, (name, steps, groups) in enumerate(stages):
        if not steps:
            continue
        batches = Batches(
            [(rows, 1.0)],
            shown,
            batch=recipe.batch,
            seed=2 * recipe.seed + number,
            steps=steps,
            length=recipe.length,
            endless=True,
        )
        options = Options(
            dtype="float32", remat=False, save_every=recipe.save_every, log_every=5, seed=None
        )
        optim = Optim(steps, warmup=0.05, clip=1.0)
        model = fit(model, batches.to_iter, groups, optim, workdir / name, options=options)
    return model, processor


def align(model: Model, data: Path, recipe: Recipe, *, report: Report = print) -> None:
    """Fits the connector's tokens to the base's embeddings of the scenes' grid captions, in place.

    The lesson of tiny families: a connector that starts at the base's own words needs little tuning
    of the LLM, so that merging halves little. Tokens beyond a picture's patches (Dense Connector's
    STI has some) have no word and are left free.
    """
    labels = read_lines(data / "scenes.json")
    digits, colours = (np.array([row[key] for row in labels]) for key in ("digits", "colours"))
    (branch,) = model.branches.values()
    told = recipe.captions(digits, colours)
    encoder = cast(PatchEncoder, branch.config.encoders["encoder"])
    words = jnp.asarray(spread(told, math.isqrt(encoder.tokens)))
    seen = states(branch, [data / "images" / row["image"] for row in labels])
    parts: Any = nnx.split(branch.connector, nnx.Param, ...)
    graph, params, rest = parts
    table = model.llm.embedding[...]
    scale = 1 / table.var()
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, recipe.align))

    def loss(params: nnx.State, seen: tuple[Encoded, Prompt | None], words: Array) -> Array:
        whole = jax.tree.map(lambda x: x, branch)  # another branch of the same arrays
        whole.connector = nnx.merge(graph, params, rest)
        tokens = whole.visual_tokens(seen[0], model.llm.lookup, prompt=seen[1]).values
        tokens = tokens.reshape(len(words), -1, table.shape[1])[:, : words.shape[1]]
        return scale * ((tokens - table[words].mean(axis=2)) ** 2).mean()

    def step(seen: Shown, words: Array, carry: Carry, picks: Array) -> tuple[Carry, Array]:
        params, state = carry
        shown, encoded, prompt = jax.tree.map(lambda x: x[picks], seen)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shown)
        some = dataclasses.replace(encoded, states=flat)
        value, grads = jax.value_and_grad(loss)(params, (some, prompt), words[picks])
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    picks = np.random.default_rng(recipe.seed).integers(0, len(words), (recipe.align, 64))

    @jax.jit
    def run(carry: Carry, picks: np.ndarray, seen: Shown, words: Array) -> tuple[Carry, Array]:
        return jax.lax.scan(functools.partial(step, seen, words), carry, picks)

    (params, _), losses = run((params, tx.init(params)), picks, seen, words)
    nnx.update(branch.connector, params)
    report(f"align: {float(losses[-50:].mean()):.3f} of the words' variance is left")


def spread(words: np.ndarray, side: int) -> np.ndarray:
    """Captions int32[n, 36] or [n, 36, words] for another number of patches, the nearest words.

    Returns:
        int32[n, side * side, words].
    """
    near = np.arange(side) * encoders.GRID // side
    grid = words.reshape(len(words), encoders.GRID, encoders.GRID, -1)
    return grid[:, near][:, :, near].reshape(len(words), side * side, -1)


def states(branch: Branch, files: Sequence[Path]) -> Shown:
    """What the connector reads of pictures, and is given besides; a row of each a picture.

    Returns:
        encoder -> hidden states float32[n, ...]; the rest of `Encoded`; and the prompt, for SliME's
        router one word that stands for any, else None.
    """
    run = jax.jit(lambda branch, inputs: branch.encode(inputs))
    words = np.full((256, 1), language.IDS["?"], np.int32)
    prompt = Prompt(words, np.ones_like(words, bool)) if branch.config.reads_text else None
    parts = []
    for i in range(0, len(files), 256):
        rows = [[Image.open(file).convert("RGB")] for file in files[i : i + 256]]
        found = run(branch, branch.config.prepare(rows, slots=256).inputs)
        each = jax.tree.map(lambda x: x.reshape(256, -1, *x.shape[1:]), found.states)
        parts.append(jax.device_get((each, dataclasses.replace(found, states={}), prompt)))
    return jax.tree.map(lambda *x: jnp.concatenate(x)[: len(files)], *parts)


@dataclasses.dataclass(frozen=True)
class Quiz:
    """Pictures and one question of every kind about each.

    Attributes:
        pictures: files.
        questions: kind -> (question, answer) of each picture.
        stems: kind -> what begins each answer and is given; {}: nothing.
        options: kind -> the answers to each among which the likeliest counts; {}: all words.
    """

    pictures: list[Path]
    questions: dict[str, list[tuple[str, str]]]
    stems: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    options: dict[str, list[tuple[str, ...]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, start: int = 0, stop: int | None = None) -> "Quiz":
        """Scenes of a folder of `scenes.write`."""
        rows = read_lines(folder / "scenes.json")[start:stop]
        questions = {kind: [tuple(row["questions"][kind]) for row in rows] for kind in scenes.KINDS}
        return cls([folder / "images" / row["image"] for row in rows], questions)


def load(folder: Path, prune: Prune | None = None) -> tuple[Model, Processor]:
    """A member or a fusion, in float32."""
    return converters.load(folder, dtype="float32", prune=prune)


@jax.jit
def next_logits(model: Generator, batch: Given) -> Array:
    """float32[b, vocab] after each row's last token."""
    size = max(each.read for each in (batch if isinstance(batch, tuple) else (batch,)))
    return model.prefill(batch, size)[0]


def score(
    model: Generator, processor: Processor | MemberProcessors, test: Quiz, *, rows: int = 250
) -> dict[str, np.ndarray]:
    """Right or wrong, bool[n], by kind of question: the likeliest next word is the answer.

    Of answers of several tokens the first counts.

    Args:
        model: anything with `prefill`.
        processor: the one that makes its batches.
        test: pictures and questions.
        rows: of a batch.
    """
    out: dict[str, list[np.ndarray]] = {kind: [] for kind in test.questions}
    one = processor.processors[0] if isinstance(processor, MemberProcessors) else processor
    tokenizer = one.require_tokenizer()

    def first(answer: str) -> int:
        return tokenizer(answer, add_special_tokens=False).input_ids[0]

    for i in range(0, len(test.pictures), rows):
        pictures: list[Any] = list(test.pictures[i : i + rows])
        seen: Given | None = None
        for kind, asked in test.questions.items():
            part = asked[i : i + rows]
            stems = test.stems[kind][i : i + rows] if test.stems else [""] * len(part)
            asking: list[Any] = [
                _open(processor.chat(question), stem)
                for (question, _), stem in zip(part, stems, strict=True)
            ]
            batch, seen = once(model, processor(pictures, asking), seen)
            logits = np.array(next_logits(model, batch))
            if test.options:
                for row, some in zip(logits, test.options[kind][i : i + rows], strict=True):
                    row[np.setdiff1d(np.arange(len(row)), [first(x) for x in some])] = -np.inf
            right = np.array([first(answer) for _, answer in part])
            out[kind].append(logits.argmax(axis=-1) == right)
    return {kind: np.concatenate(parts) for kind, parts in out.items()}


def _open(prompt: str | tuple[str, ...], stem: str) -> str | tuple[str, ...]:
    """A prompt, or each member's, with what its answer begins with."""
    return prompt + stem if isinstance(prompt, str) else tuple(p + stem for p in prompt)


def once(model: Generator, batch: Given, seen: Given | None) -> tuple[Given, Given]:
    """A batch with its pictures encoded, or with those `seen` of an earlier one; and these."""
    if isinstance(model, LogitsFusion):
        assert isinstance(batch, tuple), "a batch a member"
        if seen is None:
            seen = tuple(map(encode, model.members, batch))
        assert isinstance(seen, tuple)
        return tuple(map(Batch.with_pictures, batch, seen)), seen
    whole = model.merged if isinstance(model, CacheFusion) else model
    assert isinstance(whole, Model) and isinstance(batch, Batch)
    seen = encode(whole, batch) if seen is None else seen
    assert isinstance(seen, Batch)
    return batch.with_pictures(seen), seen


def means(scored: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Per cent right, by kind and over all ("mean")."""
    each = {kind: 100 * float(values.mean()) for kind, values in scored.items()}
    return {**each, "mean": sum(each.values()) / len(each)}
