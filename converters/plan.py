"""The merged LLM of a fusion: its tensors, lazily, and its config."""

from collections.abc import Mapping
from typing import Any

from converters.export import with_dtype
from converters.load import float_dtype
from converters.mergekit import layer_lists, widest
from converters.request import Request
from converters.source import Source
from converters.tokenizer_union import Vocabulary
from converters.vocabulary import said
from vfjax import InputError
from vfjax.merge import LazyTensor, Merged, Merger, Recipe
from vfjax.merge.compatibility import VOCABULARY, check_names


def layers_of(sources: Mapping[str, Source]) -> dict[str, int]:
    """Label -> number of the LLM's layers."""
    return {name: s.table("llm").config(s.llm).layers for name, s in sources.items()}


def merge_llms(
    recipe: Recipe,
    request: Request,
    sources: Mapping[str, Source],
    llms: Mapping[str, Mapping[str, LazyTensor]],
    made: Vocabulary | None,
) -> dict[str, Merged]:
    """The merged LLM's tensors.

    Args:
        recipe: over labels.
        request: its dtype, seed and account are read.
        sources: label -> opened folder, the base (or the first) first.
        llms: label -> tensors of its LLM.
        made: the tokenizer whose order embeddings and heads get.

    Raises:
        InputError: see `Recipe.plan`, `Merger.add` and `Vocabulary.align`.
    """
    if missing := sorted(set(recipe.models) - set(llms)):
        raise InputError(
            "recipe", found=f"model {missing[0]!r}", expected=", ".join(llms), fix="name it"
        )
    layers = layers_of(sources)
    if len({*layers.values()}) == 1:
        (first, names), *others = ((name, list(llms[name])) for name in llms)
        for label, other in others:
            check_names(label, other, first, names)
    plans = recipe.plan({name: list(x) for name, x in llms.items()}, layers)
    merger = Merger(
        float_dtype(request.dtype or recipe.out_dtype or recipe.dtype),
        request.seed,
        request.account,
    )
    like = next(iter(llms.values()))
    out: dict[str, Merged] = {}
    for name, plan in plans.items():
        places = [*plan.members, *([plan.base] if plan.base else [])]
        found = {label: llms[label][tensor] for label, tensor in places}
        if made is not None and made.size is not None and name.endswith(VOCABULARY):
            base = plan.base[0] if plan.base else recipe.base
            found = made.align(name, found, base, float_dtype(recipe.dtype))
        members = [(said(label), found[label]) for label, _ in plan.members]
        origin = (said(plan.base[0]), found[plan.base[0]]) if plan.base else None
        own = like[name].dtype if name in like else None
        if request.recipe is not None:
            own = widest(list(found.values()))
        out[name] = merger.add(name, plan.method, plan.params, members, origin, own)
    return out


def llm_config(
    config: Mapping[str, Any],
    merged: Mapping[str, Merged],
    recipe: Recipe,
    sources: Mapping[str, Source],
) -> dict[str, Any]:
    """The reference LLM's config with the merged one's dtype, layers and tokens."""
    origins = recipe.origins(layers_of(sources))
    untied = {"tie_word_embeddings": False} if "lm_head.weight" in merged else {}
    return {
        **with_dtype(config, widest(list(merged.values()))),
        "num_hidden_layers": len(origins),
        **layer_lists({name: source.llm for name, source in sources.items()}, origins),
        "vocab_size": merged["model.embed_tokens.weight"].shape[0],
        **untied,
    }
