"""Files of checkpoints and training with one value wrong: each is read, or refused by one line.

    python -m tests.mutate [--seed N] [--count KIND=N ...] [--golden FOLDER]

runs, by default, 2,400 mutations of configs over all formats, 1,000 of indexes of shards, 600 of
tokenizers' files, 500 of mergekit's YAMLs and 500 of rows of training, and as many as there are of
other things that lie where a file should; it prints what came of them, and every fault. A fault is
another exception than InputError, a message of several lines or of 1,000 characters and more, or a
value of another JSON type that was taken and changed the model. `tests/test_mutations.py` runs a
part of them.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from converters import create, dry_run, export, open_source
from converters.inspect import inspect
from converters.load import model_config, tower_file
from converters.processor import processor
from tests import adapters, checkpoints
from vfjax import InputError
from vfjax.data import Conversations

LONGEST = 1000
"""Characters that a message stays below."""

PATIENCE = {signal.ITIMER_PROF: 30, signal.ITIMER_REAL: 300}
"""Seconds that reading may take: of the processor, which others may use meanwhile; and in all."""

COUNTS = {"config": 2400, "index": 1000, "tokenizer": 600, "yaml": 500, "rows": 500}
"""Kind of file -> how many mutations a full run tries."""

Path_ = tuple[Any, ...]
"""Keys and numbers that lead to a value."""

REMOVED = object()


@dataclasses.dataclass(frozen=True)
class Raw:
    """Text that stands in a file as it is."""

    text: str


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of one file.

    Attributes:
        file: its name.
        where: the value that is changed; () the whole file.
        old: what was there.
        new: what is there now; `REMOVED` for nothing.
        data: the file's bytes.
    """

    file: str
    where: Path_
    old: Any
    new: Any
    data: bytes

    def __str__(self) -> str:
        shown = "removed" if self.new is REMOVED else repr(self.new)
        place = ".".join(map(str, self.where))
        return f"{self.file} {place}: {repr(self.old)[:60]} -> {shown[:80]}"


LISTS = ("eos_token_id", "size", "crop_size")
"""Keys that may have one value or a list: an id or several, a side or height and width."""

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 10**9, 10**12, -(10**12), 2**63, 10**40, 10**400),
    *(0.0, 0.5, -0.5, 1.0, 2.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "1", "-1", "0.5", "true", "null", "nan", "x", "a b\nc", "../x", "/dev/zero", "a\0b"),
    *("\ud800", "\U0001f600", "x" * 300, "x" * 100_000, "[[", "{{", "%s", "(" * 200),
)
"""Values of any type."""

NESTED: tuple[Any, ...] = (
    *([], [None], [1], [-1], ["x"], [0.5], [[]], [[1, 2]], [{}], [1, "x"], [1] * 10_000),
    *({}, {"x": 1}, {"type": "x"}, {"": None}, {"rope_type": 7}, {"1": {"2": []}}),
    *(Raw("[" * 50_000 + "]" * 50_000), Raw('{"a":' * 50_000 + "1" + "}" * 50_000)),
    *(Raw("1" * 5000), Raw("1e999"), Raw("-1e999"), Raw("[1e999]")),
)

STRANGE = ("surplus", "\0", "\ud800", "x" * 300, "a b\nc")
"""Keys that nobody knows."""

WHOLE = (
    *(b"", b" ", b"{", b"[]", b"null", b"1", b'"x"', b"\0\0", b"\xff\xfe{}", b"{}"),
    *(b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b'{"a": 1} {"b": 2}', b"[" * 100_000, b"NaN"),
    *(b"1" * 10_000, b"x" * 100_000, b'{"\\ud800": 1}', b'{"a": "\\ud800"}'),
)
"""Contents of a whole file."""


def near(value: Any) -> tuple[Any, ...]:
    """Values that are almost the given one."""
    out: tuple[Any, ...] = ([value], {"x": value}, [value, value])
    if isinstance(value, bool):
        return (*out, int(value), str(value), str(value).lower())
    if isinstance(value, int | float):
        finite = math.isfinite(value)
        out += (str(value), -value, value + 0.5, f" {value}", value * 10**6, value * 1000)
        return (*out, float(value), value + 1, value * 2) if finite else out
    if isinstance(value, str):
        return (*out, value.upper(), value + " ", value[:-1], value + "\0", value.encode().hex())
    if isinstance(value, list):
        return (*out, value[:-1], value[::-1], value * 2, dict(enumerate(value)), str(value))
    if isinstance(value, dict):
        return (*out, list(value), list(value.items()), str(value), {**value, "surplus": 1})
    return out


def places(tree: Any, most: int = 4) -> Iterator[tuple[Path_, Any]]:
    """All values in a tree, the first few of long lists and mappings."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        pairs = list(tree.items())[: 12 * most]
    elif isinstance(tree, list):
        pairs = list(enumerate(tree))[:most]
    for key, value in pairs:
        yield (key,), value
        yield from (((key, *rest), x) for rest, x in places(value, most))


def changed(tree: Any, where: Path_, new: Any) -> Any:
    """A copy with another value in one place."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in where[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[where[-1]]
    else:
        inner[where[-1]] = new
    return tree


def dump(tree: Any) -> bytes:
    """JSON with `Raw` texts as they are."""
    raw: list[str] = []

    def default(value: Any) -> str:
        raw.append(value.text)
        return f"\1raw{len(raw) - 1}\1"

    text = json.dumps(tree, default=default)
    for i, each in enumerate(raw):
        text = text.replace(f'"\\u0001raw{i}\\u0001"', each)
    return text.encode()


def mutations(file: str, tree: Any, rng: random.Random) -> Iterator[Mutation]:
    """Mutations of a JSON file without end: of each value in turn, in the order of chance."""
    found = list(places(tree))
    while True:
        rng.shuffle(found)
        for where, old in found:
            choices = (REMOVED, *near(old)) if rng.random() < 0.4 else (*SCALARS, *NESTED)
            new = rng.choice(choices)
            if rng.random() < 0.04 and isinstance(_at(tree, where[:-1]), dict):
                where, old = (*where[:-1], rng.choice(STRANGE)), None
                new = rng.choice((*SCALARS, *NESTED))
            yield Mutation(file, where, old, new, dump(changed(tree, where, new)))
        for data in rng.sample(WHOLE, 2):
            yield Mutation(file, (), tree, data, data)


def _at(tree: Any, where: Path_) -> Any:
    for key in where:
        tree = tree[key]
    return tree


@dataclasses.dataclass
class Subject:
    """A folder whose files are mutated, and how it is read.

    Attributes:
        name: of the format.
        files: names of JSON (or, for `kind` "yaml", YAML) files.
        read: reads the folder; what it returns says what was understood.
    """

    name: str
    kind: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[], Any]


@dataclasses.dataclass
class Report:
    """What came of mutations.

    Attributes:
        counts: (kind, outcome) -> number; outcomes are "refused", "read" and "fault".
        faults: one line each.
        taken: (format, mutation) of values of another type that changed what was understood.
    """

    counts: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    faults: list[str] = dataclasses.field(default_factory=list)
    taken: list[tuple[str, Mutation]] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """A table."""
        kinds = sorted({kind for kind, _ in self.counts})
        return [
            f"{kind}: {sum(n for (k, _), n in self.counts.items() if k == kind)} mutations, "
            + ", ".join(f"{self.counts[kind, x]} {x}" for x in ("refused", "read", "fault"))
            for kind in kinds
        ]


def outcome(read: Callable[[], Any]) -> tuple[str, str, Any]:
    """("refused", "read" or "fault", message, what was read)."""
    for each in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(each, _late)
    for timer, seconds in PATIENCE.items():
        signal.setitimer(timer, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "read", "", read()
    except InputError as error:
        line = str(error)
        if len(line) >= LONGEST or len(line.splitlines()) != 1 or ": found " not in line:
            return "fault", f"message of {len(line)} characters: {line[:300]!r}", None
        return "refused", line, None
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and "/lib/" not in f.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return "fault", f"{place} {type(error).__name__}: {str(error)[:150]!r}", None
    finally:
        for timer in PATIENCE:
            signal.setitimer(timer, 0)


def _late(*_: object) -> None:
    raise TimeoutError


def kind_of(value: Any) -> str:
    """A JSON type; whole numbers and others are one, an absent value is null."""
    if value is REMOVED or value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__


def run(subject: Subject, count: int, seed: int, report: Report) -> None:
    """Tries mutations of a subject's files, the original ones are there again afterwards."""
    rng = random.Random(f"{subject.name} {seed}")
    _, fault, right = outcome(subject.read)
    assert right is not None, f"{subject.name}: {fault}"
    load = yaml.safe_load if subject.kind == "yaml" else json.loads
    streams = [
        mutations(file, load((subject.folder / file).read_text()), rng) for file in subject.files
    ]
    for i in range(count):
        mutation = next(streams[i % len(streams)])
        file = subject.folder / mutation.file
        before = file.read_bytes()
        file.write_bytes(mutation.data)
        try:
            what, message, found = outcome(subject.read)
        finally:
            file.write_bytes(before)
        if what == "fault":
            report.faults.append(f"{subject.name}: {mutation}: {message}")
        elif what == "read" and mutation.where:
            kinds = kind_of(mutation.old), kind_of(mutation.new)
            listed = "list" in kinds and mutation.where[-1] in LISTS
            if len(set(kinds)) > 1 and "null" not in kinds and found != right and not listed:
                report.taken.append((subject.name, mutation))
        report.counts[subject.kind, what] += 1


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as each:
        each.bind(path.name)


OTHERS: dict[str, Callable[[Path], object]] = {
    "pipe": _pipe,
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.touch(),
    "a long name": lambda path: path.symlink_to("x" * 250 + "/" + "y" * 250),
}
"""What may lie where a file should."""


WITH_FILES = ("llava", "index-safetensors", "index-bin", "tokenizer-hf", "adapter", "rows")
"""Subjects each of whose files is replaced by something that is no file."""


def replace(subject: Subject, report: Report) -> None:
    """Puts each of `OTHERS` in the place of each file of a subject's folder."""
    for file in sorted(path for path in subject.folder.rglob("*") if path.is_file()):
        kept = file.with_name(file.name + ".kept")
        file.rename(kept)
        for name, make in OTHERS.items():
            make(file)
            what, message, _ = outcome(subject.read)
            if what == "fault":
                where = file.relative_to(subject.folder)
                report.faults.append(f"{subject.name}: {where} is a {name}: {message}")
            report.counts["file", what] += 1
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        kept.rename(file)


class Reader:
    """Reads a checkpoint folder's configs and headers, as `load` and `inspect` do.

    What is built of the same config as before is known to fit the tensors.
    """

    def __init__(self, folder: Path, base: Path | None = None):
        self.folder, self.base, self.known = folder, base, set[str]()

    def __call__(self) -> Any:
        if tower_file(self.folder):
            return inspect(self.folder)
        source = open_source(self.folder, base=self.base)
        config = model_config(source)
        made = processor(source, config)
        made.settings.check()
        shapes = {
            part: {name: tuple(x.shape) for name, x in tensors.items()}
            for part, tensors in source.parts.items()
        }
        said = repr((config, shapes))
        if said not in self.known:
            inspect(self.folder, self.base)
            self.known.add(said)
        words = [None if made.tokenizer is None else made.tokenizer("a b c").input_ids]
        return said, source.template, made.chat_template, made.stop_ids, made.settings, words


def configs(root: Path, golden: Path | None = None) -> Iterator[Subject]:
    """A subject for each format of config.json."""
    text = {"vocab_size": 320, "num_hidden_layers": 1}
    plain = {
        "llama": {},
        **{"mistral": {}, "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1}},
        **{"qwen2": {}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}},
        **{"phi": {"num_key_value_heads": 4}, "phi3": {}},
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for kind, keys in plain.items():
        path = root / kind
        made = checkpoints.make_llama(0, model_type=kind, **{**text, **keys, **special})
        checkpoints.llama_folder(path, llm=made)
        if kind == "phi":  # whose class has no such key
            config = json.loads((path / "config.json").read_text())
            config.pop("rms_norm_eps")
            checkpoints.write_json(path / "config.json", config)
        yield _subject(path, "config.json")
    for kind in checkpoints.TOWERS:
        checkpoints.tower_folder(root / f"tower-{kind}", kind, num_hidden_layers=1)
        yield _subject(root / f"tower-{kind}", "config.json")
    checkpoints.hf_llava_folder(root / "llava-hf")
    yield _subject(root / "llava-hf", "config.json", "preprocessor_config.json")
    checkpoints.llava_next_folder(root / "llava-next-hf")
    yield _subject(root / "llava-next-hf", "config.json", "preprocessor_config.json")
    checkpoints.upstream_llava_folder(root / "llava", weights="safetensors")
    tower = (f"vision_tower/{name}.json" for name in ("config", "preprocessor_config"))
    yield _subject(root / "llava", "config.json", *tower)
    shutil.copytree(root / "llava" / "vision_tower", root / "clip")
    comm = {"kind": "comm", "layers": [1, 2], "layers_aux": [2], "blocks": 1, "ratio": 2}
    new, _ = create(root / "llama", root / "clip", comm, aux=root / "clip", aspect="crop")
    export(new, root / "comm")
    yield _subject(root / "comm", "config.json")
    tower_of, entry = checkpoints.make_tower("clip", 1), {"taps": [-2], "drop": 1, "aspect": "pad"}
    branches = {"a": (tower_of, checkpoints.make_connector((32, 32, 32), 2), entry)}
    checkpoints.fused_folder(root / "fused", checkpoints.make_llama(3, **text), branches)
    yield _subject(root / "fused", "config.json")
    adapters.lora_folder(root / "adapter", checkpoints.make_llama(4))
    checkpoints.llama_folder(root / "base", 4)
    yield _subject(root / "adapter", "adapter_config.json", base=root / "base")
    for case in sorted(golden.glob("*/case.json")) if golden else ():
        path = root / case.parent.name
        shutil.copytree(case.parent, path)
        yield _subject(path, *sorted(p.name for p in path.glob("*config.json")))


def _subject(path: Path, *files: str, kind: str = "config", base: Path | None = None) -> Subject:
    return Subject(path.name, kind, path, files, Reader(path, base))


def indexes(root: Path) -> Iterator[Subject]:
    """Sharded checkpoints."""
    for name, write in {"safetensors": save_file, "bin": torch.save}.items():
        path = root / f"index-{name}"
        checkpoints.upstream_llava_folder(path, weights="safetensors")
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        stem = "model" if name == "safetensors" else "pytorch_model"
        places_: dict[str, str] = {}
        for i in range(2):
            part = {key: x for j, (key, x) in enumerate(tensors.items()) if j % 2 == i}
            file = f"{stem}-{i + 1:05d}-of-00002.{name}"
            write(part, path / file)
            places_ |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1000}, "weight_map": places_}
        checkpoints.write_json(path / f"{stem}.{name}.index.json", index)
        yield _subject(path, f"{stem}.{name}.index.json", kind="index")


def tokenizers(root: Path) -> Iterator[Subject]:
    """Folders with tokenizers, of transformers' and of authors'."""
    settings = {
        "repetition_penalty": 1.1,
        "eos_token_id": [2],
        "bos_token_id": 1,
        "do_sample": False,
        "temperature": 0.5,
        "suppress_tokens": [],
    }
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    files = ("tokenizer_config.json", "tokenizer.json", "generation_config.json")
    more = {
        "special_tokens_map.json": {"bos_token": "<s>", "unk_token": {"content": "<unk>"}},
        "added_tokens.json": {"<s>": 1},
        "chat_template.json": {"chat_template": template},
    }
    for name, make in {
        "tokenizer-llm": checkpoints.llama_folder,
        "tokenizer-hf": checkpoints.hf_llava_folder,
        "tokenizer-upstream": checkpoints.upstream_llava_folder,
    }.items():
        path = root / name
        make(path)
        checkpoints.write_json(path / "generation_config.json", settings)
        for file, content in more.items():
            if name != "tokenizer-hf" or file != "chat_template.json":
                checkpoints.write_json(path / file, content)
        known = json.loads((path / "tokenizer_config.json").read_text())
        known |= {"model_max_length": 512, "chat_template": template, "add_bos_token": True}
        known["added_tokens_decoder"] = {
            str(i): {"content": x, "special": True, "normalized": False}
            for i, x in enumerate(("<unk>", "<s>", "</s>"))
        }
        checkpoints.write_json(path / "tokenizer_config.json", known)
        found = (*files, *more)
        if name == "tokenizer-hf":
            checkpoints.write_json(
                path / "processor_config.json",
                {
                    "image_token": "<image>",
                    "patch_size": 7,
                    "chat_template": template,
                    "processor_class": "LlavaProcessor",
                    "image_processor": json.loads((path / "preprocessor_config.json").read_text()),
                },
            )
            found = (*files, *more, "processor_config.json")
        yield _subject(path, *(x for x in found if (path / x).exists()), kind="tokenizer")


RECIPES: dict[str, dict[str, Any]] = {
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "one", "parameters": {"weight": 0.5, "density": [0.5, 1.0]}},
            {
                "model": "two",
                "parameters": {"weight": [{"filter": "mlp", "value": 1.0}, {"value": 0.3}]},
            },
        ],
        "parameters": {"normalize": True, "lambda": 1.0},
        "dtype": "float32",
    },
    "slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "one", "layer_range": [0, 2]}]},
            {"sources": [{"model": {"model": {"path": "two"}}, "layer_range": [1, 2]}]},
        ],
        "out_dtype": "float16",
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "one",
        "models": [{"model": "one"}, {"model": "two"}],
        "parameters": {"t": [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]},
        "tokenizer": {"source": "base", "tokens": {"<s>": {"source": "one", "force": True}}},
        "chat_template": "auto",
    },
    "modules": {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {"models": [{"model": "one"}, {"model": "two"}], "parameters": {}}
        },
        "parameters": {"weight": 0.5},
        "tokenizer_source": "union",
    },
}
"""Recipes over the folders "base", "one" and "two"."""


def recipes(root: Path) -> Iterator[Subject]:
    """Mergekit's YAMLs of two LLMs and their base."""
    home = root / "yaml"
    llm = checkpoints.llama_folder(home / "base", 1, num_hidden_layers=2)
    for seed, name in enumerate(("one", "two"), 2):
        checkpoints.llama_folder(home / name, llm=checkpoints.tuned(llm, seed))
    for name, recipe in RECIPES.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe))

        def read(file: Path = home / f"{name}.yaml") -> Any:
            with contextlib.chdir(home):
                return dry_run({}, home / "out", recipe=file, export="llm")

        yield Subject(name, "yaml", home, (f"{name}.yaml",), read)


ROWS = [
    {
        "id": 1,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ],
        "source": "note",
    },
    {
        "id": "2",
        "image": ["a.png", "a.png"],
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "<image><image>"},
            {"from": "gpt", "value": "Two."},
        ],
    },
]
"""Rows of training."""


def rows(root: Path) -> Iterator[Subject]:
    """Rows of training, as a list and one a line."""
    home = root / "rows"
    home.mkdir()
    (home / "a.png").touch()
    checkpoints.write_json(home / "rows.json", ROWS)

    def read() -> Any:
        found = Conversations(home / "rows.json", home)
        rows = (found[i] for i in range(len(found)))
        return [(row.pictures, row.turns, row.videos) for row in rows]  # an id may be anything

    yield Subject("rows", "rows", home, ("rows.json",), read)


SUBJECTS: dict[str, Callable[[Path], Iterator[Subject]]] = {
    "config": configs,
    "index": indexes,
    "tokenizer": tokenizers,
    "yaml": recipes,
    "rows": rows,
}
"""Kind of file -> what has such files."""


def main() -> int:
    """A full run; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", nargs="+", default=[], metavar="KIND=N")
    parser.add_argument("--golden", type=Path, help="folder of reference outputs")
    parser.add_argument("--only", help="subjects whose names hold this")
    parser.add_argument("--taken", action="store_true", help="print what changed a type")
    args = parser.parse_args()
    counts = dict(COUNTS)
    if args.count:
        counts = {kind: int(n) for kind, _, n in (x.partition("=") for x in args.count)}
    report, shown = Report(), 0
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        for kind, count in counts.items():
            make = SUBJECTS[kind]
            found = list(configs(root, args.golden) if kind == "config" else make(root))
            for subject in found:
                if args.only and args.only not in subject.name:
                    continue
                print(subject.name, flush=True)
                run(subject, math.ceil(count / len(found)), args.seed, report)
                if subject.name in WITH_FILES:
                    replace(subject, report)
                print("\n".join(report.faults[shown:]), flush=True)
                shown = len(report.faults)
    for name, mutation in report.taken if args.taken else ():
        print(f"taken: {name}: {mutation}")
    print("\n".join(report.lines()))
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
