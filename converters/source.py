"""Layouts: how a whole checkpoint folder is put together from components.

A layout turns a folder into a `Source`: the same normal form whatever wrote the folder. Loading,
merging, inspecting and exporting know only the normal form.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters import adapters, registry
from converters.adapted import completed
from converters.files.others import TOWER, no_model
from converters.params.table import Table, rename
from converters.towers import Prefixes, Tensors, Tower, Towers, pairs
from converters.values import Unused, Values
from vfjax import InputError
from vfjax.atomic import findable
from vfjax.errors import counted, cut
from vfjax.merge import LazyTensor, equal

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files that hold a vocabulary."""

PAIR = ("vocab.json", "merges.txt")
"""Files that hold one together, where transformers 4 wrote a Qwen's or GPT-2's with
`use_fast=False`."""

TEMPLATE = "mm_prompt_template"
"""Key of config.json, ours: prompt template of a model that was not trained with its layout's."""


def tokenizer_class(config: Mapping[str, Any]) -> dict[str, str]:
    """What transformers' AutoTokenizer reads of a config.json of its own."""
    keys = ("model_type", "tokenizer_class")
    return {key: config[key] for key in keys if isinstance(config.get(key), str)}


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary."""
    alone = any((folder / name).is_file() for name in TOKENIZERS)
    return alone or all((folder / name).is_file() for name in PAIR)


@dataclasses.dataclass
class Source:
    """A checkpoint folder in normal form.

    Attributes:
        path: the folder.
        layout: name of its layout.
        config: its config.json.
        llm: Hugging Face config of the language model.
        branches: one dict a branch: `name`; `encoder`, `connector` and perhaps `aux`, configs
            whose `model_type` names a table; `preprocessor` (preprocessor_config.json); `aspect`,
            "pad" or "crop"; `code`, whose code reads it: "transformers", or "authors" if absent.
        template: name of the prompt template, "chat_template" for the folder's own.
        chat_template: the folder's own, Jinja; "" if its code does not read one.
        image_token: see `vfjax.Processor`.
        tokenizer: of a folder of transformers' what its tokenizer's class depends on, see
            `converters.tokenizer.load_tokenizer`.
        parts: component ("llm", "branches.NAME.encoder", ...) -> its tensors under the names of the
            component's table.
        prefixes: component -> the (prefix in the folder, prefix in the table) pairs it was read by.
        towers: component -> the tower that config.json names, read in place of the checkpoint's own
            copy.
        held: the towers whose tensors are read from the checkpoint; in `towers` until they are.
        tuned: components whose copy in the checkpoint is the one to read.
        unread: tensors of the folder that another copy takes the place of.
        spare: component -> tensors that are known and that its model may lack, under the names of
            the folder, or of the tower's; see `Table.spares`.
        seen: fields of the LLM's config as its tensors have them, see `settle`.
        own_head: whether the LLM has a head of its own under a config that ties it, see there.
        same: tensors of the LLM that are left out -> those that they equal, see `settle`.
        files: the folder's weights files, and its base's, by name.
        base: folder of the LLM that this one adapts or adds to, see `converters.adapters`.
        created: only the LLM's files are this folder's, see `converters.create`.
        positions: where the branches' tokens stand, see `vfjax.model.ModelConfig`.
        mask: which of them see one another, see there.
    """

    path: Path
    layout: str
    config: dict[str, Any]
    llm: dict[str, Any]
    branches: list[dict[str, Any]]
    template: str
    tokenizer: dict[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str = ""
    image_token: str = ""
    parts: dict[str, Tensors] = dataclasses.field(default_factory=dict)
    prefixes: dict[str, Prefixes] = dataclasses.field(default_factory=dict)
    towers: dict[str, Tower] = dataclasses.field(default_factory=dict)
    held: dict[str, Tower] = dataclasses.field(default_factory=dict)
    tuned: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    spare: dict[str, Tensors] = dataclasses.field(default_factory=dict)
    seen: dict[str, bool] = dataclasses.field(default_factory=dict)
    own_head: bool = False
    same: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    base: Path | None = None
    created: bool = False
    positions: str = "running"
    mask: str = "causal"

    @property
    def home(self) -> Path:
        """Folder of the tokenizer and of generation_config.json: the base's if only it has one."""
        if self.base is None or has_tokenizer(self.path):
            return self.path
        return self.base

    @property
    def components(self) -> tuple[str, ...]:
        """All components, the LLM first."""
        parts = [
            f"branches.{branch['name']}.{kind}"
            for branch in self.branches
            for kind in ("encoder", "aux", "connector")
            if kind in branch
        ]
        return ("llm", *parts)

    def branch(self, part: str) -> dict[str, Any]:
        """The branch that a component is of."""
        return next(b for b in self.branches if b["name"] == part.split(".")[1])

    def component(self, part: str) -> dict[str, Any]:
        """The config of a component."""
        if part == "llm":
            return self.llm
        return self.branch(part)[part.split(".")[2]]

    def table(self, part: str) -> Table:
        """The table of a component."""
        return registry.find(self.component(part), f"{self.path}: {part}")

    def config_of(self, part: str, **more: Any) -> Any:
        """The config of a component, read by its table.

        Args:
            part: the component.
            more: keys beside, or in place of, its own.
        """
        folder = (self.towers[part].path if part in self.towers else None) or self.path
        config = self.table(part).config({**self.component(part), **more}, f"{folder}: {part}")
        return dataclasses.replace(config, **self.seen) if part == "llm" else config

    def weight_files(self) -> dict[str, Path]:
        """All files that tensors are read from; a tower's are named after its component."""
        files = dict(self.files)
        for part, tower in self.towers.items():
            files |= {f"{part}/{name}": path for name, path in tower.files.items()}
        return files


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one kind of folder is read.

    Attributes:
        name: unique.
        matches: whether a config.json is of this kind.
        describe: (folder, config.json, towers) -> the normal form without tensors.
        prefixes: (prefix in the folder, component, prefix in the component's table), the first that
            fits.
        unused: keys of config.json, outside its sections, that are known to have no effect on what
            is computed here.
        general: other layouts that match come first.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    describe: Callable[[Path, Values, Towers], Source]
    prefixes: Callable[[Source], tuple[tuple[str, str, str], ...]]
    unused: Unused
    general: bool = False

    def open(self, path: Path, config: Mapping[str, Any], towers: Towers) -> Source:
        """The normal form of a folder, without tensors.

        Args:
            path: the folder.
            config: its config.json.
            towers: where its towers are.

        Raises:
            InputError: a key of the wrong type, one that is missing, or one that asks for what is
                not supported; a tower that is nowhere to be found.
        """
        values = Values(config, str(path / "config.json"))
        template = values.text(TEMPLATE, None)
        source = self.describe(path, values, towers)
        values.done(self.unused)
        source.template = template or source.template
        return source


def open_source(
    path: str | Path,
    *,
    towers: Mapping[str, str | Path] | None = None,
    tower_source: str = "auto",
    base: str | Path | None = None,
) -> Source:
    """A checkpoint folder in normal form; reads headers only, but for `settle`.

    Args:
        path: a folder with config.json and weights, or one that holds a LoRA adapter or a projector
            for a base LLM.
        towers: name of a vision tower in config.json -> the folder where it is; so too of the base.
        tower_source: see `Towers.source`.
        base: folder of that base LLM, in place of the one that the configs name; a folder that is
            complete does not read it.

    Raises:
        InputError: no such folder, a config of no known layout, unreadable weights, a vision tower
            or base that is nowhere to be found, or tensors that don't fit the base.
    """
    path = findable(path)
    if not path.is_dir() or not adapters.is_part(path) and not (path / "config.json").exists():
        raise no_model(path)
    places = Towers(towers or {}, tower_source)
    contents = adapters.read(path, base, places)
    config = contents.config
    Values(config, str(contents.home / "config.json")).text("model_type", None)
    layout = layout_of(config)
    if layout is None:
        kinds = ", ".join(sorted(x.name for x in registry.LAYOUTS))
        tower = is_tower(config)
        raise InputError(
            contents.home / "config.json",
            found=f"model_type {cut(repr(config.get('model_type')))}" + ", a vision tower" * tower,
            expected=f"one of the layouts {kinds}",
            fix=TOWER if tower else "this kind of checkpoint is not supported",
        )
    source = layout.open(contents.home, config, places)
    if all(branch.get("code") == "transformers" for branch in source.branches):
        source.template = source.template or "plain"  # a template is not needed to open it there
    if source.branches and not source.template:
        source.table("llm")  # an LLM that is not known is said first
        raise InputError(
            contents.home / "config.json",
            found=f"no {TEMPLATE}, and an LLM of type {source.llm.get('model_type')!r}",
            expected="the name of one of vfjax.text.prompts.TEMPLATES",
            fix=f"add {TEMPLATE} with that which the model was trained with",
        )
    source.path, source.base, source.files = path, contents.base, contents.files
    tensors = contents.tensors
    if contents.base is not None:
        tied = source.config_of("llm").tied
        tensors = completed(contents, layout.prefixes(source), tied=tied)
    assign(source, layout, tensors, tower_source)
    settle(source)
    return source


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a folder with this config.json, None if there is none for it."""
    if not isinstance(config.get("model_type"), str):
        return None
    known = sorted(registry.LAYOUTS, key=lambda layout: layout.general)
    return next((x for x in known if x.matches(config)), None)


def is_tower(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, or OpenCLIP's, is of a vision tower that has a table."""
    half = config.get("vision_config")
    kind = (half if isinstance(half, dict) else config).get("model_type", config.get("model_type"))
    table = registry.TABLES.get("open_clip_convnext" if "model_cfg" in config else str(kind))
    model = layout_of(config) is not None
    return not model and table is not None and not table.architecture and table.views is None


def assign(
    source: Source, layout: Layout, tensors: Mapping[str, LazyTensor], tower_source: str
) -> None:
    """Distributes a folder's tensors over the components of its source.

    Args:
        source: what the layout made of config.json; its `parts` are filled.
        layout: of the folder.
        tensors: all of the folder's.
        tower_source: see `Towers.source`.

    Raises:
        InputError: a tensor that belongs to no component, or a tower without weights.
    """
    prefixes = layout.prefixes(source)
    names = rename(tensors, [(old, f"{part}\0{new}") for old, part, new in prefixes])
    if unknown := sorted(set(tensors) - set(names)):
        raise InputError(
            f"{source.path}: {unknown[0]}",
            found=f"{counted(len(unknown), 'tensor')} belonging to no part",
            expected="the names of layout " + layout.name,
            fix="check that config.json belongs to these weights",
        )
    held = {new.partition("\0")[0] for new, _ in names.values()}
    for part, tower in list(source.towers.items()):
        if _reads_own(part, tower, held, source.tuned, tower_source):
            source.held[part] = _held(source, part, source.towers.pop(part), names)
        elif not tower.tensors:
            raise InputError(
                f"{source.path}: {part}",
                found=f"no weights here, nor in {tower.path or tower.places}",
                expected="the vision tower that config.json names",
                fix="download its weights",
            )
    found: dict[str, list[tuple[str, str]]] = {}
    unread = []
    for old, (new, (prefix, target)) in names.items():
        part, _, name = new.partition("\0")
        if part in source.towers:
            unread.append(old)
            continue
        table = source.table(part)
        if table.spares(name):
            source.spare.setdefault(part, {})[old] = tensors[old]
        if not table.ignores(name):
            own = table.split(name, tensors[old]) or {name: tensors[old]}
            source.parts.setdefault(part, {}).update(own)
            found.setdefault(part, []).append((prefix, target.partition("\0")[2]))
    for part, tower in source.towers.items():
        source.parts[part], source.spare[part] = tower.tensors, tower.spare
        found[part] = list(tower.prefixes)
    source.unread = tuple(sorted(unread))
    source.prefixes = {part: pairs(each) for part, each in found.items()}


def settle(source: Source) -> None:
    """Decides by the tensors what head an LLM has.

    Under a config that ties it to the embedding as transformers does (modeling_utils.py,
    tie_weights), by values: a head that equals the embedding is left out, one that does not is
    kept, and the LLM's config in the normal form is no longer tied. Of a head alone the embedding
    is taken. Without a head or a tie (LlamaModel saved alone) there are hidden states only.
    Whether Phi's head has a bias (PhiForCausalLM's does, LLaVA's around a Phi does not) no config
    says.
    """
    table, tensors = source.table("llm"), source.parts.get("llm", {})
    config = source.config_of("llm")
    (name, like) = next((rule.source, rule.like) for rule in table.rules if rule.like)
    source.seen = {
        "headless": not config.tied and name not in tensors and like in tensors,
        "head_bias": config.head_bias and name.replace(".weight", ".bias") in tensors,
    }
    if not config.tied or name not in tensors:
        return
    if like not in tensors:
        tensors[like] = tensors.pop(name)
    elif equal(tensors[name], tensors[like]):
        del tensors[name]
        source.same[name] = like
    else:
        source.llm, source.own_head = {**source.llm, "tie_word_embeddings": False}, True


def _held(source: Source, part: str, tower: Tower, names: Mapping[str, Any]) -> Tower:
    """A tower as the checkpoint holds it: perhaps without the last layers, if no tap reads them.

    Dense Connector's code drops SigLIP's last layer before it saves (siglip_encoder.py).
    """
    pattern = re.compile(re.escape(part) + r"\0encoder\.layers\.(\d+)\.")
    count = len({m[1] for new, _ in names.values() if (m := pattern.match(new))})
    taps = [tap for group in source.branch(part)["connector"]["groups"] for tap in group]
    layers = source.config_of(part).layers
    if part.endswith(".encoder") and 0 <= min(taps) <= max(taps) <= count < layers:
        config = {**tower.config, "num_hidden_layers": count}
        source.branch(part)["encoder"] = config
        return dataclasses.replace(tower, config=config)
    return tower


def _reads_own(
    part: str, tower: Tower, held: set[str], tuned: tuple[str, ...], tower_source: str
) -> bool:
    """Whether the checkpoint's own copy of a tower is read."""
    if part in held and not tower.tensors:  # only the checkpoint has it
        return True
    if tower_source != "auto":
        return tower_source == "checkpoint"
    return part in held and part in tuned
