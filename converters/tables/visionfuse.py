"""vfjax's own folders: a fused model under the standard names, and a plain causal LM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters import tables
from converters.chat import read_chat_template
from converters.layouts import Layout, Source, tokenizer_class
from converters.towers import Towers
from vfjax.chat import CHAT_TEMPLATE


def describe_fused(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """A fused folder's config.json is the normal form itself."""
    del towers  # branches are in the folder
    return Source(
        path,
        "visionfuse",
        config,
        llm=config["text_config"],
        branches=config["branches"],
        template=config["template"],
        tokenizer=config.get("tokenizer", {}),
        chat_template=read_chat_template(path),
        image_token=config.get("image_token", ""),
        **{key: config[key] for key in ARRANGEMENT if key in config},
    )


def fused_prefixes(source: Source) -> tuple[tuple[str, str, str], ...]:
    """Branches under their names, the LLM under the standard ones."""
    parts = [f"branches.{b['name']}.{kind}" for b in source.branches for kind in KINDS]
    return (*((f"{part}.", part, "") for part in parts), ("", "llm", ""))


KINDS = ("encoder", "aux", "connector")
"""Components of a branch."""

ARRANGEMENT = ("positions", "mask")
"""Keys, absent from older folders, that say where branches' tokens stand and who sees whom."""


def arrange(source: Source, positions: str | None, mask: str | None) -> None:
    """Replaces what is not None, in a fused folder's config.json too; one branch has no choice."""
    for key, value in zip(ARRANGEMENT, (positions, mask), strict=True):
        if value is not None:
            setattr(source, key, value)
            if source.layout == "visionfuse":
                source.config = {**source.config, key: value}


def fused_config(source: Source, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a fused folder."""
    return {
        "architectures": ["VisionFuse"],
        "model_type": "visionfuse",
        "text_config": source.llm,
        "branches": source.branches,
        "template": source.template,
        **({"image_token": source.image_token} if source.image_token else {}),
        **({"tokenizer": source.tokenizer} if source.tokenizer else {}),
        **{key: getattr(source, key) for key in ARRANGEMENT},
        "recipe": dict(recipe),
    }


def describe_llm(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """A plain causal LM: no branch."""
    del towers
    kind, chat = tokenizer_class(config), read_chat_template(path)
    template = CHAT_TEMPLATE if chat else "plain"
    return Source(
        path, "llm", config, dict(config), [], template, tokenizer=kind, chat_template=chat
    )


BARE = tuple(
    (start, "llm", f"model.{start}")
    for start in ("embed_tokens.", "layers.", "norm.", "final_layernorm.")
)
"""Names of a model that was saved without its head (LlamaModel, PhiModel)."""


def _is_llm(config: Mapping[str, Any]) -> bool:
    table = tables.TABLES.get(str(config.get("model_type")))
    return table is not None and bool(table.architecture)


LAYOUTS = (
    Layout(
        "visionfuse",
        lambda config: config.get("model_type") == "visionfuse",
        describe_fused,
        fused_prefixes,
    ),
    Layout("llm", _is_llm, describe_llm, lambda source: (*BARE, ("", "llm", ""))),
)
