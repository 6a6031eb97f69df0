"""A fusion loaded from its members' folders, in any of its modes, with nothing written between."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from converters.fingerprint import fingerprint
from converters.fuse import Fusion, open_member
from converters.load import float_dtype, read_llm, read_model
from converters.request import OPTIONS, Request, check_request, make_request
from converters.vocabulary import BASE
from vfjax import CacheFusion, InputError, LogitsFusion, MemberProcessors, Model, Processor
from vfjax.processes import agreeing, owners

WRITTEN = ("export", "shard_bytes", "checksums", "account")
"""Options of what is written alone."""

MERGED = tuple(name for name in OPTIONS if name not in WRITTEN)

PATHS = {"base", "towers", "recipe"}
"""Options that another host may have elsewhere."""

MODES = {
    "tokens": MERGED,
    "cache": tuple(name for name in MERGED if name not in ("positions", "mask")),
    "logits": ("base", "dtype", "towers"),
}
"""How members may be combined -> the options of `Request` that it uses."""


def load_fused(
    members: Mapping[str, str | Path],
    *,
    mode: str = "tokens",
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
    **options: Any,
) -> tuple[Model | CacheFusion | LogitsFusion, Processor | MemberProcessors]:
    """A fusion from its members' folders, with nothing written between.

    The host merges each tensor as it is asked for, and puts it where `mesh` has it.

    Args:
        members: see `Request`.
        mode: "tokens", one merged LLM reads all branches: what `load` reads of what `fuse` writes;
            "cache", each branch is read by its member's LLM (`vfjax.CacheFusion`), or "logits",
            nothing is merged and probabilities are averaged (`vfjax.LogitsFusion`).
        mesh: see `load`.
        progress: see `load`.
        options: the other attributes of `Request` that the mode uses, see `MODES`: "cache" has
            positions and mask of its own, "logits" has `base`, `dtype` and `towers`.

    Raises:
        InputError: as `fuse`; an option that the mode does not use; of NaN, when it is met.
    """
    if mode not in MODES:
        raise InputError(
            "mode", found=repr(mode), expected=" or ".join(map(repr, MODES)), fix="choose one"
        )
    request = make_request(members, "", options, MODES[mode], f"options of mode {mode!r}")
    request = dataclasses.replace(request, account=False)
    if mode == "logits":
        return _side_by_side(request, mesh, progress)
    with agreeing("load_fused", processes := owners(mesh)) as facts:
        fusion = Fusion(request)
        facts |= fusion.facts() if len(processes) > 1 else {}
        facts |= {"mode": mode} | {key: str(options[key]) for key in sorted({*options} - PATHS)}
    merged, processor = read_model(fusion.source(), mesh, None, progress)
    if mode == "tokens":
        return merged, processor
    dtype = np.dtype(merged.llm.embedding.dtype)
    sources = [source for name, source in fusion.opened.items() if name != BASE]
    llms = [read_llm(source, mesh, dtype, progress) for source in sources]
    readers = [i for i, source in enumerate(sources) for _ in source.branches]
    least = min(llm.config.vocab for llm in (merged.llm, *llms))  # each embeds the prompt itself
    config = processor.config
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=least))
    return CacheFusion(merged, llms, readers), dataclasses.replace(processor, config=config)


def _side_by_side(
    request: Request, mesh: Mesh | None, progress: Callable[[int], object]
) -> tuple[LogitsFusion, MemberProcessors]:
    """All members as they are."""
    check_request(request)
    dtype = float_dtype(request.dtype)
    with agreeing("load_fused", processes := owners(mesh)) as facts:
        sources = {name: open_member(path, request) for name, path in request.members.items()}
        for name, source in sources.items() if len(processes) > 1 else ():
            facts |= fingerprint(source, name)
    loaded = [read_model(source, mesh, dtype, progress) for source in sources.values()]
    models, processors = zip(*loaded, strict=True)
    return LogitsFusion(models), MemberProcessors(processors)
