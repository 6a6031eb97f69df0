"""A model back to checkpoint files, by the same tables, read the other way."""

import json
import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from converters.files.names import PROCESSOR_FILES, README, TOKENIZER_FILES
from converters.files.push import check_push, push
from converters.files.reader import read_file
from converters.files.writer import Content, write_folder
from converters.folder import open_source
from converters.layouts import Files, relaid, written_as
from converters.load import (
    Params,
    check,
    flatten,
    load,
    model_config,
    part_of,
    structure,
)
from converters.model_card import readme
from converters.origin import Origin, from_source, origin_of
from converters.params.table import Rule, restored
from converters.registry import find
from converters.source import Source
from converters.towers import Prefixes, Tensors, slot_of
from vfjax import InputError, Model
from vfjax.atomic import JSON
from vfjax.merge import LazyTensor
from vfjax.processes import together


def export(
    model: Model | str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    like: Model | None = None,
    towers: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    shard_bytes: float = 5e9,
    progress: Callable[[int], object] | None = None,
    remote_code: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> None:
    """Writes a model in the layout and under the names that it was loaded from, or in another.

    A tower that was read from a folder of its own is written to `vision_tower/` (a second one to
    `vision_tower_aux/`) inside `out`, where `converters.load` finds it; one that the checkpoint
    holds has its configs there. Tokenizer and preprocessor files, and tensors that the model does
    not read, are copied from the folder that it came from. On several processes only the first
    writes.

    Another layout is transformers' ("hf": LlavaForConditionalGeneration, LlavaNext, LlavaOnevision)
    or that of LLaVA's authors ("llava"). The new folder answers as the old one; what its layout
    cannot say is refused, and what its code does otherwise in a detail is warned of. Pictures are
    opened as each code opens them: transformers turns a file as its EXIF data say and lays what is
    transparent on white, the authors do neither. Where torchvision is installed, transformers
    resizes by it unless `AutoProcessor.from_pretrained` is told backend="pil"; then pixels are the
    authors' to the byte. An embedding without a row for `<image>` is made longer, and shorter on
    the way back.

    Args:
        model: made by `converters.load`; its parameters may have changed. Or its folder, which is
            read block by block with `layout`, and loaded without.
        out: folder to make.
        layout: "hf" or "llava"; None: the one that the model came in.
        like: the model that was loaded, where `model` is another object of its structure, as
            `nnx.merge` and `jax.tree.map` make them.
        towers: of a folder, see `load`.
        base: of a folder, see `load`.
        shard_bytes: largest size of a weights file.
        progress: called with the number of bytes after each write.
        remote_code: add the code with which transformers runs a fused folder without vfjax, by
            `trust_remote_code=True`; needs torch. See `converters.hf.remote.add_code`.
        push_to_hub: `org/name` on the Hugging Face hub, where the folder is sent to, too, with a
            model card, in one commit.
        private: whether that is made so that others do not see it; None: as the account has it.

    Raises:
        InputError: `out` exists, the model was not loaded or has int8 weights, the folder it came
            from is gone or has other tensors now, `layout` has no words for the model, or the disk
            fills up; nothing is left then. `remote_code` of a folder that is not a fused one, or
            where torch lacks a branch. No login, or one that may not write to `push_to_hub`, before
            anything is done; or the hub refuses it then: `out` is whole.
    """
    if remote_code and layout is not None:
        raise InputError(
            "remote_code",
            found=f"True, and layout {layout!r}",
            expected="one of them: other layouts are of classes that transformers has",
            fix="leave one out",
        )
    if layout is None and not isinstance(model, Model):
        model, _ = load(model, towers=towers, base=base)
    if isinstance(model, Model):
        source, origin = None, _origin(model, like)
    else:
        source = open_source(model, towers=towers, base=base)
        origin = from_source(source)
    if remote_code:
        from converters.hf import remote  # torch, which takes seconds

        remote.check_place(out)
        remote.check(open_source(origin.home))
    repo = None
    if push_to_hub is not None:
        with together("push_to_hub"):
            if jax.process_index() == 0:
                repo = check_push(push_to_hub, out, private)
    params = _on_hosts(flatten(nnx.split(model)[1])) if isinstance(model, Model) else {}
    if jax.process_index():
        return
    if source is not None:
        weights, files = _relaid(source, layout or "", _tensors(source))
    elif layout is not None and not written_as(origin.source, layout):
        weights, files = _relaid(origin.source, layout, _exported(origin, params))
    else:
        weights = _as_it_came(origin, params)
        files = config_files(origin, np.dtype(params["llm/embedding"].dtype))
    if repo is not None:
        recipe = origin.config.get("recipe")
        merge = recipe if origin.kind == "fused" and isinstance(recipe, Mapping) else None
        kind = {"hf": "transformers", "llava": "authors"}.get(layout or "", origin.kind)
        files[README] = readme(repo.name, kind, origin.made_of, merge, remote_code)
    write_folder(out, weights, files=files, shard_bytes=shard_bytes, progress=progress)
    if remote_code:
        remote.add_code(out)
    if repo is not None:
        push(Path(out), repo, private)


def _origin(model: Model, like: Model | None) -> Origin:
    """The checkpoint of a model that can be written.

    Raises:
        InputError: it was not loaded or has int8 weights, or the folder that it came from is gone.
    """
    origin = origin_of(model if like is None else like)
    if any(x.dtype == np.int8 for x in jax.tree.leaves(nnx.state(model))):
        raise InputError(
            "model",
            found="int8 weights",
            expected="those of its checkpoint",
            fix="export the model as it was loaded without int8",
        )
    if not origin.home.is_dir():
        raise InputError(
            origin.home,
            found="no folder",
            expected="the checkpoint that the model was loaded from, for its tokenizer files",
            fix="put it back",
        )
    return origin


def _as_it_came(origin: Origin, params: Params) -> dict[str, dict[str, LazyTensor]]:
    """Sub-folder -> name -> tensor, in the layout that the model came in."""
    parts: dict[str, dict[str, list[tuple[nnx.Variable, Rule]]]] = {"": {}}
    for name, (rule, prefixes, folder) in targets(origin, params).items():
        target = parts.setdefault(folder, {})
        for one in rule.each(params[name].shape):
            target.setdefault(restored(one.source, prefixes), []).append((params[name], one))
    weights: dict[str, dict[str, LazyTensor]] = {
        folder: {name: _Exported(pieces) for name, pieces in tensors.items()}
        for folder, tensors in parts.items()
    }
    for folder, name, tensor in _spare(origin, weights):
        weights[folder][name] = tensor
    return weights


def _tensors(source: Source) -> dict[str, Tensors]:
    """Component -> its tensors that a model reads, of an opened folder."""
    params = structure(model_config(source))[1]
    return {
        part: {
            one.source: source.parts[part][one.source]
            for name, rule in rules.items()
            for one in rule.each(params[name].shape)
        }
        for part, rules in check(source, params).items()
    }


def _exported(origin: Origin, params: Params) -> dict[str, Tensors]:
    """Component -> its tensors, of a model's parameters."""
    pieces: dict[str, dict[str, list[tuple[nnx.Variable, Rule]]]] = {}
    for name, (rule, _, _) in targets(origin, params).items():
        found = pieces.setdefault(part_of(name)[0], {})
        for one in rule.each(params[name].shape):
            found.setdefault(one.source, []).append((params[name], one))
    return {p: {n: _Exported(x) for n, x in tensors.items()} for p, tensors in pieces.items()}


def _relaid(
    source: Source, layout: str, tensors: Mapping[str, Tensors]
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, Content]]:
    """Weights and files of `relaid`; config.json names the dtype of the largest tensor."""
    weights, found = relaid(source, layout, tensors)
    dtype = max(weights.values(), key=lambda tensor: math.prod(tensor.shape)).dtype
    config = found["config.json"]
    assert not isinstance(config, bytes)
    texts: Files = {**found, "config.json": with_dtype(config, dtype)}
    files = {name: x if isinstance(x, bytes) else to_bytes(x) for name, x in texts.items()}
    return {"": weights}, dict[str, Content](files)


def config_files(origin: Origin, dtype: np.dtype) -> dict[str, Content]:
    """All files of a folder but its weights.

    Args:
        origin: what it is like.
        dtype: of its LLM's weights.
    """
    own = () if origin.created else PROCESSOR_FILES
    places = {name: origin.home / name for name in (*TOKENIZER_FILES, *own)}
    if origin.base is not None:
        beside = any(places[name].is_file() for name in own)
        kept = ("generation_config.json", *(() if beside else own))
        places |= {name: origin.base / name for name in kept}
    files = {name: path for name, path in places.items() if path.is_file()}
    texts: dict[str, Mapping[str, Any]] = {"config.json": with_dtype(origin.config, dtype)}
    for part, tower in {**origin.towers, **origin.held}.items():
        for file, value in tower.items():
            texts[f"{slot_of(part.split('.')[-1])}/{file}"] = value
    return {**files, **{name: to_bytes(value) for name, value in texts.items()}}


def to_bytes(value: JSON) -> bytes:
    """A JSON file's content."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # which writes half a character as JSON does


def targets(origin: Origin, params: Params) -> dict[str, tuple[Rule, Prefixes, str]]:
    """Parameter name -> its rule, its component's prefixes, the sub-folder it is written to."""
    out = {}
    for part, config in origin.components.items():
        names = {path: name for name in params for p, path in [part_of(name)] if p == part}
        table, folder = find(config, part), folder_of(part, origin.towers)
        for path, rule in table.match({path: params[n].shape for path, n in names.items()}).items():
            out[names[path]] = (rule, origin.prefixes[part], folder)
    return out


def folder_of(part: str, towers: Container[str]) -> str:
    """The sub-folder that a component's tensors are written to; `towers` have one of their own."""
    return slot_of(part.split(".")[-1]) if part in towers else ""


def _spare(
    origin: Origin, weights: Mapping[str, Mapping[str, LazyTensor]]
) -> Iterator[tuple[str, str, LazyTensor]]:
    """Sub-folder, name and values of each tensor that the model lacks, as its file has it."""
    files: dict[Path, Mapping[str, LazyTensor]] = {}
    for part, places in origin.spare.items():
        folder = folder_of(part, origin.towers)
        for name, path in places.items():
            if name in weights[folder]:  # one that some models have, and this one has
                continue
            if not isinstance(path, Path):
                yield folder, name, path
                continue
            if path not in files:
                files[path] = read_file(path) if path.is_file() else {}
            if name not in files[path]:
                raise InputError(
                    f"{path}: {name}",
                    found="no such tensor any more",
                    expected="the file that the model was loaded from, to copy what it left there",
                    fix="put it back",
                )
            yield folder, name, files[path][name]


def with_dtype(config: Mapping[str, JSON], dtype: np.dtype) -> dict[str, Any]:
    """A config.json that names this dtype, under the keys of its transformers version."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype.name)}


def _on_hosts(params: Params) -> Params:
    """Parameters that this process can read; others are gathered."""
    for name, param in params.items():
        value = param.get_value()
        if not value.is_fully_addressable:
            gathered = multihost_utils.process_allgather(value, tiled=True)
            params[name] = param.replace(gathered if jax.process_index() == 0 else None)
    return params


class _Exported:
    """Parameters as the checkpoint tensor they came from; the host holds it while it is written."""

    def __init__(self, pieces: Sequence[tuple[nnx.Variable, Rule]]):
        self.pieces = sorted(pieces, key=lambda piece: piece[1].part)
        param, rule = pieces[0]
        self.shape = rule.source_shape(param.shape)
        self.dtype = np.dtype(param.dtype)
        self._unread = self.shape[0] if self.shape else 1
        self._host: np.ndarray | None = None
        self._lock = threading.Lock()

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        with self._lock:
            if self._host is None:
                parts = [rule.to_source(_to_host(p.get_value(), rule)) for p, rule in self.pieces]
                self._host = np.concatenate(parts) if len(parts) > 1 else parts[0]
            part = self._host[rows]
            self._unread -= part.shape[0] if part.shape else 1
            if self._unread <= 0:  # read once through: the writer is done with it
                self._host, self._unread = None, self.shape[0] if self.shape else 1
            return part


def _to_host(value: jax.Array | np.ndarray, rule: Rule) -> np.ndarray:
    """The rule's values, without leaving JAX a second copy that lives as long as the array."""
    if rule.row is not None:
        return np.asarray(value[rule.row])
    return np.asarray(value if isinstance(value, np.ndarray) else jnp.copy(value))
