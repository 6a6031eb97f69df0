"""vfjax's own folders: a fused model under the standard names, and a plain causal LM."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters import registry
from converters.chat import read_chat_template
from converters.params.table import Names
from converters.source import TEMPLATE, Branch, Layout, Source, tokenizer_class
from converters.towers import Towers
from converters.values import ANY, REQUIRED, Values
from vfjax.atomic import JSON
from vfjax.fusion.segments import MASKS, POSITIONS
from vfjax.text.chat import CHAT_TEMPLATE


def describe_fused(path: Path, config: Values, towers: Towers) -> Source:
    """A fused folder's config.json is the normal form itself."""
    del towers  # branches are in the folder
    found = config.any("branches", REQUIRED)
    if not isinstance(found, list) or not all(isinstance(branch, Mapping) for branch in found):
        raise config.error("branches", "a list of branches")
    return Source(
        path,
        "visionfuse",
        dict(config.data),
        llm=dict(config.mapping("text_config")),
        branches=tuple(
            _branch(branch, f"{config.where}: branches[{i}]") for i, branch in enumerate(found)
        ),
        template=config.text("template"),
        tokenizer=dict(config.mapping("tokenizer", {})),
        chat_template=read_chat_template(path),
        image_token=config.text("image_token", ""),
        # absent from older folders
        positions=config.choice("positions", POSITIONS, "running"),
        mask=config.choice("mask", MASKS, "causal"),
    )


def _branch(found: Mapping[str, JSON], where: str) -> Branch:
    """A branch, its keys checked."""
    branch = Values(found, where)
    name = branch.text("name")
    if not re.fullmatch(r"[\w-]+", name):
        raise branch.error("name", "letters, digits, - and _")
    table = registry.find(branch.mapping("connector"), f"{where}: connector")
    made = Branch(
        name=name,
        aspect=branch.choice("aspect", ("pad", "crop")),
        code=branch.choice("code", ("authors", "transformers"), "authors"),
        encoder=branch.mapping("encoder"),
        preprocessor=branch.mapping("preprocessor"),
        connector=branch.mapping("connector"),
        others={key: branch.mapping(key) for key in table.others if key in branch},
    )
    branch.done({})
    return made


def fused_prefixes(source: Source) -> Names:
    """Branches under their names, the LLM under the standard ones."""
    parts = [part for branch in source.branches for part in branch.parts]
    return (*((f"{part}.", part, "") for part in parts), ("", "llm", ""))


def arranged(source: Source, positions: str | None, mask: str | None) -> Source:
    """With what is not None, in a fused folder's config.json too; one branch has no choice."""
    asked = {"positions": positions, "mask": mask}
    given = {key: value for key, value in asked.items() if value is not None}
    return dataclasses.replace(
        source,
        config={**source.config, **given} if source.layout == "visionfuse" else source.config,
        positions=given.get("positions", source.positions),
        mask=given.get("mask", source.mask),
    )


def fused_config(source: Source, recipe: Mapping[str, JSON]) -> dict[str, Any]:
    """config.json of a fused folder."""
    return {
        "architectures": ["VisionFuse"],
        "model_type": "visionfuse",
        "text_config": source.llm,
        "branches": [branch.to_json() for branch in source.branches],
        "template": source.template,
        **({"image_token": source.image_token} if source.image_token else {}),
        **({"tokenizer": source.tokenizer} if source.tokenizer else {}),
        "positions": source.positions,
        "mask": source.mask,
        "recipe": dict(recipe),
    }


def describe_llm(path: Path, config: Values, towers: Towers) -> Source:
    """A plain causal LM: no branch."""
    del towers
    own, kind, chat = (
        config.rest({TEMPLATE}),
        tokenizer_class(config.data),
        read_chat_template(path),
    )
    registry.find(own, config.where).config(own, config.where)  # by its keys in this file
    template = CHAT_TEMPLATE if chat else "plain"
    return Source(
        path, "llm", dict(config.data), own, (), template, tokenizer=kind, chat_template=chat
    )


BARE = tuple(
    (start, "llm", f"model.{start}")
    for start in ("embed_tokens.", "layers.", "norm.", "final_layernorm.")
)
"""Names of a model that was saved without its head (LlamaModel, PhiModel)."""


def llm_names(source: Source) -> Names:
    """Names of a plain causal LM."""
    own = source.table("llm").prefixes
    return (*((old, "llm", new) for old, new in own if old), *BARE, ("", "llm", ""))


def _is_llm(config: Mapping[str, JSON]) -> bool:
    table = registry.TABLES.get(str(config.get("model_type")))
    return table is not None and bool(table.architecture)


UNUSED = (
    *("architectures", "dtype", "recipe", "torch_dtype", "transformers_version"),
    *("pad_token_id", "use_cache"),  # of a training in transformers
    *("auto_map", "plain"),  # of folders with code, which says the same (`converters.hf.remote`)
)
"""Keys of a fused folder's config.json without effect here."""

LAYOUTS = (
    Layout(
        "visionfuse",
        lambda config: config.get("model_type") == "visionfuse",
        describe_fused,
        fused_prefixes,
        unused=dict.fromkeys(UNUSED, ANY),
    ),
    Layout("llm", _is_llm, describe_llm, llm_names, unused={}),
)
