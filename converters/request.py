"""What `fuse` and its kin are asked for."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.files.writer import check_new
from converters.vocabulary import BASE
from vfjax import InputError
from vfjax.fusion.segments import MASKS, POSITIONS
from vfjax.merge import METHODS
from vfjax.text.chat import known

ROUTERS = ("merged", "member")
"""Whose embeddings of the prompt a connector reads."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to fuse, and how; `fuse` and `dry_run` take these arguments.

    Attributes:
        members: name -> folder, in the order in which their visual tokens will be read.
        out: folder to make.
        base: folder of the LLM that all members were fine-tuned from; members that are adapters or
            projectors are completed from the LLM that they name, or else from this one.
        method: a key of `vfjax.merge.METHODS`.
        params: the method's parameters, such as {"weights": (0.5, 0.5)}; each may vary over the
            layers, see `vfjax.merge.from_config`. Weights are 1 / members each by default.
        rules: (regex, changes) for the tensors whose names have it, see there; for example
            ("embed_tokens|lm_head", {"take": "base"}).
        recipe: a mergekit YAML file, in place of members, base, method, params and rules.
        export: "model" writes merged LLM and branches; "llm" a plain Hugging Face causal LM.
        template: prompt template; the first member's by default.
        dtype: of the merged LLM; by default that of the base's tensors, without a base of the first
            member's; a recipe's as mergekit has it.
        positions: of the branches' tokens, "running" or "parallel", see `vfjax.model.ModelConfig`.
        mask: "causal", or "block": a branch's tokens don't see another's.
        router: embeddings of the prompt that a connector reads (SliME's router): "merged", the
            fused LLM's, or "member", the member's own, which are then kept beside it.
        towers: see `converters.load`.
        vocab: where the models have other numbers of tokens, which must be the same up to the end
            of the shortest: "base" keeps the base's, a member's name that member's. None is an
            error then. What is dropped or added is logged, and stands in MERGE.md.
        family: refuse members whose weights are not a fine-tune of the base (without one: of the
            first member's origin), see `vfjax.merge.compatibility.check_weights`. A recipe is
            not checked.
        seed: of methods that draw random numbers.
        shard_bytes: largest size of a weights file.
        checksums: take the SHA-256 of all source files, for config.json and MERGE.md.
        account: count what the members did to the base, for MERGE.md.
    """

    members: Mapping[str, str | Path]
    out: str | Path
    base: str | Path | None = None
    method: str = "task_arithmetic"
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Sequence[Any] = ()
    recipe: str | Path | None = None
    export: str = "model"
    template: str | None = None
    dtype: Any = None
    positions: str = "running"
    mask: str = "causal"
    router: str = "merged"
    towers: Mapping[str, str | Path] | None = None
    vocab: str | None = None
    family: bool = True
    seed: int = 0
    shard_bytes: float = 5e9
    checksums: bool = True
    account: bool = True


OPTIONS = tuple(x.name for x in dataclasses.fields(Request) if x.name not in ("members", "out"))
"""The other attributes of `Request`."""


def make_request(
    members: Mapping[str, str | Path],
    out: str | Path,
    options: Mapping[str, Any],
    known: Sequence[str] = OPTIONS,
    where: str = "options",
) -> Request:
    """A request; raises InputError, at `where`, for the first option that is not a known one."""
    if unknown := [name for name in options if name not in known]:
        raise InputError(
            where, found=unknown[0], expected=", ".join(known), fix="correct it or leave it out"
        )
    return Request(members, out, **options)


def check_request(request: Request) -> None:
    """Raises InputError for an argument that is wrong whatever the members hold."""
    members, out = request.members, Path(request.out)
    if not isinstance(members, Mapping):
        raise InputError(
            "members",
            found=type(members).__name__,
            expected="names -> folders",
            fix="write {'a': 'path/to/a', 'b': 'path/to/b'}",
        )
    bad = [name for name in members if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == BASE]
    if bad or bool(members) == (request.recipe is not None):
        raise InputError(
            "members",
            found=f"the name {bad[0]!r}" if bad else ", ".join(members) or "none",
            expected=f"names of letters, digits, - and _, other than {BASE!r}; none with a recipe",
            fix="rename the member" if bad else "name members, or a recipe",
        )
    one = request.method in METHODS and METHODS[request.method].takes[1] == 1
    if len(members) == 1 and not one:
        (folder,) = members.values()
        raise InputError(
            "members",
            found=f"one, {str(folder)!r}",
            expected="two or more to fuse",
            fix=f"name the others behind a comma, ({str(folder)!r}, 'path/to/another'); a mergekit "
            "YAML merges one model with its base",
        )
    choices: dict[str, tuple[str, ...]] = {
        "export": ("model", "llm"),
        "router": ROUTERS,
        "positions": POSITIONS,
        "mask": MASKS,
    }
    if request.vocab is not None:
        choices["vocab"] = (BASE, *members)
    for key, allowed in choices.items():
        if getattr(request, key) not in allowed:
            raise InputError(
                key,
                found=repr(getattr(request, key)),
                expected=" or ".join(map(repr, allowed)),
                fix="choose one",
            )
    if request.recipe is not None and (request.params or request.rules or request.base):
        raise InputError(
            "recipe",
            found="params, rules or base beside it",
            expected="it alone",
            fix="write them in the recipe",
        )
    if request.template is not None:
        known(request.template)
    if str(request.out):
        check_new(out)
