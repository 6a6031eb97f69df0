"""Members of one architecture merged whole: towers, connectors and LLM, in their own layout.

Tensors are called as in the files of the folder that is written, `visual.blocks.0.attn.qkv.weight`
or `multi_modal_projector.linear_1.weight`; those of a tower that gets a sub-folder have its name
before theirs: `vision_tower/vision_model.encoder.layers.0.mlp.fc1.weight`.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from converters.alike import LLM, check_alike, check_modules, llms_beside, module
from converters.branches import first_seeing
from converters.chat import read_chat_template
from converters.export import config_files, folder_of
from converters.files.names import TOKENIZER_FILES
from converters.files.writer import Content
from converters.folder import assigned, settled
from converters.mergekit import LISTS
from converters.origin import from_source
from converters.params.table import FLOATS, rename
from converters.plan import Part, layers_of, llm_config, merge_parts
from converters.request import Request
from converters.source import TEMPLATE, Source
from converters.tensor_names import Parts, TensorNames, layout_of, named, spare_names
from converters.tokenizer import tokenizer_of
from converters.tokenizer_union import Vocabulary
from converters.towers import Tensors, Towers
from converters.vocabulary import said
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.merge import LazyTensor, Merged, Recipe
from vfjax.merge.recipe import LAYER
from vfjax.text.chat import CHAT_TEMPLATE

Key = tuple[str, str]
"""A component, and what mergekit calls the module."""
TEXT: Key = ("llm", LLM)


def one_part(
    recipe: Recipe,
    own: str,
    models: Mapping[str, Tensors],
    like: str,
    loose: Collection[str],
    layers: Mapping[str, int],
) -> Part:
    """A module's tensors for `merge_parts`.

    Tensors that only one multimodal LLM has, as beside text experts, are its own. Of those that
    nothing reads `like`'s are taken where other models lack them or they are no floats.

    Args:
        recipe: of the merge.
        own: what mergekit calls the module.
        models: label -> what the written folder calls it -> tensor; none of plain LLMs.
        like: the member whose layout is written.
        loose: names of tensors that nothing reads.
        layers: label -> layers, where names do not tell.

    Raises:
        InputError: a model lacks the component that the recipe merges, or a rule takes a tensor
            from one that lacks it.
    """
    recipe = recipe.only(own)
    if recipe.base in recipe.models and not models[recipe.base or ""] and not recipe.reads_base:
        recipe = recipe.without_base()
    models = {k: x for k, x in models.items() if k in recipe.models or k == like}
    owners = [label for label in recipe.models if models[label]]
    lacking = [label for label in recipe.models if not models[label]]
    alone: dict[str, str] = {}
    for name in models[like]:
        action = recipe.rule(name)
        if isinstance(action, str):
            if name not in models.get(action, {}):
                raise InputError(
                    said(action),
                    found=f"no tensor for {name!r}",
                    expected=f"one, as in {said(like)}",
                    fix="take it from another",
                )
            if lacking:
                alone[name] = action
        elif (lacking and owners == [like]) or (
            name in loose and not _alike([models[x].get(name) for x in (like, *owners)])
        ):
            alone[name] = like
    if lacking and len(alone) < len(models[like]):
        raise InputError(
            said(lacking[0]),
            found=f"a plain LLM, without {own}",
            expected=f"the architecture of {said(like)}, as several models have that part",
            fix=f"take it from one by a rule, ('...', {{'take': {like!r}}}), or name a multimodal "
            "LLM",
        )
    models = {
        label: {name: x for name, x in tensors.items() if name in models[like] or name not in loose}
        for label, tensors in models.items()
    }
    if not layers:
        numbers = [int(m[2]) for name in models[like] if (m := LAYER.fullmatch(name))]
        layers = dict.fromkeys(models, max(numbers, default=-1) + 1)
    return Part(recipe, models, layers, own, alone)


def _alike(tensors: Sequence[LazyTensor | None]) -> bool:
    """Whether all are there, of one shape, and floats."""
    found = [x for x in tensors if x is not None]
    shapes = {tuple(x.shape) for x in found}
    return len(found) == len(tensors) and len(shapes) == 1 and all(x.dtype in FLOATS for x in found)


@dataclasses.dataclass(frozen=True)
class Whole:
    """What `merge_whole` made.

    Attributes:
        opened: label -> folder.
        members: labels.
        like: the member whose layout, processor and prompts the result has.
        merged: component and module -> what the written folder calls it -> tensor.
        alike: component and module -> label -> the same of the models that have it.
        llm: the merged LLM's config.
    """

    opened: Mapping[str, Source]
    members: tuple[str, ...]
    like: str
    merged: Mapping[Key, Mapping[str, Merged]]
    alike: Mapping[Key, Mapping[str, Tensors]]
    llm: Mapping[str, Any]

    def beside(self) -> list[Mapping[str, Tensors]]:
        """Label -> tensors, of each component but the LLM that several models have."""
        return [x for key, x in self.alike.items() if key != TEXT and len(x) > 1]

    def modules(self) -> dict[str, str]:
        """Tensor -> what mergekit calls the module that it is of, but for the LLM's."""
        rest = {key: each for key, each in self.merged.items() if key != TEXT}
        return {name: own for (_, own), each in rest.items() for name in each}

    @property
    def kept(self) -> list[str]:
        """A sentence for each member whose settings of generation are not those that are kept."""
        name = "generation_config.json"
        found = {}
        for label in self.members:
            file = self.opened[label].generation
            given = read_json(file) if file.is_file() else {}
            found[label] = {k: x for k, x in given.items() if k != "transformers_version"}
        return [
            f"{said(label)}: its {name} is not that of {said(self.like)}, which is kept"
            for label, given in found.items()
            if self.opened[label].branches and given != found[self.like]
        ]

    def source(self, owner: Source, request: Request, recipe: Recipe) -> Source:
        """The normal form of the result, without tensors.

        Args:
            owner: whose tokenizer it has.
            request: its `template` is read.
            recipe: its `chat_template` is in the owner's folder.

        Raises:
            InputError: a template that `like` lacks, or see `_config`.
        """
        like, template = self.opened[self.like], request.template
        config = _config(like, self.llm, str(request.out))
        if template is not None and template != like.template:
            if template == CHAT_TEMPLATE:
                raise InputError(
                    "template",
                    found=f"{CHAT_TEMPLATE!r}, and no chat template in {like.path}",
                    expected="a first member that has one, or the name of a template",
                    fix="name another",
                )
            config[TEMPLATE] = template
        return dataclasses.replace(
            like,
            path=owner.path,
            base=owner.base,
            tokenizer=owner.tokenizer,
            config=config,
            llm=dict(self.llm),
            template=template or like.template,
            chat_template=(
                read_chat_template(owner.path) if recipe.chat_template else like.chat_template
            ),
        )

    def files(self, result: Source, recipe: Recipe) -> dict[str, Content]:
        """All files of the result but its weights and its tokenizer; arguments as of `source`."""
        like = self.opened[self.like]
        dtype = np.dtype(self.llm.get("dtype") or self.llm["torch_dtype"])
        found = config_files(dataclasses.replace(from_source(like), config=result.config), dtype)
        chat = ("chat_template.jinja", "chat_template.json")
        kept = ("generation_config.json", *(() if recipe.chat_template else chat))
        files = {n: x for n, x in found.items() if n in kept or n not in TOKENIZER_FILES}
        if not recipe.chat_template and result.home != like.home and like.chat_template:
            files.pop(chat[1], None)
            files[chat[0]] = like.chat_template.encode()
        return files


def merge_whole(
    recipe: Recipe,
    request: Request,
    opened: Mapping[str, Source],
    parts: Mapping[str, Parts],
    made: Vocabulary | None,
) -> Whole:
    """All tensors of models of one architecture, merged.

    Args:
        recipe: over labels.
        request: see `converters.fuse`.
        opened: label -> folder, the base first.
        parts: label -> its tensors that are read; the LLMs with as many rows and heads.
        made: a tokenizer whose order embeddings and heads get.

    Raises:
        InputError: no member but plain LLMs; see `check_modules`, `check_alike`, `one_part` and
            `merge_parts`.
    """
    like = first_seeing(opened, request.members)
    source = opened[like]
    if made is not None:
        _check_ids(source, made)
    if not source.branches:
        raise InputError(
            "members",
            found="plain LLMs alone",
            expected="a multimodal LLM among them, whose layout is written",
            fix="set export to 'llm'",
        )
    check_modules(recipe, source)
    names = TensorNames(source, {part: dict(found) for part, found in spare_names(source).items()})
    kept = [names(p, n) for p, found in parts[like].items() if p != "llm" for n in found]
    opened = llms_beside(recipe, opened, like, kept)
    parts = {x: p if opened[x].branches else {"llm": p["llm"]} for x, p in parts.items()}
    check_alike(opened, request.members, like, request.template)
    models, loose = {}, set[str]()
    for label in opened:
        models[label], more = named(names, opened[label], parts[label])
        loose |= more
    keys = dict.fromkeys(
        (p, module(p, name)) for p, found in models[like].items() for name in found
    )
    alike = {
        (part, own): {
            label: {name: x for name, x in found.get(part, {}).items() if module(part, name) == own}
            for label, found in models.items()
        }
        for part, own in keys
    }
    depths = layers_of(opened)
    found = [
        one_part(recipe, key[1], each, like, loose, depths if key == TEXT else {})
        for key, each in alike.items()
    ]
    tables = tuple(names("llm", name) for name in TABLES)
    found = [dataclasses.replace(each, tables=tables) for each in found]
    merged = dict(zip(alike, merge_parts(recipe, request, found, made), strict=True))
    for key, tensors in merged.items():
        if key != TEXT and (wrong := (set(tensors) ^ set(alike[key][like])) - loose):
            raise InputError(
                f"modules.{key[1]}",
                found=f"slices that make or leave out {min(wrong)!r}",
                expected="all layers, each once",
                fix="name whole models",
            )
    heads = {name: x for name in TABLES if (x := merged[TEXT].get(names("llm", name)))}
    body = {name: x for name, x in merged[TEXT].items() if name not in loose}
    llm = llm_config(source.llm, {**body, **heads}, recipe, opened, LLM)
    owners = {key: {k: x for k, x in each.items() if x} for key, each in alike.items()}
    return Whole(opened, tuple(request.members), like, merged, owners, llm)


TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors of an LLM in normal form with one row a token; the second may lack."""


def _check_ids(like: Source, made: Vocabulary) -> None:
    """Raises InputError if a made tokenizer moves a token that config.json may name by its id."""
    tokenizer = tokenizer_of(like)
    for token, own in tokenizer.added_tokens_encoder.items() if tokenizer is not None else ():
        if (found := made.words.get(token)) != own:
            raise InputError(
                f"tokenizer: {token}",
                found="no such token" if found is None else f"id {found}",
                expected=f"{own}, as in {like.path}, whose config.json is kept",
                fix="name that model as the tokenizer's source",
            )


def _config(like: Source, llm: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of `like` with the merged LLM's tokens and layers in place of its own.

    A tied config may stand beside a head of its own: transformers unties it then.

    Raises:
        InputError: a layout that says them elsewhere.
    """
    rows = llm["vocab_size"]
    for key, value in like.config.items():
        beyond = isinstance(value, int) and rows <= value < like.llm.get("vocab_size", 0)
        if key.endswith(("_token_id", "_token_index")) and beyond:
            raise InputError(
                f"{like.path / 'config.json'}: {key}",
                found=f"{value}, a row that is dropped",
                expected=f"an id below {rows}, the rows that are kept",
                fix="keep that model's rows, by vocab or by its tokenizer",
            )
    keys = ("vocab_size", "num_hidden_layers", *LISTS)
    changed = {key: llm[key] for key in keys if key in llm and llm[key] != like.llm.get(key)}
    config = dict(like.config)
    if not changed:
        return config
    section = next((key for key in SECTIONS if isinstance(config.get(key), Mapping)), None)
    if section is None:
        config |= changed
    else:
        config[section] = {**config[section], **changed}
    found = layout_of(like).open(like.path, config, Towers({}, "auto")).llm
    for key, value in changed.items():
        if found.get(key) != value:
            raise InputError(
                f"{where}: {key}",
                found=value,
                expected=f"{like.llm.get(key)}, as in {like.path}: its layout has no place for it",
                fix="merge models of one vocabulary and depth, or set export to 'model'",
            )
    return config


SECTIONS = ("text_config", "llm_config")
"""Keys of config.json that may hold the LLM's."""


def with_tensors(source: Source, weights: Mapping[str, Tensors]) -> Source:
    """The result with its tensors, as the written folder would be opened.

    Args:
        source: what `Whole.source` made.
        weights: sub-folder -> name -> tensor.
    """
    towers = {}
    for part, tower in source.towers.items():
        table, tensors = source.table(part), weights[folder_of(part, source.towers)]
        own = {x: new for x, (new, _) in rename(tensors, table.prefixes).items()}
        read = {x: new for x, new in own.items() if not table.ignores(new)}
        towers[part] = dataclasses.replace(
            tower,
            tensors={new: tensors[x] for x, new in read.items()},
            spare={x: tensors[x] for x in own if x not in read},
        )
    held = source.held
    source = assigned(
        dataclasses.replace(source, towers=towers), layout_of(source), weights.get("", {})
    )
    return settled(dataclasses.replace(source, held=held))
