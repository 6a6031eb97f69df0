"""A model in another layout than the one it was read from: transformers' or the authors'.

A layout's `Writer` says the model in its own words. What it wrote is then read by the layout's own
reader, which computes what that layout's code computes, and must make the same model of it: what
the layout cannot say is refused by the field that would be lost.
"""

import dataclasses
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import numpy as np

from converters.chat import jinja
from converters.folder import assigned, settled
from converters.formats.llava import prompt_template
from converters.layout_tokens import (
    check_prompts,
    generation,
    template_name,
    tokenizer_files,
    tokens_for,
)
from converters.load import check, model_config, structure
from converters.params.table import restored
from converters.processor import processor
from converters.source import KEEP, LAYOUTS, TEMPLATE, TOKENIZERS, Layout, Source, Writer
from converters.tokenizer import SETTINGS, tokenizer_of
from converters.towers import Tensors, Towers
from vfjax import InputError, Processor
from vfjax.atomic import read_json, temporary
from vfjax.errors import cut
from vfjax.merge import LazyTensor
from vfjax.model import BranchConfig, ModelConfig
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import get_template

Files = dict[str, Mapping[str, Any] | bytes]
"""Path in a folder -> a JSON file, or another one's content."""

UNPADDING = (
    "of pictures of few sizes, fewer than 1 in 10,000, as 376x47, a row or column of tokens is "
    "read more or less: transformers rounds their sides to 7 decimals before it cuts them to whole "
    "tokens, LLaVA's authors don't"
)
PENALTY = (
    "repetition_penalty of generation_config.json counts the words of the prompt in transformers, "
    "those of the answer alone in LLaVA's authors' code"
)
FRAMES = "frames of videos are resized by torch in transformers, by Pillow in its authors' code"
PROMPTS = (
    "the chat template is left behind, as the authors' layout has none; "
    "prompts are those of {!r} there"
)


def kinds() -> tuple[str, ...]:
    """Names of layouts that can be asked for."""
    return tuple(dict.fromkeys(layout.writer.kind for layout in LAYOUTS if layout.writer))


def written_as(source: Source, kind: str) -> bool:
    """Whether a model's own layout is one of that kind."""
    own = _writer(source)
    return own is not None and own.kind == kind


def _writer(source: Source) -> Writer | None:
    """That of the model's own layout."""
    return next(layout.writer for layout in LAYOUTS if layout.name == source.layout)


def relaid(
    source: Source, kind: str, tensors: Mapping[str, Tensors]
) -> tuple[dict[str, LazyTensor], Files]:
    """Weights and other files of a model in another layout.

    What both say but their codes do otherwise in a detail is warned of.

    Args:
        source: the model's normal form.
        kind: the layout, one of `kinds`.
        tensors: component -> its tensors, under the names of its table.

    Raises:
        InputError: the layout cannot say what the model is, or there is no such layout.
    """
    if written_as(source, kind):
        raise InputError(
            source.path,
            found=f"a folder in layout {source.layout}",
            expected=f"one in another than {kind!r}",
            fix="copy it, or load and export it",
        )
    model = model_config(source)
    layout, writer = _layout(source, model, kind)
    if model.llm.headless:
        raise InputError(
            source.path, found="an LLM without a head", expected="one with logits", fix=KEEP
        )
    own = processor(source, model)
    rows = model.llm.vocab if writer.tokens else _own_rows(source, model.llm.vocab, tensors["llm"])
    tokenizer = tokenizer_of(source)
    ids, rows = tokens_for(tokenizer, writer.tokens, rows)
    tensors = {**tensors, "llm": _resized(source, tensors["llm"], rows)}
    said = dataclasses.replace(source, llm={**source.llm, "vocab_size": rows})
    wanted = dataclasses.replace(model, llm=dataclasses.replace(model.llm, vocab=rows))
    written = writer.write(said, wanted, ids)
    config, files = dict(written.config), dict[str, Mapping[str, Any] | bytes](written.files)
    notes, whole = list(_notes(own)), kind == "hf"
    if whole and own.template == CHAT_TEMPLATE:
        template = source.chat_template
    elif whole:
        template = jinja(get_template(own.template), writer.tokens)
    else:
        default = prompt_template(source.llm)
        had = _writer(source)
        name = template_name(source, default, had.tokens if had else ())
        template = name or default
        if name is None:
            notes.append(PROMPTS.format(template))
        config |= {TEMPLATE: template} if template != default else {}
    if whole:
        files["chat_template.jinja"] = template.encode()
    if found := generation(source, own):
        files["generation_config.json"] = found
    if tokenizer is not None:
        settings = source.home / SETTINGS
        before = read_json(settings) if settings.is_file() else {}
        made = tokenizer_files(tokenizer, before, rows, whole)
        if own.template != CHAT_TEMPLATE or whole:
            check_prompts(source, own, made, template, whole)
        files |= made
        if (model_file := source.home / TOKENIZERS[1]).is_file():
            files[TOKENIZERS[1]] = model_file.read_bytes()
    weights = {
        restored(name, written.prefixes[part]): tensor
        for part, own_tensors in tensors.items()
        for name, tensor in own_tensors.items()
    }
    files["config.json"] = config
    _check(source, wanted, layout, files, weights)
    for note in notes:
        warnings.warn(note, stacklevel=4)
    return weights, files


def _layout(source: Source, model: ModelConfig, kind: str) -> tuple[Layout, Writer]:
    """The layout of that kind whose class computes the model's branch."""
    if kind not in kinds():
        raise InputError(
            "layout", found=repr(kind), expected=" or ".join(map(repr, kinds())), fix="choose one"
        )
    named = ", ".join(type(b.architecture).__name__ for b in model.branches) or "an LLM alone"
    known = []
    for layout in LAYOUTS:
        if layout.writer is None or layout.writer.kind != kind:
            continue
        known += [one.__name__ for one in layout.writer.architectures]
        if [type(b.architecture) for b in model.branches] in [
            [one] for one in layout.writer.architectures
        ]:
            return layout, layout.writer
    raise InputError(
        source.path,
        found=f"a model of {named}",
        expected=f"one branch, of {', '.join(known)}, that layout {kind!r} has a class for",
        fix=KEEP,
    )


def _notes(own: Processor) -> Iterator[str]:
    """What both layouts say and their codes do otherwise in a detail."""
    made = own.config.branches[0].architecture
    if hasattr(made, "decimals"):
        yield UNPADDING
    if own.settings.repetition_penalty != 1:
        yield PENALTY
    if hasattr(made, "most"):  # LLaVA-OneVision's
        yield FRAMES


def _check(
    source: Source,
    wanted: ModelConfig,
    layout: Layout,
    files: Files,
    weights: Mapping[str, LazyTensor],
) -> None:
    """Whether the layout's own reader makes the same model of what is to be written.

    Raises:
        InputError: it does not; the field is named.
    """
    with temporary() as home:
        for name, content in files.items():
            (home / name).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (home / name).write_bytes(content)
            else:
                (home / name).write_text(json.dumps(content))
        config = read_json(home / "config.json")
        try:
            again = settled(assigned(layout.open(home, config, Towers()), layout, weights))
            made = model_config(again)
            for where, old, new in _differences(_plain(wanted), _plain(made), ""):
                raise InputError(
                    f"{source.path}: {where}",
                    found=cut(repr(old)),
                    expected=f"{cut(repr(new))}, as it would be in layout {layout.name}",
                    fix=KEEP,
                )
            check(again, structure(made)[1])
        except InputError as error:
            if str(home) not in str(error):
                raise
            raise InputError(
                source.path,
                found="what the other layout refuses: "
                + str(error).replace(f"{home}/", "").replace(f"{home}: ", ""),
                expected=f"what layout {layout.name} has, too",
                fix=KEEP,
            ) from None


def _plain(model: ModelConfig) -> ModelConfig:
    """Without what layouts do otherwise by their code: see `_notes`, and how files are opened."""
    branches = []
    for branch in model.branches:
        made: Any = branch.architecture  # a dataclass, of which replace must know the fields
        images = dataclasses.replace(made.images, convert="drop")
        more = {"decimals": None} if hasattr(made, "decimals") else {}
        made = dataclasses.replace(made, images=images, **more)
        scaled = branch.scaled or not model.llm.gemma
        branches.append(BranchConfig("", made, scaled))
    return dataclasses.replace(model, branches=tuple(branches), prune=None)


def _differences(one: object, other: object, where: str) -> Iterator[tuple[str, object, object]]:
    """Path, value and other value of each field in which two configs differ."""
    if type(one) is type(other) and dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            name = f"{where}.{field.name}" if where else field.name
            yield from _differences(getattr(one, field.name), getattr(other, field.name), name)
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, f"{where}[{i}]")
    elif one != other:
        yield where, one, other


def _own_rows(source: Source, rows: int, llm: Tensors) -> int:
    """Of a vocabulary's rows those that no conversion appended for the picture, see `_Longer`."""
    key = next((k for k in ("image_token_id", "image_token_index") if k in source.config), "")
    first = source.config.get(key)
    if not isinstance(first, int) or not 0 < first < rows:
        return rows
    for tensor in _vocabulary(source, llm).values():
        longer = _Longer(_Shorter(tensor, first), rows)
        if not np.array_equal(longer[first:rows], tensor[first:rows]):
            return rows
    return first


def _vocabulary(source: Source, tensors: Tensors) -> Tensors:
    """Of the LLM's tensors those with a row a token: the embedding, and a head of its own."""
    (names,) = ((rule.source, rule.like) for rule in source.table("llm").rules if rule.like)
    return {name: tensors[name] for name in names if name in tensors}


def _resized(source: Source, tensors: Tensors, rows: int) -> Tensors:
    """The LLM's tensors with a vocabulary of `rows`."""
    out = dict(tensors)
    for name, tensor in _vocabulary(source, tensors).items():
        if tensor.shape[0] != rows:
            out[name] = (_Longer if tensor.shape[0] < rows else _Shorter)(tensor, rows)
    return out


class _Shorter:
    """The first rows of a matrix."""

    def __init__(self, tensor: LazyTensor, rows: int):
        self.tensor, self.shape, self.dtype = tensor, (rows, *tensor.shape[1:]), tensor.dtype

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        return self.tensor[start:stop]


CHUNK = 1024
"""Rows of a matrix that are added up at a time, always alike, so that sums are the same."""


class _Longer:
    """A matrix with rows appended, each the mean of its own: no token's logit is then the largest.

    Transformers' conversions draw them about that mean.
    """

    def __init__(self, tensor: LazyTensor, rows: int):
        self.tensor, self.shape, self.dtype = tensor, (rows, *tensor.shape[1:]), tensor.dtype
        self._row: np.ndarray | None = None
        self._lock = threading.Lock()

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        own = self.tensor.shape[0]
        if stop <= own:
            return self.tensor[start:stop]
        more = np.broadcast_to(self._mean(), (stop - max(start, own), *self.shape[1:]))
        return more if start >= own else np.concatenate([self.tensor[start:own], more])

    def _mean(self) -> np.ndarray:
        with self._lock:
            if self._row is None:
                own, total = self.tensor.shape[0], np.zeros(self.shape[1:], np.float64)
                for start in range(0, own, CHUNK):
                    part = self.tensor[start : min(start + CHUNK, own)]
                    total += part.astype(np.float64).sum(axis=0)
                self._row = (total / own).astype(self.dtype)
            return self._row
