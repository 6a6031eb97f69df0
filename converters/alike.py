"""Whether models can be merged whole: one architecture, pictures and prompts alike, all modules."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

from converters.load import model_config
from converters.source import Source
from converters.vocabulary import said
from vfjax import InputError
from vfjax.errors import cut
from vfjax.merge import Recipe
from vfjax.vision.images import ImageSpec

LLM = "text_decoder"
TOWER = "vision_tower"
PROJECTOR = "multi_modal_projector"
"""What mergekit calls the modules of such models: the LLM, encoders, connectors."""

MERGER = re.compile(r"(?:^|\.)visual\.(?:merger|deepstack_merger_list)\.")
"""Tensors of Qwen's towers that mergekit has in the projector."""


def module(part: str, name: str = "") -> str:
    """What mergekit calls the module that a component's tensor is in."""
    if part == "llm":
        return LLM
    return PROJECTOR if part.split(".")[-1] == "connector" or MERGER.search(name) else TOWER


def check_alike(
    opened: Mapping[str, Source], members: Collection[str], like: str, template: str | None
) -> None:
    """Checks that all models but plain LLMs are of one architecture, and members asked one way.

    Args:
        opened: label -> folder.
        members: labels; of another model, the base, pictures and prompts do not count.
        like: the member that the others are held against.
        template: the prompt template that was asked for, None for none.

    Raises:
        InputError: naming the model and the first size, setting or template that differs.
    """
    expected = model_config(opened[like])
    for label, source in opened.items():
        if label == like or not source.branches:
            continue
        found = model_config(source)
        shown = label in members
        for key, own, other in _differences(expected.branches, found.branches, "branches", shown):
            raise InputError(
                f"{said(label)}: {key}",
                found=cut(repr(other)),
                expected=f"{cut(repr(own))}, as in {said(like)}",
                fix="merge models of one architecture and one preprocessing whole; "
                "export='model' joins others as branches",
            )
        if template is not None or not shown:
            continue
        for key in ("template", "chat_template"):
            own, other = getattr(opened[like], key), getattr(source, key)
            if own != other:
                raise InputError(
                    f"{said(label)}: {key}",
                    found=cut(repr(other)),
                    expected=f"{cut(repr(own))}, as in {said(like)}",
                    fix=f"set template to {opened[like].template!r} to take that of "
                    f"{said(like)}, or merge members that are prompted alike",
                )


def llms_beside(
    recipe: Recipe, opened: Mapping[str, Source], like: str, names: Collection[str]
) -> dict[str, Source]:
    """The models; of other architectures than `like`'s the LLMs alone, if rules say so.

    That is AdaMMS's setting (arXiv 2503.23733): LLMs of one base merged, the tower and connector of
    one member kept as they are.

    Args:
        recipe: of the merge.
        opened: label -> folder.
        like: the member whose layout is written.
        names: of all its tensors but the LLM's; rules must take each from `like`.
    """
    if any(recipe.rule(name) != like for name in names):
        return dict(opened)
    kinds = {
        label: [type(branch.architecture) for branch in model_config(source).branches]
        for label, source in opened.items()
    }
    return {
        label: source
        if kinds[label] == kinds[like]
        else dataclasses.replace(source, branches=(), spare={}, prefixes={})
        for label, source in opened.items()
    }


def _differences(
    one: object, other: object, key: str, shown: bool
) -> Iterator[tuple[str, object, object]]:
    """Key and values of each field in which two configs differ; `shown`: how pictures are, too."""
    if isinstance(one, ImageSpec) and not shown:
        return
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        for field in dataclasses.fields(one):
            values = getattr(one, field.name), getattr(other, field.name)
            yield from _differences(*values, f"{key}.{field.name}", shown)
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for i, values in enumerate(zip(one, other, strict=True)):
            yield from _differences(*values, f"{key}[{i}]", shown)
    elif one != other:
        yield key, one, other


def check_llm_alone(recipe: Recipe) -> None:
    """Raises InputError if a recipe says how other parts than the LLM are merged."""
    if others := sorted(set(recipe.modules) & {TOWER, PROJECTOR}):
        raise InputError(
            "modules",
            found=", ".join(recipe.modules),
            expected=f"none but {LLM!r}, as only LLMs are merged",
            fix=f"set export to 'whole' to merge {others[0]!r}, too, or remove it",
        )


def check_modules(recipe: Recipe, like: Source) -> None:
    """Raises InputError if a recipe's modules are not those of the architecture."""
    needed = {module(part) for part in like.components}
    given = {*recipe.modules}
    if "" in given or given == needed:
        return
    extra = sorted(given - needed)
    raise InputError(
        "modules",
        found=repr(extra[0]) if extra else f"no {min(needed - given)!r}",
        expected=", ".join(sorted(needed)),
        fix="rename it" if extra else "list it too: a module that is not listed is not written",
    )
