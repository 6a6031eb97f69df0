"""Tokenizers that a mergekit YAML makes of several, and embeddings put in their order.

As mergekit 0.1.5's tokenizer/build.py and embed.py have it; in the order of the recipe, where it
follows a hash.
"""

import copy
import functools
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from converters.files import hub
from converters.source import Source, tokenizer_class
from converters.tokenizer import load_tokenizer, tokenizer_of
from vfjax.atomic import JSON, UNFINISHED, read_json
from vfjax.errors import counted
from vfjax.merge import LazyTensor, Recipe, blocks
from vfjax.merge.parse import fail, keys, mapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' "
    "+ m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3}
"""Chat templates by mergekit's names; alpaca, exaone and mistral are not here."""

Stand = str | Mapping[str, JSON] | None
"""What stands for a token that a model lacks: "zero", a model's label, or a mapping with both."""

GAP = 256
"""Rows that are nearer are read together."""


def made_tokenizer(
    recipe: Recipe,
    others: Mapping[str, str],
    sources: Mapping[str, Source],
    llms: Mapping[str, Mapping[str, LazyTensor]],
) -> "Vocabulary | None":
    """The tokenizer that a recipe asks for, None if it asks for none.

    Args:
        recipe: over labels.
        others: label -> folder that is named for its tokenizer alone.
        sources: label -> opened folder, the base (or the first) first.
        llms: label -> tensors of its LLM.
    """
    if not (recipe.tokenizer or recipe.tokenizer_source or recipe.chat_template):
        return None
    loaded = {label: tokenizer_of(source) for label, source in sources.items()}
    classes = {label: source.tokenizer for label, source in sources.items()}
    for label, named in others.items():
        folder = hub.folder(named, "recipe", weights=False)
        file = folder / "config.json"
        classes[label] = tokenizer_class(read_json(file)) if file.is_file() else {}
        loaded[label] = load_tokenizer(folder, classes[label])
        if loaded[label] is None:
            fail(named, "no tokenizer", "one, as the recipe names it", "correct the path")
    rows = {label: llm["model.embed_tokens.weight"].shape[0] for label, llm in llms.items()}
    made = Vocabulary(recipe, loaded, rows)
    made.tokenizer = classes[made.start]
    settings = next(iter(sources.values())).generation
    if settings.is_file():
        shutil.copyfile(settings, made.folder / settings.name)
    return made


class Vocabulary:
    """The tokenizer of a merge, and where each model has its tokens.

    Args:
        recipe: its `tokenizer_source`, `tokenizer` and `chat_template` are read.
        loaded: label -> transformers tokenizer, or None, of each model, the base (or the first)
            first; models whose tokenizers alone are read, too. One without has the base's.
        rows: label -> rows of the embedding of each model that is merged.

    Attributes:
        folder: holds the made tokenizer's files, while this object lives.
        size: rows of the merged embeddings; None if the models' are kept.
        words: token -> id.
        start: label of the model whose tokenizer was changed to this.
        tokenizer: what that model's folder says of its class, see `Source`.

    Raises:
        InputError: no tokenizer, one that tokens can't be taken out of, an unknown template, or
            values of the wrong kind.
    """

    def __init__(
        self,
        recipe: Recipe,
        loaded: "Mapping[str, PreTrainedTokenizerBase | None]",
        rows: Mapping[str, int],
    ):
        self.size: int | None = None
        self.tokenizer: Mapping[str, str] = {}
        given = recipe.tokenizer or {}
        keys("tokenizer", given, ("source", "tokens", "pad_to_multiple_of"))
        source = given.get("source", "union") if recipe.tokenizer else recipe.tokenizer_source
        self.start = base = recipe.base or next(iter(loaded))
        if (own := loaded[base]) is None:
            wanted = f"one in {base}, for tokenizer or chat_template"
            fail("recipe", "no tokenizer", wanted, "copy its files there")
        made = copy.deepcopy(own)
        if source is not None:
            limits = {label: rows.get(label, 1 << 62) for label in loaded}
            known = {label: each or own for label, each in loaded.items()}
            made = self._made(source, known, limits, base)
            tokens = mapping("tokenizer.tokens", given.get("tokens"))
            self.tokens = {token: _token(token, value) for token, value in tokens.items()}
            made.add_tokens([token for token in tokens if token not in made.get_vocab()])
            self._place(made, known, limits, rows, given.get("pad_to_multiple_of"))
        if template := _template(recipe.chat_template, loaded):
            made.chat_template = template
        self._home = tempfile.TemporaryDirectory()
        self.folder = Path(self._home.name)
        UNFINISHED.add(self.folder)
        made.save_pretrained(self.folder)
        self.words = made.get_vocab()

    @property
    def digest(self) -> str:
        """SHA-256 of the files."""
        found = (path.read_bytes() for path in sorted(self.folder.iterdir()))
        return hashlib.sha256(b"".join(found)).hexdigest()

    def _made(
        self,
        source: object,
        known: "Mapping[str, PreTrainedTokenizerBase]",
        limits: Mapping[str, int],
        base: str,
    ) -> "PreTrainedTokenizerBase":
        """The tokenizer of a source: "base", "union" or a label."""
        if not isinstance(source, str) or source not in ("union", "base", *known):
            fail("tokenizer", repr(source), "union, base or a model", "name one of these")
        self.start = source if source in known else base
        made = _cut(known[self.start], limits[self.start], self.start)
        if source != "union" or source in known:
            return made
        added: dict[str, Any] = {}
        words: dict[str, None] = {}
        for label, tokenizer in known.items():
            extra = tokenizer.added_tokens_decoder
            for i, info in sorted(extra.items()):
                if i < limits[label]:
                    added.setdefault(info.content, info)
            vocab = tokenizer.get_vocab()
            inside = sorted((i, word) for word, i in vocab.items() if i < limits[label])
            words |= dict.fromkeys(word for i, word in inside if i not in extra)
        held = made.get_vocab()
        made.add_tokens([word for word in words if word not in held and word not in added])
        made.add_tokens(list(added.values()))
        return made

    def _place(
        self,
        made: "PreTrainedTokenizerBase",
        known: "Mapping[str, PreTrainedTokenizerBase]",
        limits: Mapping[str, int],
        rows: Mapping[str, int],
        multiple: object,
    ) -> None:
        """Where each model has the rows of the made tokenizer's tokens."""
        self.ids = made.get_vocab()
        self.count = 1 + max(self.ids.values())
        step = 1 if multiple is None else multiple
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            fail("tokenizer.pad_to_multiple_of", repr(multiple), "a number", "correct it")
        self.size = -(-self.count // step) * step
        self.vocabs = {label: known[label].get_vocab() for label in rows}
        self.places = {label: np.full(self.count, -1) for label in rows}
        for label, vocab in self.vocabs.items():
            for word, i in self.ids.items():
                if vocab.get(word, limits[label]) < limits[label]:
                    self.places[label][i] = vocab[word]

    def align(
        self, name: str, tensors: Mapping[str, LazyTensor], base: str | None, dtype: np.dtype | None
    ) -> dict[str, LazyTensor]:
        """The models' embeddings or heads in the order of the made tokenizer.

        Args:
            name: of the tensor, for errors.
            tensors: label -> tensor with one row a token, of the models that are merged into it.
            base: label whose rows stand for tokens that several have and others lack.
            dtype: of the arithmetic, if the recipe has one.

        Raises:
            InputError: `tokens` names a model that is not merged, or a token that it lacks.
        """
        labels = list(tensors)
        found = np.stack([self.places[label] for label in labels])
        there = found >= 0
        default, forced = np.full_like(found, -1), np.zeros(self.count, bool)
        for i in np.flatnonzero(~there.all(0)):  # one has it, or the base has, or the mean of all
            alone = there[:, i].sum() != 1 and base in labels and there[labels.index(base), i]
            chosen = [labels.index(base)] if alone and base else np.flatnonzero(there[:, i])
            default[chosen, i] = found[chosen, i]
        for token, (source, force) in self.tokens.items():
            i = self.ids[token]
            forced[i] = force
            if force or not there[:, i].all():
                default[:, i] = -1
                if source != "zero":
                    label, row = self._chosen(name, token, source, tensors)
                    default[labels.index(label), i] = row
        parts = list(tensors.values())
        kinds = [x.dtype for x in parts] + ([np.dtype(dtype)] if dtype else [])
        kind = np.dtype(functools.reduce(jnp.promote_types, kinds))
        out: dict[str, LazyTensor] = {}
        for k, label in enumerate(labels):
            own = there[k] & ~forced
            wanted = np.where(own, -1, default)
            wanted[k, own] = found[k, own]
            out[label] = Gathered(parts, wanted, self.size or self.count, kind)
        return out

    def _chosen(
        self, name: str, token: str, source: Stand, tensors: Mapping[str, LazyTensor]
    ) -> tuple[str, int]:
        """The model and row that stand for a token of `tokens`."""
        where = f"tokenizer.tokens: {token!r}"
        if source is None:
            fail(where, "no source", "one, where a model lacks it or it is forced", "name a model")
        label, word, row = source, token, None  # type: Any, Any, Any
        if isinstance(source, Mapping):
            label, word, row = source["model"], source.get("token"), source.get("token_id")
        if label not in tensors:
            fail(where, f"model {label!r}", f"one that is merged into {name}", "name another")
        if row is None:
            row = self.vocabs[label].get(word, -1)
        if not 0 <= row < tensors[label].shape[0]:
            what = f"no {word!r} in {label!r}" if row == -1 else f"row {row} of {label!r}"
            fail(where, what, "a token that it has", "name another model")
        return label, row


def _token(token: str, given: object) -> tuple[Stand, bool]:
    """The source ("zero", label or mapping) of a token's embedding, and whether it is forced."""
    where = f"tokenizer.tokens: {token!r}"
    asked = keys(where, given, ("source", "force"))
    source, force = asked.get("source"), asked.get("force", False)
    if type(force) is not bool:
        fail(f"{where}: force", repr(force), "true or false", "correct it")
    if isinstance(source, Mapping):
        keys(where, source, ("kind", "model", "token", "token_id"))
        if source.get("kind") == "zero":
            return "zero", force
        named = [key for key in ("token", "token_id") if source.get(key) is not None]
        if source.get("kind") != "model_token" or len(named) != 1 or "model" not in source:
            wanted = "kind: zero, or kind: model_token with a model and a token or token_id"
            fail(where, repr(dict(source)), wanted, "correct it")
    return source, force


def _cut(tokenizer: "PreTrainedTokenizerBase", rows: int, label: str) -> "PreTrainedTokenizerBase":
    """A copy without the tokens that the model has no row for."""
    made = copy.deepcopy(tokenizer)
    lost = {word for word, i in made.get_vocab().items() if i >= rows}
    if not lost:
        return made
    if not made.is_fast:
        fail(f"{label}: tokenizer", "no tokenizer.json", "one", "convert it with transformers")
    found = json.loads(made.backend_tokenizer.to_str())
    model, words = found["model"], lost - {x["content"] for x in found["added_tokens"]}
    if words and model["type"] != "BPE":
        beyond = f"a {model['type']} with {counted(len(words), 'token')} beyond its {rows} rows"
        fail(f"{label}: tokenizer", beyond, "BPE", "take those tokens out of it")
    found["added_tokens"] = [x for x in found["added_tokens"] if x["id"] < rows]
    if model["type"] == "BPE":
        model["vocab"] = {word: i for word, i in model["vocab"].items() if i < rows}
        pairs = (x.split(" ", 1) if isinstance(x, str) else x for x in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if not lost.intersection(pair)]
    made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(found))
    return made


def _template(
    given: str | None, loaded: "Mapping[str, PreTrainedTokenizerBase | None]"
) -> str | None:
    """The chat template of a recipe: that of most models, a named one, or the text itself."""
    if given is None:
        return None
    if given == "auto":
        texts = [x.chat_template for x in loaded.values() if x is not None]
        texts = [x.get("default") if isinstance(x, dict) else x for x in texts]
        found = Counter(text.strip() for text in texts if text).most_common(1)
        return found[0][0] if found else None
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{" not in given or len(given) < 20:
        wanted = f"auto, {', '.join(TEMPLATES)}, or a jinja template"
        fail("chat_template", repr(given), wanted, "write the template itself")
    return given


class Gathered:
    """Rows of several tensors in a new order, lazily: of each row the mean of those that have it.

    Args:
        parts: tensors of one width.
        rows: int[len(parts), n], the row of each part that is meant, -1 for none; a row that no
            part has is 0.
        total: number of rows; those from n on are the mean of all before.
        dtype: of the result.
    """

    def __init__(self, parts: Sequence[LazyTensor], rows: np.ndarray, total: int, dtype: np.dtype):
        self.parts, self.rows, self.dtype = parts, rows, np.dtype(dtype)
        self.shape = (total, *parts[0].shape[1:])

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        end = min(stop, self.rows.shape[1])
        found = self._means(start, max(start, end)).astype(self.dtype)
        if stop <= end:
            return found
        return np.concatenate([found, np.tile(self._mean, (stop - max(start, end), 1))])

    def _means(self, start: int, stop: int) -> np.ndarray:
        wanted = self.rows[:, start:stop]
        total = np.zeros((stop - start, *self.shape[1:]), np.float32)
        for part, own in zip(self.parts, wanted, strict=True):
            there = np.flatnonzero(own >= 0)
            total[there] += _read(part, own[there]).astype(np.float32)
        count = np.maximum((wanted >= 0).sum(0), 1).astype(np.float32)
        return np.asarray(total / count[:, None])

    @functools.cached_property
    def _mean(self) -> np.ndarray:
        count = self.rows.shape[1]
        parts = [
            self[rows].astype(np.float64).sum(0) for rows in blocks(self.shape, slice(0, count))
        ]
        return (sum(parts) / count).astype(self.dtype)


def _read(tensor: LazyTensor, rows: np.ndarray) -> np.ndarray:
    """Rows in any order; near ones are read together."""
    order = np.unique(rows)
    out = np.empty((len(order), *tensor.shape[1:]), tensor.dtype)
    ends = np.flatnonzero(np.diff(order) > GAP) + 1
    for first, last in zip([0, *ends], [*ends, len(order)], strict=True):
        if first < last:
            run = order[first:last]
            out[first:last] = tensor[int(run[0]) : int(run[-1]) + 1][run - run[0]]
    return out[np.searchsorted(order, rows)]
