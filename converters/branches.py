"""Tensors of the members' branches, under the names that they have in a fused folder."""

import dataclasses
from collections.abc import Mapping

from converters.load import model_config
from converters.source import Branch, Source
from vfjax.merge import LazyTensor

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


def own_embeddings(
    result: Source, opened: Mapping[str, Source], llms: Mapping[str, Tensors]
) -> tuple[tuple[Branch, ...], Tensors]:
    """The result's branches with embeddings of their own where the prompt is read, and those."""
    reads = {b.name for b in model_config(result).branches if b.architecture.reads_text}
    owners = {
        branch_name(member, source, branch.name): member
        for member, source in opened.items()
        for branch in source.branches
    }
    branches, out = [], {}
    for branch in result.branches:
        if branch.name in reads and not branch.connector.get("vocab"):  # fused before, it has one
            table = llms[owners[branch.name]]["model.embed_tokens.weight"]
            connector = {**branch.connector, "vocab": table.shape[0]}
            branch = dataclasses.replace(branch, connector=connector)
            out[f"branches.{branch.name}.connector.{EMBEDDING}"] = table
        branches.append(branch)
    return tuple(branches), out
