"""A checkpoint folder in normal form, the same whatever wrote the folder.

Loading, merging, inspecting and exporting know only the normal form. A layout says how one kind of
folder is read into it; `converters.folder` does so.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from converters import registry
from converters.files.names import PAIR, TOKENIZERS
from converters.params.table import Names, Table
from converters.towers import Prefixes, Tensors, Tower, Towers, open_clip_type
from converters.values import Unused, Values
from vfjax.architectures import Architecture
from vfjax.atomic import JSON
from vfjax.model import ModelConfig

TEMPLATE = "mm_prompt_template"
"""Key of config.json, ours: prompt template of a model that was not trained with its layout's."""

Config = Mapping[str, Any]
"""A component's config, as JSON has it; `model_type` names a table, which has checked the rest."""


def tokenizer_class(config: Mapping[str, JSON]) -> dict[str, str]:
    """What transformers' AutoTokenizer reads of a config.json of its own."""
    keys = ("model_type", "tokenizer_class")
    found = {key: config.get(key) for key in keys}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary."""
    alone = any((folder / name).is_file() for name in TOKENIZERS)
    return alone or all((folder / name).is_file() for name in PAIR)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A member's visual path in normal form.

    Attributes:
        name: unique in the model.
        encoder: config of its first encoder.
        preprocessor: preprocessor_config.json; empty where there is none.
        aspect: "pad" or "crop".
        connector: config of what makes visual tokens of the encoders' hidden states.
        others: name -> config of each other encoder, see `Architecture.encoders`.
        code: whose code reads it: "transformers" or "authors".
    """

    name: str
    encoder: Config
    preprocessor: Config
    aspect: Literal["pad", "crop"]
    connector: Config
    others: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    code: Literal["authors", "transformers"] = "authors"

    @property
    def encoders(self) -> dict[str, Config]:
        """Name -> config of each encoder."""
        return {"encoder": self.encoder, **self.others}

    def part(self, kind: str) -> str:
        """The name in the model of a component: "connector", or an encoder's name."""
        return f"branches.{self.name}.{kind}"

    @property
    def parts(self) -> dict[str, Config]:
        """Component, by its name in the model -> its config."""
        found = {**self.encoders, "connector": self.connector}
        return {self.part(kind): config for kind, config in found.items()}

    def with_encoder(self, kind: str, config: Config) -> "Branch":
        """The branch with another config of an encoder."""
        encoder, *others = (self.encoders | {kind: config}).items()
        return dataclasses.replace(self, encoder=encoder[1], others=dict(others))

    def to_json(self) -> dict[str, Any]:
        """As a fused folder's config.json has it."""
        keys = ("name", "encoder", "preprocessor", "aspect", "code", "connector")
        found = {key: getattr(self, key) for key in keys if key != "code" or self.code != "authors"}
        return {**found, **self.others}


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint folder in normal form.

    Attributes:
        path: the folder.
        layout: name of its layout.
        config: its config.json.
        llm: Hugging Face config of the language model.
        branches: in the order in which their tokens are read.
        template: name of the prompt template, "chat_template" for the folder's own.
        chat_template: the folder's own, Jinja; "" if its code does not read one.
        image_token: see `vfjax.Processor`.
        image_id: its id where config.json does not say one; None: the tokenizer's own.
        written: it is text that the folder's processor replaces before anything is tokenised,
            whatever token the tokenizer has for pictures.
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
        own_head: whether the LLM has a head of its own under a config that ties it, see `settle`.
        same: tensors of the LLM that are left out -> those that they equal, see `settle`.
        files: the folder's weights files, and its base's, by name.
        quantised: how those of its tensors are that its files, or its base's, hold quantised.
        base: folder of the LLM that this one adapts or adds to, see `converters.adapters`.
        created: only the LLM's files are this folder's, see `converters.create`.
        positions: where the branches' tokens stand, see `vfjax.model.ModelConfig`.
        mask: which of the branches' tokens see one another, see `vfjax.model.ModelConfig`.
    """

    path: Path
    layout: str
    config: Config
    llm: Config
    branches: tuple[Branch, ...]
    template: str
    tokenizer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str = ""
    image_token: str = ""
    image_id: int | None = None
    written: bool = False
    parts: Mapping[str, Tensors] = dataclasses.field(default_factory=dict)
    prefixes: Mapping[str, Prefixes] = dataclasses.field(default_factory=dict)
    towers: Mapping[str, Tower] = dataclasses.field(default_factory=dict)
    held: Mapping[str, Tower] = dataclasses.field(default_factory=dict)
    tuned: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    spare: Mapping[str, Tensors] = dataclasses.field(default_factory=dict)
    seen: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    own_head: bool = False
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    quantised: tuple[str, ...] = ()
    base: Path | None = None
    created: bool = False
    positions: str = "running"
    mask: str = "causal"

    @property
    def home(self) -> Path:
        """Folder of the tokenizer: the base's if only it has one."""
        if self.base is None or has_tokenizer(self.path):
            return self.path
        return self.base

    @property
    def kind(self) -> Literal["llm", "transformers", "authors", "fused"]:
        """Whose code the folder is for; "llm" is transformers', too."""
        if not self.branches:
            return "llm"
        ported = all(branch.code == "transformers" for branch in self.branches)
        return "fused" if self.layout == "visionfuse" else "transformers" if ported else "authors"

    @property
    def generation(self) -> Path:
        """generation_config.json: of an adapter its base's, which transformers and PEFT read."""
        return (self.base or self.path) / "generation_config.json"

    @property
    def components(self) -> dict[str, Config]:
        """Component -> its config, the LLM's first."""
        parts = [item for branch in self.branches for item in branch.parts.items()]
        return {"llm": self.llm, **dict(parts)}

    @property
    def encoders(self) -> dict[str, tuple[Branch, str]]:
        """Component -> its branch and its name there, of all encoders."""
        return {b.part(kind): (b, kind) for b in self.branches for kind in b.encoders}

    def table(self, part: str) -> Table[Any]:
        """The table of a component."""
        return registry.find(self.components[part], f"{self.path}: {part}")

    def config_of(self, part: str, **more: int) -> Any:  # each table has a class of its own
        """The config of a component, read by its table.

        Args:
            part: the component.
            more: keys beside, or in place of, its own.
        """
        folder = (self.towers[part].path if part in self.towers else None) or self.path
        config = self.table(part).config({**self.components[part], **more}, f"{folder}: {part}")
        return dataclasses.replace(config, **self.seen) if part == "llm" else config

    def weight_files(self) -> dict[str, Path]:
        """All files that tensors are read from; a tower's are named after its component."""
        files = dict(self.files)
        for part, tower in self.towers.items():
            files |= {f"{part}/{name}": path for name, path in tower.files.items()}
        return files


KEEP = "keep the layout that it has: this cannot be said in the other"
"""What to do about a model that another layout has no words for."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A model in the words of a layout, without weights and tokenizer.

    Attributes:
        config: config.json.
        prefixes: component -> (prefix in the folder, prefix in the component's table), the first
            that fits.
        files: other JSON files, by their paths in the folder.
    """

    config: Mapping[str, Any]
    prefixes: Mapping[str, Prefixes]
    files: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Writer:
    """How a model that was read from another layout is written in this one.

    What a layout cannot say need not be looked for: what was written is read again and compared,
    see `converters.layouts`.

    Attributes:
        kind: how `converters.export` calls the layout; several have one name, for each what its
            class computes.
        architectures: what that is.
        write: (the model's normal form, its config, the ids of `tokens`) -> what is written.
        tokens: what its tokenizer must have for pictures and videos, the former first.
    """

    kind: Literal["hf", "llava"]
    architectures: tuple[type[Architecture], ...]
    write: Callable[[Source, ModelConfig, Sequence[int]], Written]
    tokens: tuple[str, ...] = ()


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
        writer: how models of other layouts are written in this one, if they can be.
    """

    name: str
    matches: Callable[[Mapping[str, JSON]], bool]
    describe: Callable[[Path, Values, Towers], Source]
    prefixes: Callable[[Source], Names]
    unused: Unused
    general: bool = False
    writer: Writer | None = None

    def open(self, path: Path, config: Mapping[str, JSON], towers: Towers) -> Source:
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
        return dataclasses.replace(source, template=template or source.template)


LAYOUTS: list[Layout] = []
"""All layouts; at most one matches a config."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What a new model is made of, for the config of its connector.

    Attributes:
        llm: `model_type` of the LLM.
        vocab: tokens of the LLM.
        tower: of the first encoder.
        encoder: its config.
        aux: the second tower, None without one.
        select: hidden state of the plain feature.
        options: of the connector.
    """

    llm: str
    vocab: int
    tower: Tower
    encoder: Any
    aux: Tower | None
    select: int
    options: Config


@dataclasses.dataclass(frozen=True)
class New:
    """How a format makes a new connector of a kind, see `converters.create`.

    Attributes:
        kind: unique.
        options: names of its options.
        describe: of its layout.
        config: keys of config.json, beside or in place of LLaVA's.
        prefixes: of the connector's tensors, (prefix in the folder, in its table).
        aux: reads the folder of a second encoder; None: there is none.
        needs: what the second encoder must be where the kind has one always; "" where it may lack.
        registers: whether its folders can say that an encoder has register tokens.
        llms: `model_type` of the LLMs that its folders can have; around others a fused folder is
            made.
    """

    kind: str
    options: tuple[str, ...]
    describe: Callable[[Path, Values, Towers], Source]
    config: Callable[[Made], dict[str, Any]]
    prefixes: Callable[[Source], Prefixes]
    aux: Callable[[str | Path], Tower] | None = None
    needs: str = ""
    registers: bool = False
    llms: tuple[str, ...] = ("llama", "mistral")


NEW: dict[str, New] = {}
"""Kind of connector -> how it is made anew."""


def register() -> None:
    """Fills `LAYOUTS`, `NEW` and `registry.TABLES`; raises ValueError for a second of a name."""
    for module in registry.modules():
        registry.register(module)
        for layout in getattr(module, "LAYOUTS", ()):
            if any(layout.name == known.name for known in LAYOUTS):
                raise ValueError(f"{module.__name__}: another layout is called {layout.name!r}")
            LAYOUTS.append(layout)
        for new in getattr(module, "NEW", ()):
            if NEW.setdefault(new.kind, new) is not new:
                raise ValueError(f"{module.__name__}: another format makes {new.kind!r}, too")


def layout_of(config: Config) -> Layout | None:
    """The layout of a folder with this config.json, None if there is none for it."""
    if not isinstance(config.get("model_type"), str):
        return None
    known = sorted(LAYOUTS, key=lambda layout: layout.general)
    return next((x for x in known if x.matches(config)), None)


def is_tower(config: Config) -> bool:
    """Whether a config.json, or OpenCLIP's, is of a vision tower that has a table."""
    half, open_clip = config.get("vision_config"), config.get("model_cfg")
    kind = (half if isinstance(half, dict) else config).get("model_type", config.get("model_type"))
    if isinstance(open_clip, dict):
        vision = open_clip.get("vision_cfg")
        kind = open_clip_type(vision if isinstance(vision, dict) else {})
    table = registry.TABLES.get(str(kind))
    model = layout_of(config) is not None
    return not model and table is not None and not table.architecture and table.path is None
