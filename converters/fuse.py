"""Members' folders -> one fused folder: merged LLM, branches as they are; files to files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.adapters import named_base
from converters.export import to_bytes, with_dtype
from converters.layouts import TOKENIZERS, Source, open_source
from converters.load import TOKENIZER_FILES, abstract, check, float_dtype, model_config
from converters.tables.visionfuse import KINDS, fused_config
from converters.writer import sha256, write_folder
from vfjax import InputError, __version__
from vfjax.merge import LazyTensor, check_family, merge
from vfjax.prompts import get_template

Tensors = dict[str, LazyTensor]


def fuse(
    members: Mapping[str, str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    method: str = "task_arithmetic",
    params: Mapping[str, Any],
    export: str = "model",
    template: str | None = None,
    dtype: Any = None,
    router: str = "merged",
    towers: Mapping[str, str | Path] | None = None,
    shard_bytes: float = 5e9,
    progress: Callable[[int], object] | None = None,
) -> Source:
    """Fuses MLLMs of one family (VisionFuse, arXiv 2412.01289) and writes the result.

    Args:
        members: name -> folder, in the order in which their visual tokens will be read.
        out: folder to make.
        base: folder of the LLM that all members were fine-tuned from; members that are adapters or
            projectors are completed from the LLM that they name, or else from this one.
        method: a key of `vfjax.merge.METHODS`.
        params: the method's parameters, such as {"weights": [0.5, 0.5]}.
        export: "model" writes merged LLM and branches; "llm" a plain Hugging Face causal LM.
        template: prompt template; the first member's by default.
        dtype: of the merged LLM; the base's by default.
        router: embeddings of the prompt that a connector reads (SliME's router): "merged", the
            fused LLM's, or "member", the member's own, which are then kept beside it.
        towers: see `converters.load`.
        shard_bytes: largest size of a weights file.
        progress: called with the number of bytes after each write.

    Returns:
        The fused folder, opened.

    Raises:
        InputError: members of different families, unreadable folders, wrong arguments, NaN in a
            source, `out` exists, disk full; nothing is left at `out` then.
    """
    out = Path(out)
    _check_request(members, out, export, template, router)
    opened = {
        name: open_source(path, towers=towers, base=named_base(path, towers) or base)
        for name, path in members.items()
    }
    if base is not None:
        opened = {BASE: open_source(base), **opened}
    check_family({name: source.llm for name, source in opened.items()})
    tensors = {name: _mapped(source) for name, source in opened.items()}
    llms = {name: parts["llm"] for name, parts in tensors.items()}
    merged = merge(llms.pop(BASE, None), llms, method, params, dtype=float_dtype(dtype))
    result = _describe(opened, out, template)
    result.llm = with_dtype(result.llm, merged["model.embed_tokens.weight"].dtype)
    if export == "llm":
        config = result.llm
    else:
        for name, source in opened.items():
            merged |= _branch_tensors(name, source, tensors[name])
        if router == "member":
            merged |= _own_embeddings(result, opened, llms)
        config = fused_config(result, _recipe(opened, method, params))
    files: dict[str, bytes | Path] = {
        "config.json": to_bytes(config),
        **_tokenizer_files(opened, export),
    }
    write_folder(out, {"": merged}, files=files, shard_bytes=shard_bytes, progress=progress)
    return open_source(out)


BASE = "base"
"""The base's label among the members."""

ROUTERS = ("merged", "member")
"""Whose embeddings of the prompt a connector reads."""

EMBEDDING = "embedding.weight"
"""The member's embedding among the tensors of a connector that reads the prompt."""


def _check_request(
    members: Mapping[str, str | Path], out: Path, export: str, template: str | None, router: str
) -> None:
    bad = [name for name in members if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == BASE]
    if not members or bad:
        raise InputError(
            "members",
            found=f"the name {bad[0]!r}" if bad else "none",
            expected=f"names of letters, digits, - and _, other than {BASE!r}",
            fix="rename the member" if bad else "name at least one",
        )
    if export not in ("model", "llm"):
        raise InputError(
            "export", found=repr(export), expected="'model' or 'llm'", fix="choose one"
        )
    if router not in ROUTERS:
        raise InputError(
            "router", found=repr(router), expected="'merged' or 'member'", fix="choose one"
        )
    if template is not None:
        get_template(template)
    if out.exists():
        raise InputError(
            out,
            found="an existing path",
            expected="a new folder",
            fix="remove it or choose another",
        )


def _mapped(source: Source) -> dict[str, Tensors]:
    """Component -> the tensors that its parameters need; the ignorable ones are left behind.

    Raises:
        InputError: parameters and tensors don't fit one to one.
    """
    _, shapes = abstract(model_config(source).build)
    return {
        part: {
            one.source: source.parts[part][one.source]
            for path, rule in rules.items()
            for one in rule.each(shapes[path].shape)
        }
        for part, rules in check(source, shapes).items()
    }


def _branch_name(member: str, source: Source, branch: str) -> str:
    """A member with several branches (itself fused) keeps their names behind its own."""
    return member if len(source.branches) == 1 else f"{member}-{branch}"


def _branch_tensors(member: str, source: Source, parts: Mapping[str, Tensors]) -> Tensors:
    out: Tensors = {}
    for branch in source.branches:
        name = _branch_name(member, source, branch["name"])
        for kind in KINDS:
            tensors = parts.get(f"branches.{branch['name']}.{kind}", {})  # few have an aux
            out |= {f"branches.{name}.{kind}.{key}": value for key, value in tensors.items()}
    return out


def _own_embeddings(
    result: Source, opened: Mapping[str, Source], llms: Mapping[str, Tensors]
) -> Tensors:
    """Embeddings of the members whose connectors read the prompt; says so in `result`."""
    reads = {b.name for b in model_config(result).branches if b.views.reads_text}
    owners = {
        _branch_name(member, source, branch["name"]): member
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


def _describe(opened: Mapping[str, Source], out: Path, template: str | None) -> Source:
    """The fused folder's normal form: all members' branches, the reference's LLM."""
    reference = next(iter(opened.values()))
    members = {name: source for name, source in opened.items() if name != BASE}
    branches = [
        {**branch, "name": _branch_name(name, source, branch["name"])}
        for name, source in members.items()
        for branch in source.branches
    ]
    first = next(iter(members.values()))
    llm = {**reference.llm, "architectures": [reference.table("llm").architecture]}
    return Source(out, "visionfuse", {}, llm, branches, template or first.template)


def _recipe(opened: Mapping[str, Source], method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What was done, from what: every source file by its SHA-256."""
    return {
        "method": method,
        "params": dict(params),
        "sources": {
            name: {file: sha256(path) for file, path in source.weight_files().items()}
            for name, source in opened.items()
        },
        "vfjax": __version__,
    }


def _tokenizer_files(opened: Mapping[str, Source], export: str) -> dict[str, Path]:
    """The first folder's that has a tokenizer: for a model the members', for an LLM the base's."""
    order = list(opened.values())
    if export == "model" and BASE in opened:
        order = order[1:] + order[:1]
    for source in order:
        files = {n: source.home / n for n in TOKENIZER_FILES if (source.home / n).is_file()}
        if any(name in files for name in TOKENIZERS):
            return files
    return {}
