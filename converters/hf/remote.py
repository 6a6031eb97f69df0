"""A fused folder with the code that runs it: transformers needs no vfjax then."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from converters.files.names import TOKENIZER_FILES
from converters.folder import open_source
from converters.hf import branch, encoders, model, reading, written
from converters.hf.bundle import bundle
from converters.hf.config import VisionFuseConfig
from converters.hf.names import Name
from converters.hf.plain import classes_of, to_plain
from converters.hf.processor import VisionFuseProcessor
from converters.load import model_config
from converters.processor import processor
from converters.source import Source
from vfjax import InputError, Processor
from vfjax.atomic import JSON, read_json, replacing, store_of, temporary
from vfjax.model import ModelConfig

Definition = type | Callable[..., object]
"""A class or function of a module."""

FILE = "modeling_visionfuse.py"
"""Of the folder: its code."""

AUTO: dict[str, type] = {
    "AutoConfig": VisionFuseConfig,
    "AutoModel": model.VisionFuseForConditionalGeneration,
    "AutoModelForImageTextToText": model.VisionFuseForConditionalGeneration,
    "AutoProcessor": VisionFuseProcessor,
}
"""transformers' classes -> those of the file that they stand for."""

TEXTS = ("a b", "  Où est\n\nle 3 ?\t", "<image>\n{x: 1}", "日本 👀 ok")
"""What a tokenizer is tried with."""


def add_code(folder: str | Path) -> None:
    """Adds the code to a fused folder, and what it reads in place of vfjax's readers.

    `modeling_visionfuse.py` is made of vfjax's own sources; config.json and processor_config.json
    name its classes (`auto_map`), and config.json holds the architectures as plain JSON ("plain").
    The tokenizer is written as tokenizer.json, as it computes here. A folder with code is read by
    `converters.load` as before.

    Args:
        folder: of `converters.fuse`, or a fused model's of `converters.export`.

    Raises:
        InputError: another folder, an architecture that torch lacks, a tokenizer that can't be
            written so.
    """
    check_place(folder)
    folder = Path(folder)
    source = open_source(folder)
    config = check(source)
    own = processor(source, config)
    auto: dict[str, JSON] = {
        name: f"{Path(FILE).stem}.{kind.__name__}" for name, kind in AUTO.items()
    }
    as_torch = VisionFuseConfig.from_pretrained(folder)
    plain = {
        "branches": to_plain(config.branches, "branches"),
        "llm": to_plain(config.llm, "llm"),
        "processor": {key: to_plain(getattr(own, key), key) for key in written.PROCESSOR},
        "spare": sorted(reading.spare(as_torch)),
    }
    known = read_json(folder / "config.json")
    changed = {**known, "auto_map": auto, written.KEY: plain}
    with temporary() as home:
        (home / FILE).write_text(code(config, own, type(as_torch.text_config)))
        if own.tokenizer is not None:
            changed["tokenizer"] = {}
            save_tokenizer(own, home)
        shown = {"auto_map": {"AutoProcessor": auto["AutoProcessor"]}}
        write(home / "processor_config.json", {"processor_class": "VisionFuseProcessor", **shown})
        write(home / "config.json", changed)
        for file in sorted(home.iterdir(), key=lambda file: file.name == "config.json"):
            with replacing(folder / file.name) as part:
                part.write_bytes(file.read_bytes())
        kept = {file.name for file in home.iterdir()} | {"generation_config.json"}
    if own.tokenizer is not None:
        for name in set(TOKENIZER_FILES) - kept:
            (folder / name).unlink(missing_ok=True)


def check_place(folder: str | Path) -> None:
    """Raises InputError for a folder in a bucket."""
    if store_of(folder):
        raise InputError(
            "remote_code",
            found=f"a folder in a bucket, {folder}",
            expected="one on a disk",
            fix="write it there, and copy it to the bucket",
        )


def check(source: Source) -> ModelConfig:
    """The config of a folder that can have code.

    Raises:
        InputError: it is not a fused one, or torch lacks one of its architectures.
    """
    if source.layout != "visionfuse":
        raise InputError(
            source.path,
            found=f"a folder of layout {source.layout!r}",
            expected="a fused one, which code is for",
            fix="fuse it, alone or with others, by converters.fuse",
        )
    config = model_config(source)
    for each in config.branches:
        branch.kind_of(each.architecture, f"{source.path}: branch {each.name!r}")
    return config


def code(config: ModelConfig, own: Processor, llm: type) -> str:
    """The file's source: what this model needs of all families.

    Args:
        config: of the model.
        own: what makes its batches.
        llm: class of its LLM's config.
    """
    classes = classes_of(config) | classes_of(own.settings)
    roots = [*AUTO.values(), *classes.values()]
    names = ", ".join(sorted(classes))
    more = f"CLASSES.update({{each.__name__: each for each in ({names},)}})"
    filled = Name(written.__name__, "CLASSES")
    return bundle([*map(_name, roots), filled], map(_name, twins(config, llm)), more)


def twins(config: ModelConfig, llm: type) -> Iterator[Definition]:
    """The definitions in torch that nothing but a registry names."""
    for each in config.branches:
        yield branch.kind_of(each.architecture, each.name)
        for encoder in each.architecture.encoders.values():
            if kind := encoders.ENCODERS.get(type(encoder)):
                yield kind.build
    if llm.__module__.startswith(f"{__package__}."):  # its module registers it
        yield llm


def _name(kind: Definition) -> Name:
    return Name(kind.__module__, kind.__qualname__)


def save_tokenizer(own: Processor, home: Path) -> None:
    """Writes a tokenizer so that tokenizer.json alone says what it computes.

    Raises:
        InputError: read again, it would give other ids.
    """
    tokenizer = own.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    before = tokenizer.chat_template
    tokenizer.chat_template = own.chat_template or None
    tokenizer.save_pretrained(home)
    tokenizer.chat_template = before
    settings = read_json(home / "tokenizer_config.json")
    settings["tokenizer_class"] = PreTrainedTokenizerFast.__name__
    settings.pop("auto_map", None)
    write(home / "tokenizer_config.json", settings)
    again = PreTrainedTokenizerFast.from_pretrained(home)
    texts = [*TEXTS, *tokenizer.added_tokens_encoder, own.chat_template]
    if wrong := [text for text in texts if tokenizer(text).input_ids != again(text).input_ids]:
        raise InputError(
            f"{tokenizer.name_or_path}: tokenizer",
            found=f"other ids of {wrong[0]!r} when it is read as tokenizer.json",
            expected="a tokenizer that tokenizer.json can say",
            fix="leave remote_code out",
        )


def write(file: Path, value: JSON) -> None:
    """Writes a JSON file."""
    file.write_text(json.dumps(value, indent=2) + "\n")
