"""Says what a checkpoint folder is, from its configs and headers."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapter_config import read_settings
from converters.files import gguf, hub
from converters.files.names import SETTINGS
from converters.files.others import TOWER
from converters.folder import open_source
from converters.load import check, check_depth, model_config, structure, tower_file
from converters.lora import Updated
from converters.params.table import Layered, restored
from converters.processor import processor
from converters.registry import find
from converters.towers import read_tower
from vfjax.errors import counted, shown
from vfjax.sharding import nbytes
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.vision.images import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect(
    path: str | Path,
    base: str | Path | None = None,
    *,
    towers: Mapping[str, str | Path] | None = None,
) -> str:
    """A few lines: layout, LLM, base if known, branches, tensors mapped and not.

    Args:
        path: a folder that `converters.load` reads, or a vision tower's; or a name of the hub.
        base: folder of the LLM that an adapter or a projector at `path` is for.
        towers: name of a vision tower in config.json -> the folder where it is.

    Raises:
        InputError: what `converters.load`, or `load_encoder`, would say of it.
    """
    path = hub.folder(gguf.joined(path, base))
    if file := tower_file(path):
        return shown(_tower(path, file))
    source = open_source(path, towers=towers, base=base)
    config = model_config(source)
    _, params = structure(config)
    llm = config.llm
    lines = [
        f"{source.path}: layout {source.layout}, template {source.template}"
        + (", the folder's own" if source.template == CHAT_TEMPLATE else ""),
        f"llm: {source.llm['model_type']}, {_size(llm)}, {counted(llm.heads, 'head')} "
        f"({llm.kv_heads} for keys), vocabulary {llm.vocab}, context {llm.context}"
        + (", tied head" if llm.tied else "")
        + (", no head" if llm.headless else ""),
        f"base: {source.base or source.config.get('base_model') or 'not said in the checkpoint'}",
    ]
    if source.quantised:
        lines.append(f"quantised: {', '.join(source.quantised)}; read as plain weights")
    if (path / SETTINGS).is_file():
        settings = read_settings(path)
        kind = "DoRA" if settings.get("use_dora") else "LoRA"
        updated = [
            x for part in source.parts.values() for x in part.values() if isinstance(x, Updated)
        ]
        lines.append(
            f"adapter: {kind} of rank {settings['r']}, {counted(len(updated), 'tensor')} of the "
            "base updated"
        )
    if len(config.branches) > 1:
        lines.append(f"visual tokens: {config.positions} positions, {config.mask} mask")
    for branch, parts in zip(config.branches, source.branches, strict=True):
        seen = branch.architecture
        encoders = [
            f"{parts.encoders[name]['model_type']}, {_size(encoder)}, "
            f"taps {list(seen.connector.taps[name])}"
            for name, encoder in seen.encoders.items()
        ]
        own = [source.towers.get(parts.part(name)) for name in seen.encoders]
        folders = dict.fromkeys(
            str(tower.path) if tower and tower.path else "this folder" for tower in own
        )
        lines.append(
            f"branch {branch.name}: {' and '.join(encoders)}, "
            f"{_pixels(seen.images)}, "
            f"{parts.connector.get('mm_projector_type', parts.connector['model_type'])}, "
            f"up to {counted(branch.tokens, 'token')} a picture; tower from {' and '.join(folders)}"
        )
    for part, rules in check(source, params).items():
        tensors = source.parts[part]
        used = {one.source for path, r in rules.items() for one in r.each(params[path].shape)}
        size = sum(nbytes(tensors[name]) for name in used)
        names = {restored(name, source.prefixes[part]) for name in used}
        left = [name for name in source.spare.get(part, ()) if name not in names]
        lines.append(
            f"{part}: {counted(len(used), 'tensor')} mapped, {size:,} bytes; "
            f"{len(left)} known, not read" + (f": {', '.join(summary(left))}" if left else "")
        )
    if words := _beyond(processor(source, config).tokenizer, llm.vocab):
        lines.append(
            f"tokenizer: {counted(len(words), 'token')} without a row: {', '.join(summary(words))}"
        )
    lines += [f"{name}: equal to {like}, not read" for name, like in source.same.items()]
    if source.unread:
        lines.append(
            f"{counted(len(source.unread), 'tensor')} not read, the tower's own folder is used "
            "instead: " + ", ".join(summary(source.unread))
        )
    return shown("\n".join(lines))


def _pixels(images: ImageSpec) -> str:
    if images.resize == "native":
        return "{:,} to {:,} pixels".format(*images.pixels)
    return f"{images.size} px {images.aspect}"


def _size(config: Layered) -> str:
    return f"{counted(config.layers, 'layer')} x {config.width}"


def _tower(path: Path, file: str) -> str:
    """A vision tower's own folder."""
    tower = read_tower(path, file)
    table = find(tower.config, str(path))
    config = table.config(tower.config, str(path))
    check_depth(config, tower.tensors, str(path))
    _, params = structure(config)
    rules = table.check({name: p.shape for name, p in params.items()}, tower.tensors, str(path))
    used = {one.source for name, r in rules.items() for one in r.each(params[name].shape)}
    size, left = sum(nbytes(tower.tensors[name]) for name in used), len(tower.tensors) - len(used)
    given = "with" if tower.preprocessor else "without"
    return "\n".join(
        [
            f"{path}: a vision tower alone, {given} preprocessor_config.json; {TOWER}",
            f"encoder: {tower.config['model_type']}, {_size(config)}, "
            + (f"{config.image_size} px" if hasattr(config, "image_size") else "any size"),
            f"encoder: {counted(len(used), 'tensor')} mapped, {size:,} bytes; "
            f"{left} known, not read",
        ]
    )


def _beyond(tokenizer: "PreTrainedTokenizerBase | None", rows: int) -> list[str]:
    """Tokens of a tokenizer that an embedding has no rows for."""
    words = {} if tokenizer is None else tokenizer.get_vocab()
    return [repr(word) for word, i in words.items() if i >= rows]


def summary(names: Iterable[str]) -> list[str]:
    """Names, those that differ in numbers alone in one: "layers.*.weight (24)"."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    return [f"{each} ({len(own)})" if own[1:] else own[0] for each, own in groups.items()]
