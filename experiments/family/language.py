"""The family's base LLM: a word-level Llama that answers questions about scenes told in words.

A scene is told as a grid caption: 36 words, one for each patch of 8 pixels of its picture, row by
row. A cell's four patches are its colour, its place, its digit, its place (",", four times, where
the cell is empty), "?" standing for what is not told. A projector can so be aligned to the base's
word embeddings patch by patch, and two encoders' visual tokens one after another read like two
captions of one scene, of which each may lack something.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

import converters
from converters.load import abstract, join, model_config
from converters.origin import remember
from converters.source import Source
from experiments.family.optim import fit
from experiments.family.scenes import COLOURS, KINDS, NUMBERS, PLACES, ask, layouts
from vfjax import Model
from vfjax.atomic import temporary
from vfjax.llm import Llama

SPECIAL = ("<unk>", "<s>", "</s>")
EMPTY, HIDDEN = ",", "?"
WORDS = (
    *SPECIAL,
    *("[INST]", "[/INST]", EMPTY, HIDDEN, ".", "list", "objects"),
    *map(str, range(10)),
    *COLOURS,
    *PLACES,
    *NUMBERS,
    *("yes", "no", "where", "what", "which", "how", "many", "is", "there"),
    *("digit", "digits", "colour", "colours", "largest", "smallest"),
)
IDS = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = "mistral_instruct"  # the shortest of `vfjax.text.prompts` that separates questions
LENGTH, SHORT = 116, 80  # words of a text of the corpus

LLM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

Form = tuple[tuple[bool, bool], ...]
"""Captions of one scene, one after another: are colours, and digits, told?"""
FORMS: dict[str, Form] = {
    "once": ((True, True),),
    "twice": ((True, True), (True, True)),
    "split": ((True, False), (False, True)),
    "split, turned": ((False, True), (True, False)),
}

VIEWS: dict[int, tuple[tuple[Form, int], ...]] = {
    1: ((((True, True),), 3), (((True, False),), 1), (((False, True),), 1)),
    2: (
        (FORMS["twice"], 3),
        (FORMS["split"], 3),
        (FORMS["split, turned"], 3),
        (((True, True), (True, False)), 1),
        (((False, True), (True, True)), 1),
    ),
}
"""Number of captions -> forms in the corpus, and their odds."""


def caption(digits: np.ndarray, colours: np.ndarray, *, see: tuple[bool, bool]) -> np.ndarray:
    """Grid captions int32[n, 36] of scenes int8[n, 9]; `see`: are colours, and digits, told?"""
    full = digits >= 0
    hidden, empty = IDS[HIDDEN], IDS[EMPTY]
    colour = np.where(see[0], IDS[COLOURS[0]] + colours, hidden)
    digit = np.where(see[1], IDS["0"] + digits, hidden)
    place = IDS[PLACES[0]] + np.arange(9) + np.zeros_like(colours, int)
    cells = np.stack([colour, place, digit, place], axis=-1)
    cells = np.where(full[..., None], cells, empty).reshape(-1, 3, 3, 2, 2)
    return cells.swapaxes(2, 3).reshape(-1, 36).astype(np.int32)


def encode(text: str) -> list[int]:
    """Ids of words that a space separates, without <s>."""
    return [IDS[word] for word in text.split()]


def corpus(
    count: int, seed: int, *, length: int = LENGTH, twice: float = 0.75, lists: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Texts of random scenes.

    Each is one caption or two of the same scene, in the prompt format of the members, then as many
    turns as fit: first perhaps lists of the scene's objects, then questions. Captions that lack
    something come alone only with what they answer.

    Args:
        count: texts.
        seed: of all that is random.
        length: words of a text.
        twice: share of texts with two captions.
        lists: chance of a list, and of one more after it.

    Returns:
        ids int32[count, length] and the loss's weight float32[count, length] of each as a target:
        1 for answers, .05 for questions, .02 for what can't be known.
    """
    draw = random.Random(seed)
    digits, colours = layouts(count, np.random.default_rng(seed))
    told = {see: caption(digits, colours, see=see) for see in FORMS["twice"] + FORMS["split"]}
    ids = np.full((count, length), IDS["</s>"], np.int32)
    weights = np.zeros((count, length), np.float32)
    for i, (d, c) in enumerate(zip(digits.tolist(), colours.tolist(), strict=True)):
        views, odds = zip(*VIEWS[1 + (draw.random() < twice)], strict=True)
        views = draw.choices(views, odds)[0]
        text = [IDS["<s>"], IDS["[INST]"]]
        for see in views:
            text += told[see][i].tolist()
        weight = [0.0] + [0.02] * (len(text) - 1)
        for words, own in _turns(d, c, [any(see) for see in zip(*views, strict=True)], lists, draw):
            text += words
            weight += own
            if len(text) >= length:
                break
        ids[i], weights[i] = text[:length], weight[:length]
    return ids, weights


def _turns(
    digits: Sequence[int],
    colours: Sequence[int],
    seen: Sequence[bool],
    lists: float,
    draw: random.Random,
) -> Iterator[tuple[list[int], list[float]]]:
    """Endless turns about a scene, ids and weights, of which colours, and digits, are `seen`."""
    some = ("loccol", "count", "exist") if seen[0] else ("locdig", "compare", "count", "exist")
    kinds = KINDS if all(seen) else some
    hidden = {
        word
        for told, words in zip(seen, (COLOURS, map(str, range(10))), strict=True)
        if not told
        for word in words
    }
    listing, first = True, True
    while True:
        listing = listing and draw.random() < lists
        if listing:
            question, answer, known = _list(digits, colours, seen, draw)
        else:
            question, answer = ask(draw.choice(kinds), digits, colours, draw)
            known = [1.0]
            if hidden & {*question.split(), answer}:
                continue
        asked = encode(("" if first else "[INST] ") + question + " [/INST]")
        yield asked + encode(answer + " </s>"), [0.05] * len(asked) + [*known, 0.1]
        first = False


def _list(
    digits: Sequence[int], colours: Sequence[int], seen: Sequence[bool], draw: random.Random
) -> tuple[str, str, list[float]]:
    """A list of all objects in random order, and its words' weights.

    Of the attributes that are seen; those of an object follow from the first, if it is its alone.
    """
    cells = [i for i in range(9) if digits[i] >= 0]
    draw.shuffle(cells)
    names = [
        [PLACES[i], *([str(digits[i])] * seen[1]), *([COLOURS[colours[i]]] * seen[0])]
        for i in cells
    ]
    order = list(range(len(names[0])))
    draw.shuffle(order)
    if len(order) == 3 and draw.random() < 0.5:
        del order[draw.randrange(3)]
    words, weights = [], []
    firsts = [name[order[0]] for name in names]
    for name in names:
        words += [*(name[j] for j in order), EMPTY]
        known = 1.0 if firsts.count(name[order[0]]) == 1 else 0.02
        weights += [0.02, *[known] * (len(order) - 1), 0.05]
    return "list objects .", " ".join(words), weights


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json of `WORDS`, which puts <s> first."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token=SPECIAL[0]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens([*SPECIAL, "[INST]", "[/INST]"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", IDS["<s>"])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": LLM["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def new(folder: Path, seed: int) -> Model:
    """The untrained base, float32; its tokenizer lies in `folder`.

    Large tied embeddings with a small final norm, and small writes to the stream: with the usual
    0.02 the model does not learn to look words up in the time there is.
    """
    source = Source(folder, "llm", LLM, LLM, (), TEMPLATE, prefixes={"llm": (("", ""),)})
    graph, params = abstract(model_config(source).build)
    rng = np.random.default_rng(seed)
    for name, param in params.items():
        d = param.shape[0]
        if name.endswith("norm/scale"):
            value = np.full(param.shape, d**-0.5)
        elif name.endswith("scale"):
            value = np.ones(param.shape)
        else:
            std = 0.7 if name.endswith("embedding") else d**-0.5
            small = 0.2 if name.endswith(("out/kernel", "down/kernel")) else 1
            value = rng.normal(0, std * small, param.shape)
        params[name] = param.replace(jnp.asarray(value, jnp.float32))
    model = join(graph, params)
    remember(model, source)
    return model


PHASES: tuple[tuple[int, float, dict[str, Any]], ...] = (
    (500, 6e-3, {"length": SHORT, "twice": 0.0, "lists": 0.8}),
    (400, 3e-3, {"length": LENGTH, "twice": 0.75, "lists": 0.5}),
)
"""Steps, rate and corpus of the training's phases.

What is learnt last is to look a word up. Lists, whose order is random, teach it: without them
nothing is found after 700 steps, with them half of what is asked after 600, 92 % after 900.
"""


def train(
    model: Model,
    *,
    phases: Sequence[tuple[int, float, dict[str, Any]]] = PHASES,
    batch: int = 32,
    seed: int = 0,
    report: Callable[[str], object] = print,
) -> None:
    """Trains the LLM in place, phase after phase, see `PHASES`."""
    graph, params = nnx.split(model.llm)

    def loss(params: nnx.State, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids, weights = data
        llm = nnx.merge(graph, params)
        hidden, _ = llm(llm.embed(ids[:, :-1]), jnp.ones(ids[:, 1:].shape, bool))
        losses = optax.softmax_cross_entropy_with_integer_labels(llm.logits(hidden), ids[:, 1:])
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()

    start = seed * 1_000_000

    def texts(
        start: int, options: dict[str, Any], first: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = corpus(count * batch, start + first, **options)
        return ids.reshape(count, batch, -1), weights.reshape(count, batch, -1)

    for number, (steps, rate, options) in enumerate(phases, 1):
        params = fit(
            params,
            loss,
            partial(texts, start, options),
            steps=steps,
            rate=rate,
            every=25,
            report=partial(_tell, report, number),
        )
        start += steps
    nnx.update(model.llm, params)


def _tell(report: Callable[[str], object], phase: int, line: str) -> None:
    report(f"base, phase {phase}: {line}")


def prompts(count: int, seed: int, form: Form) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Test prompts: kind of question -> ids int32[count, t] and answers int32[count].

    Args:
        count: scenes.
        seed: of scenes and questions.
        form: the captions that are told, see `FORMS`.
    """
    draw = random.Random(seed)
    digits, colours = layouts(count, np.random.default_rng(seed))
    told = np.concatenate([caption(digits, colours, see=see) for see in form], axis=1)
    scenes = list(zip(digits.tolist(), colours.tolist(), strict=True))
    out = {}
    for kind in KINDS:
        asked = [ask(kind, d, c, draw) for d, c in scenes]
        texts = [encode(question) for question, _ in asked]
        ids = np.full((count, 2 + told.shape[1] + max(map(len, texts)) + 1), -1, np.int32)
        ids[:, : 2 + told.shape[1]] = np.insert(told, 0, [[IDS["<s>"]], [IDS["[INST]"]]], axis=1)
        for row, text in zip(ids, texts, strict=True):
            row[2 + told.shape[1] :][: len(text) + 1] = [*text, IDS["[/INST]"]]
        out[kind] = ids, np.array([IDS[answer] for _, answer in asked])
    return out


def score(model: Model, *, count: int = 200, seed: int = 1) -> dict[str, dict[str, float]]:
    """Share of right answers (greedy first word), by form of the captions and kind of question."""

    @nnx.jit
    def answer(llm: Llama, ids: jax.Array | np.ndarray) -> jax.Array:
        mask = jnp.asarray(ids) >= 0
        hidden, _ = llm(llm.embed(jnp.maximum(ids, 0)), mask)
        last = jnp.take_along_axis(hidden, mask.sum(axis=1)[:, None, None] - 1, axis=1)
        return llm.logits(last[:, 0]).argmax(axis=-1)

    return {
        name: {
            kind: float((np.asarray(answer(model.llm, ids)) == right).mean())
            for kind, (ids, right) in prompts(count, seed, form).items()
        }
        for name, form in FORMS.items()
    }


def build(out: Path, *, seed: int = 0, report: Callable[[str], object] = print) -> Model:
    """Trains the base and writes it to `out` as a Hugging Face folder.

    Raises:
        InputError: `out` exists.
    """
    with temporary() as folder:
        write_tokenizer(folder)
        model = new(folder, seed)
        train(model, seed=seed, report=report)
        converters.export(model, out)
    return model
