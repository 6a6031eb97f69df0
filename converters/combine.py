"""A fusion loaded from its members' folders, in any of its modes, with nothing written between."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from converters.fingerprint import fingerprint
from converters.folder import open_members
from converters.fusion import Fusion
from converters.load import float_dtype, read_llm, read_model
from converters.request import Request, by_name, check_request
from converters.vocabulary import BASE
from vfjax import CacheFusion, LogitsFusion, MemberProcessors, Model, Processor
from vfjax.atomic import JSON
from vfjax.errors import check, one_of
from vfjax.processes import agreeing, owners

WRITTEN = ("members", "out", "export", "shard_bytes", "checksums", "account")
"""Attributes of `Request` that are no options here."""

PATHS = {"members", "out", "base", "towers", "recipe"}
"""Attributes of `Request` that another host may have elsewhere."""

MODES = {
    "tokens": (),
    "cache": ("positions", "mask"),
    "logits": (
        *("method", "params", "rules", "recipe", "template", "positions", "mask", "router"),
        *("vocab", "family", "seed"),
    ),
    "whole": ("positions", "mask", "router"),
}
"""How members may be combined -> the options that it does not use."""


@by_name
def load_fused(  # noqa: D417  (`fuse` has the others)
    members: Mapping[str, str | Path],
    *,
    mode: str = "tokens",
    base: str | Path | None = None,
    method: str = "task_arithmetic",
    params: Mapping[str, JSON] | None = None,
    rules: Sequence[tuple[str, Mapping[str, JSON]]] = (),
    recipe: str | Path | None = None,
    template: str | None = None,
    dtype: DTypeLike | None = None,
    positions: str = "running",
    mask: str = "causal",
    router: str = "merged",
    towers: Mapping[str, str | Path] | None = None,
    vocab: str | None = None,
    family: bool = True,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> tuple[Model | CacheFusion | LogitsFusion, Processor | MemberProcessors]:
    """A fusion from its members' folders, with nothing written between.

    The host merges each tensor as it is asked for, and puts it where `mesh` has it.

    Args:
        members: name -> folder, as of `fuse`; so are the arguments from `base` to `seed`.
        mode: "tokens", one merged LLM reads all branches: what `load` reads of what `fuse` writes;
            "cache", each branch is read by its member's LLM (`vfjax.CacheFusion`), which has
            positions and mask of its own; "logits", nothing is merged and probabilities are
            averaged (`vfjax.LogitsFusion`): of the arguments it uses `base`, `dtype` and `towers`;
            or "whole", towers and connectors are merged, too: what `fuse` writes so.
        mesh: see `load`.
        progress: see `load`.

    Raises:
        InputError: as `fuse`; an argument that the mode does not use; of NaN, when it is met.
    """
    check([one_of("mode", mode, MODES)], fix="choose one")
    request = Request(
        members,
        "",
        base=base,
        method=method,
        params=params,
        rules=rules,
        recipe=recipe,
        template=template,
        dtype=dtype,
        positions=positions,
        mask=mask,
        router=router,
        towers=towers,
        vocab=vocab,
        family=family,
        seed=seed,
        export="whole" if mode == "whole" else "model",
        account=False,
    )
    _check_used(request, mode)
    if mode == "logits":
        return _side_by_side(request, mesh, progress)
    with agreeing("load_fused", processes := owners(mesh), patience=math.inf) as facts:
        fusion = Fusion(request)
        facts |= fusion.facts() if len(processes) > 1 else {}
        facts |= {"mode": mode}
        facts |= {n: str(x) for n, x in dataclasses.asdict(request).items() if n not in PATHS}
    merged, processor = read_model(fusion.source(), mesh, None, progress)
    if mode in ("tokens", "whole"):
        return merged, processor
    stored = np.dtype(merged.llm.embedding.dtype)
    sources = [source for name, source in fusion.opened.items() if name != BASE]
    llms = [read_llm(source, mesh, stored, progress) for source in sources]
    readers = [i for i, source in enumerate(sources) for _ in source.branches]
    least = min(llm.config.vocab for llm in (merged.llm, *llms))  # each embeds the prompt itself
    config = processor.config
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=least))
    return CacheFusion(merged, llms, readers), dataclasses.replace(processor, config=config)


def _check_used(request: Request, mode: str) -> None:
    """Raises InputError for an option, not at its default, that a mode does not use."""
    options = [x for x in dataclasses.fields(Request) if x.name not in WRITTEN]
    used = ", ".join(x.name for x in options if x.name not in MODES[mode])
    check(
        (f"options of mode {mode!r}", x.name, getattr(request, x.name) == x.default, used)
        for x in options
        if x.name in MODES[mode]
    )


def _side_by_side(
    request: Request, mesh: Mesh | None, progress: Callable[[int], object]
) -> tuple[LogitsFusion, MemberProcessors]:
    """All members as they are."""
    check_request(request)
    dtype = float_dtype(request.dtype)
    with agreeing("load_fused", processes := owners(mesh), patience=math.inf) as facts:
        sources = open_members(request.members, request.base, request.towers)
        for name, source in sources.items() if len(processes) > 1 else ():
            facts |= fingerprint(source, name)
    loaded = [read_model(source, mesh, dtype, progress) for source in sources.values()]
    models, processors = zip(*loaded, strict=True)
    return LogitsFusion(models), MemberProcessors(processors)
