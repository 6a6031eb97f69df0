"""The members' branches in a fused folder: its normal form, the names of their tensors."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converters.load import model_config
from converters.source import Branch, Source
from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.merge import LazyTensor
from vfjax.text.chat import CHAT_TEMPLATE

Tensors = dict[str, LazyTensor]

EMBEDDING = "embedding.weight"
"""The member's embedding among the tensors of a connector that reads the prompt."""


def branch_name(member: str, source: Source, branch: str) -> str:
    """A member with several branches (itself fused) keeps their names behind its own."""
    return member if len(source.branches) == 1 else f"{member}-{branch}"


def branch_tensors(member: str, source: Source, parts: Mapping[str, Tensors]) -> Tensors:
    """Those of one member; `parts` is its tensors by component."""
    out: Tensors = {}
    for branch in source.branches:
        own = dataclasses.replace(branch, name=branch_name(member, source, branch.name))
        for part, new in zip(branch.parts, own.parts, strict=True):
            out |= {f"{new}.{key}": value for key, value in parts.get(part, {}).items()}
    return out


def first_seeing(opened: Mapping[str, Source], members: Iterable[str]) -> str:
    """The first member that has branches, else the first: it says how the result is prompted."""
    members = list(members)
    return next((name for name in members if opened[name].branches), members[0])


def owners(opened: Mapping[str, Source], members: Iterable[str]) -> dict[str, str]:
    """Name of a branch in the fused folder -> the member that it is of."""
    return {
        branch_name(name, opened[name], branch.name): name
        for name in members
        for branch in opened[name].branches
    }


def joined(
    opened: Mapping[str, Source],
    members: Sequence[str],
    out: Path,
    template: str | None,
    llm: Mapping[str, JSON],
) -> Source:
    """The fused folder's normal form: all members' branches, and `llm`, the config of its LLM."""
    branches = tuple(
        dataclasses.replace(branch, name=branch_name(name, opened[name], branch.name))
        for name in members
        for branch in opened[name].branches
    )
    first = opened[first_seeing(opened, members)]
    template = template or first.template
    if template == CHAT_TEMPLATE and not first.chat_template:
        raise InputError(
            "template",
            found=f"{CHAT_TEMPLATE!r}, and no chat template in {first.path}",
            expected="a first member that has one, or the name of a template",
            fix="name another",
        )
    return Source(
        out,
        "visionfuse",
        {},
        dict(llm),
        branches,
        template,
        chat_template=first.chat_template,
        image_token=first.image_token,
    )


def own_embeddings(
    result: Source, opened: Mapping[str, Source], llms: Mapping[str, Tensors]
) -> tuple[tuple[Branch, ...], Tensors]:
    """The result's branches with embeddings of their own where the prompt is read, and those."""
    reads = {b.name for b in model_config(result).branches if b.architecture.reads_text}
    owner = owners(opened, opened)
    branches, out = [], {}
    for branch in result.branches:
        if branch.name in reads and not branch.connector.get("vocab"):  # fused before, it has one
            table = llms[owner[branch.name]]["model.embed_tokens.weight"]
            connector = {**branch.connector, "vocab": table.shape[0]}
            branch = dataclasses.replace(branch, connector=connector)
            out[f"branches.{branch.name}.connector.{EMBEDDING}"] = table
        branches.append(branch)
    return tuple(branches), out
