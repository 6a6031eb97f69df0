"""The merged tensors of a fusion, lazily, and the merged LLM's config."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from converters.export import with_dtype
from converters.load import float_dtype
from converters.mergekit import layer_lists, widest
from converters.request import Request
from converters.source import Source
from converters.tokenizer_union import Vocabulary
from converters.vocabulary import said
from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.merge import LazyTensor, Merged, Merger, Recipe
from vfjax.merge.compatibility import VOCABULARY, check_names
from vfjax.merge.recipe import TensorPlan


def layers_of(sources: Mapping[str, Source]) -> dict[str, int]:
    """Label -> number of the LLM's layers."""
    return {name: s.table("llm").config(s.llm).layers for name, s in sources.items()}


@dataclasses.dataclass(frozen=True)
class Part:
    """Tensors that are merged with one another, and in whose layers gradients run.

    Attributes:
        recipe: over labels.
        tensors: label -> name -> tensor, the base (or the first) first; the names are those that
            recipes know.
        layers: label -> number of layers.
        module: the recipe's name of this part; "" where there is no other.
        alone: name -> label of the only model that has it, or whose tensor is taken as it is.
        tables: ends of the names of tensors with one row a token.
    """

    recipe: Recipe
    tensors: Mapping[str, Mapping[str, LazyTensor]]
    layers: Mapping[str, int]
    module: str = ""
    alone: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tables: tuple[str, ...] = VOCABULARY


def merge_parts(
    recipe: Recipe, request: Request, parts: Sequence[Part], made: Vocabulary | None
) -> list[dict[str, Merged]]:
    """The merged tensors of each part.

    Args:
        recipe: over labels.
        request: its dtype, seed and account are read.
        parts: the LLM, and what is merged beside it.
        made: the tokenizer whose order embeddings and heads get.

    Raises:
        InputError: see `Recipe.plan`, `Merger.add` and `Vocabulary.align`.
    """
    merger = Merger(
        float_dtype(request.dtype or recipe.out_dtype or recipe.dtype),
        request.seed,
        request.account,
    )
    plans = [_plans(part) for part in parts]
    recipe.check_rules(
        [
            name
            for part, found in zip(parts, plans, strict=True)
            for name in found
            if name not in part.alone or isinstance(recipe.rule(name), str)
        ]
    )
    return [
        _merged(request, part, found, merger, made)
        for part, found in zip(parts, plans, strict=True)
    ]


def _plans(part: Part) -> dict[str, TensorPlan]:
    """How each tensor of a part is made."""
    recipe = part.recipe
    names = {
        label: [name for name in tensors if name not in part.alone]
        for label, tensors in part.tensors.items()
    }
    plans = {
        name: TensorPlan("passthrough", None, ((label, name),), {})
        for name, label in part.alone.items()
    }
    if not any(names.values()):
        return plans
    if missing := sorted(set(recipe.models) - set(names)):
        raise InputError(
            "recipe", found=f"model {missing[0]!r}", expected=", ".join(names), fix="name it"
        )
    if len({*part.layers.values()}) == 1:
        (first, expected), *others = names.items()
        for label, other in others:
            check_names(label, other, first, expected)
    return plans | recipe.plan_module(names, part.layers, part.module)


def _merged(
    request: Request,
    part: Part,
    plans: Mapping[str, TensorPlan],
    merger: Merger,
    made: Vocabulary | None,
) -> dict[str, Merged]:
    """The tensors of one part by their plans."""
    like = next(iter(part.tensors.values()))
    out: dict[str, Merged] = {}
    for name, plan in plans.items():
        places = [*plan.members, *([plan.base] if plan.base else [])]
        found = {label: part.tensors[label][tensor] for label, tensor in places}
        if made is not None and made.size is not None and name.endswith(part.tables):
            base = plan.base[0] if plan.base else part.recipe.base
            found = made.align(name, found, base, float_dtype(part.recipe.dtype))
        members = [(said(label), found[label]) for label, _ in plan.members]
        origin = (said(plan.base[0]), found[plan.base[0]]) if plan.base else None
        own = like[name].dtype if name in like else None
        if request.recipe is not None:
            own = widest(list(found.values()))
        out[name] = merger.add(name, plan.method, plan.params, members, origin, own)
    return out


def llm_config(
    config: Mapping[str, JSON],
    merged: Mapping[str, Merged],
    recipe: Recipe,
    sources: Mapping[str, Source],
    module: str = "",
) -> dict[str, Any]:
    """The reference LLM's config with the merged one's dtype, layers and tokens.

    Args:
        config: of the reference.
        merged: its tensors, and what else has a say in the dtype.
        recipe: that they were merged by.
        sources: label -> opened folder.
        module: what the recipe calls the LLM.
    """
    origins = recipe.origins(layers_of(sources), module)
    untied = {"tie_word_embeddings": False} if "lm_head.weight" in merged else {}
    return {
        **with_dtype(config, widest(list(merged.values()))),
        "num_hidden_layers": len(origins),
        **layer_lists({name: source.llm for name, source in sources.items()}, origins),
        "vocab_size": merged["model.embed_tokens.weight"].shape[0],
        **untied,
    }
