"""A fusion loaded from its members' folders, in any of its modes, with nothing written between."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from converters.fuse import Fusion, Request, check_request, open_member
from converters.load import float_dtype, read_llm, read_model
from converters.vocabulary import BASE
from vfjax import CacheFusion, InputError, LogitsFusion, MemberProcessors, Model, Processor

MODES = ("tokens", "cache", "logits")
"""How members may be combined."""


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
        options: the other attributes of `Request`, without `out`; "cache" has positions and mask
            of its own, and "logits" needs no more than `base`, `towers` and `dtype`.

    Raises:
        InputError: as `fuse`; of NaN, when it is met.
    """
    if mode not in MODES:
        raise InputError(
            "mode", found=repr(mode), expected=" or ".join(map(repr, MODES)), fix="choose one"
        )
    request = Request(members, "", **options)
    if mode == "logits":
        return _side_by_side(request, mesh, progress)
    fusion = Fusion(request)
    merged, processor = read_model(fusion.source(), mesh, None, progress)
    if mode == "tokens":
        return merged, processor
    dtype = np.dtype(merged.llm.embedding.dtype)
    sources = [source for name, source in fusion.opened.items() if name != BASE]
    llms = [read_llm(source, mesh, dtype, progress) for source in sources]
    owners = [i for i, source in enumerate(sources) for _ in source.branches]
    return CacheFusion(merged, llms, owners), processor


def _side_by_side(
    request: Request, mesh: Mesh | None, progress: Callable[[int], object]
) -> tuple[LogitsFusion, MemberProcessors]:
    """All members as they are."""
    check_request(request)
    dtype = float_dtype(request.dtype)
    loaded = [
        read_model(open_member(path, request), mesh, dtype, progress)
        for path in request.members.values()
    ]
    models, processors = zip(*loaded, strict=True)
    return LogitsFusion(models), MemberProcessors(processors)
