"""Members of one architecture merged whole: towers, connectors and LLM, in their own layout.

Tensors are called as in the files of the folder that is written, `visual.blocks.0.attn.qkv.weight`
or `multi_modal_projector.linear_1.weight`; those of a tower that gets a sub-folder have its name
before theirs: `vision_tower/vision_model.encoder.layers.0.mlp.fc1.weight`.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from converters.branches import first_seeing
from converters.chat import read_chat_template
from converters.export import config_files, folder_of
from converters.files.writer import Content
from converters.folder import assigned, settled
from converters.load import TOKENIZER_FILES, model_config
from converters.mergekit import LISTS
from converters.origin import from_source
from converters.params.table import placed, rename
from converters.plan import Part, layers_of, llm_config, merge_parts
from converters.request import Request
from converters.source import LAYOUTS, TEMPLATE, Layout, Source
from converters.tokenizer_union import Vocabulary
from converters.towers import Tensors, Towers
from converters.vocabulary import said
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.errors import cut
from vfjax.merge import LazyTensor, Merged, Recipe
from vfjax.merge.recipe import LAYER
from vfjax.text.chat import CHAT_TEMPLATE

LLM = "text_decoder"
TOWER = "vision_tower"

PROJECTOR = "multi_modal_projector"
"""What mergekit calls the modules of such models: the LLM, encoders, connectors."""


def module(part: str) -> str:
    """What mergekit calls the module that a component is."""
    if part == "llm":
        return LLM
    return PROJECTOR if part.split(".")[-1] == "connector" else TOWER


Parts = Mapping[str, Mapping[str, LazyTensor]]
"""Component -> name in its table -> tensor."""


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


def _differences(
    one: object, other: object, key: str, shown: bool
) -> Iterator[tuple[str, object, object]]:
    """Key and values of each field in which two configs differ; `shown`: how pictures are, too."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        for field in dataclasses.fields(one):
            if shown or field.name != "images":
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
    needed = {*map(module, like.components)}
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


@dataclasses.dataclass(frozen=True)
class Names:
    """What the tensors of each component are called in the folder that is written.

    Attributes:
        like: the model whose layout it has.
        spare: component -> name in its table -> name in `like`'s files, of those it does not read.
    """

    like: Source
    spare: Mapping[str, Mapping[str, str]]

    def __call__(self, part: str, name: str) -> str:
        """Of a component's tensor, by its name in the table."""
        folder = folder_of(part, self.like.towers)
        found = self.spare.get(part, {}).get(name)
        if found is None:
            old, new = self.prefix(part, name)
            found = old + name.removeprefix(new)
        return f"{folder}/{found}" if folder else found

    def prefix(self, part: str, name: str) -> tuple[str, str]:
        """The (prefix in the files, prefix in the table) of a tensor."""
        known = [x for x in self.like.prefixes.get(part, ()) if name.startswith(x[1])]
        if not known:  # a head that `like` is without
            pairs = [(old, new) for old, own, new in _prefixes(self.like) if own == part]
            known = sorted((x for x in pairs if name.startswith(x[1])), key=lambda x: x[0] != x[1])
        return known[0]


def layout_of(source: Source) -> Layout:
    """The layout that a folder was read by."""
    return next(x for x in LAYOUTS if x.name == source.layout)


def _prefixes(source: Source) -> tuple[tuple[str, str, str], ...]:
    return layout_of(source).prefixes(source)


def spare_names(source: Source) -> dict[str, dict[str, str]]:
    """Component -> name in its table -> name in the files, of tensors that it may not read."""
    out = {}
    for part, tensors in source.spare.items():
        if part in source.towers:
            found = {x: new for x, (new, _) in rename(tensors, source.table(part).prefixes).items()}
        else:
            places = placed(tensors, _prefixes(source))
            found = {x: place.name for x, (place, _) in places.items()}
        out[part] = {found.get(x, x): x for x in tensors}
    return out


def named(names: Names, source: Source, parts: Parts) -> tuple[dict[str, Tensors], set[str]]:
    """All tensors that a model has, and the names of those that it may not read.

    Args:
        names: of the result.
        source: the model.
        parts: those of its tensors that are read.

    Returns:
        Component -> what the written folder calls it -> tensor; such names.
    """
    out = {part: {names(part, n): x for n, x in tensors.items()} for part, tensors in parts.items()}
    loose = set()
    for part, spare in spare_names(source).items():
        for name, own in spare.items():
            if part == "llm" and name.startswith("lm_head"):  # heads are settled before
                continue
            called = names(part, name)
            if called not in out.setdefault(part, {}):
                loose.add(called)
                out[part][called] = source.spare[part][own]
    return out, loose


def one_part(
    recipe: Recipe,
    part: str,
    models: Mapping[str, Tensors],
    like: str,
    loose: Collection[str],
    layers: Mapping[str, int],
) -> Part:
    """A component's tensors for `merge_parts`.

    Tensors that only one multimodal LLM has, as beside text experts, are its own. So are tensors
    that nothing reads and not all models have.

    Args:
        recipe: of the merge.
        part: the component.
        models: label -> what the written folder calls it -> tensor; none of plain LLMs.
        like: the member whose layout is written.
        loose: names of tensors that nothing reads.
        layers: label -> layers, where names do not tell.

    Raises:
        InputError: a model lacks the component that the recipe merges, or a rule takes a tensor
            from one that lacks it.
    """
    owners = [label for label, tensors in models.items() if tensors]
    alone: dict[str, str] = {}
    for name in models[like]:
        action = recipe.rule(name)
        if isinstance(action, str):
            if name not in models[action]:
                raise InputError(
                    said(action),
                    found=f"no tensor for {name!r}",
                    expected=f"one, as in {said(like)}",
                    fix="take it from another",
                )
            alone[name] = action
        elif owners == [like] or name in loose and any(name not in models[x] for x in owners):
            alone[name] = like
    kept = {name for name in models[like] if name not in alone}
    lacking = [label for label in models if kept and label not in owners]
    if lacking == [recipe.base] and not recipe.reads_base:
        models = {label: tensors for label, tensors in models.items() if label != recipe.base}
        recipe = recipe.without_base()
    elif lacking:
        raise InputError(
            said(lacking[0]),
            found=f"a plain LLM, without {module(part)}",
            expected=f"the architecture of {said(like)}, as several models have that part",
            fix=f"take it from one by a rule, ('...', {{'take': {like!r}}}), or name a multimodal "
            "LLM",
        )
    models = {
        label: {name: x for name, x in tensors.items() if name in models[like] or name not in loose}
        for label, tensors in models.items()
    }
    if not layers:
        numbers = [int(m[2]) for name in kept if (m := LAYER.fullmatch(name))]
        layers = dict.fromkeys(models, max(numbers, default=-1) + 1)
    return Part(recipe, models, layers, module(part), alone)


@dataclasses.dataclass(frozen=True)
class Whole:
    """What `merge_whole` made.

    Attributes:
        opened: label -> folder.
        members: labels.
        like: the member whose layout, processor and prompts the result has.
        merged: component -> what the written folder calls it -> tensor.
        alike: component -> label -> the same of the models that have it.
        llm: the merged LLM's config.
    """

    opened: Mapping[str, Source]
    members: tuple[str, ...]
    like: str
    merged: Mapping[str, Mapping[str, Merged]]
    alike: Mapping[str, Mapping[str, Tensors]]
    llm: Mapping[str, Any]

    def beside(self) -> list[Mapping[str, Tensors]]:
        """Label -> tensors, of each component but the LLM that several models have."""
        return [x for part, x in self.alike.items() if part != "llm" and len(x) > 1]

    def modules(self) -> dict[str, str]:
        """Tensor -> what mergekit calls the module that it is of, but for the LLM's."""
        rest = {part: each for part, each in self.merged.items() if part != "llm"}
        return {name: module(part) for part, each in rest.items() for name in each}

    @property
    def kept(self) -> list[str]:
        """A sentence for each member whose settings of generation are not those that are kept."""
        name = "generation_config.json"
        found = {}
        for label in self.members:
            file = self.opened[label].home / name
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
    if not source.branches:
        raise InputError(
            "members",
            found="plain LLMs alone",
            expected="a multimodal LLM among them, whose layout is written",
            fix="set export to 'llm'",
        )
    check_modules(recipe, source)
    check_alike(opened, request.members, like, request.template)
    names = Names(source, {part: dict(found) for part, found in spare_names(source).items()})
    models, loose = {}, set[str]()
    for label in opened:
        models[label], more = named(names, opened[label], parts[label])
        loose |= more
    alike = {
        part: {label: found.get(part, {}) for label, found in models.items()}
        for part in source.components
    }
    depths = layers_of(opened)
    found = [
        one_part(recipe, part, each, like, loose, depths if part == "llm" else {})
        for part, each in alike.items()
    ]
    merged = dict(zip(alike, merge_parts(recipe, request, found, made), strict=True))
    for part, tensors in merged.items():
        if part != "llm" and (wrong := set(tensors) ^ set(alike[part][like]) - loose):
            raise InputError(
                f"modules.{module(part)}",
                found=f"slices that make or leave out {min(wrong)!r}",
                expected="all layers, each once",
                fix="name whole models",
            )
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    heads = {name: x for name in tables if (x := merged["llm"].get(names("llm", name)))}
    rest = {name: x for name, x in merged["llm"].items() if name not in loose}
    llm = llm_config(source.llm, {**rest, **heads}, recipe, opened, LLM)
    owners = {part: {k: x for k, x in each.items() if x} for part, each in alike.items()}
    return Whole(opened, tuple(request.members), like, merged, owners, llm)


def _config(like: Source, llm: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of `like` with the merged LLM's tokens and layers in place of its own.

    A tied config may stand beside a head of its own: transformers unties it then.

    Raises:
        InputError: a layout that says them elsewhere.
    """
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


def by_folder(weights: Mapping[str, LazyTensor]) -> dict[str, Tensors]:
    """Sub-folder -> name -> tensor, of tensors by what the written folder calls them."""
    out: dict[str, Tensors] = {"": {}}
    for called, tensor in weights.items():
        folder, _, name = called.rpartition("/")
        out.setdefault(folder, {})[name] = tensor
    return out
