"""Tensors of the members' branches, under the names that they have in a fused folder."""

from collections.abc import Mapping

from converters.formats.visionfuse import KINDS
from converters.load import model_config
from converters.source import Source
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
        name = branch_name(member, source, branch["name"])
        for kind in KINDS:
            tensors = parts.get(f"branches.{branch['name']}.{kind}", {})  # few have an aux
            out |= {f"branches.{name}.{kind}.{key}": value for key, value in tensors.items()}
    return out


def own_embeddings(
    result: Source, opened: Mapping[str, Source], llms: Mapping[str, Tensors]
) -> Tensors:
    """Embeddings of the members whose connectors read the prompt; says so in `result`."""
    reads = {b.name for b in model_config(result).branches if b.views.reads_text}
    owners = {
        branch_name(member, source, branch["name"]): member
        for member, source in opened.items()
        for branch in source.branches
    }
    out = {}
    for branch in result.branches:
        name = branch["name"]
        if name in reads and not branch["connector"].get("vocab"):  # fused before, it has its own
            table = llms[owners[name]]["model.embed_tokens.weight"]
            branch["connector"] = {**branch["connector"], "vocab": table.shape[0]}
            out[f"branches.{name}.connector.{EMBEDDING}"] = table
    return out
