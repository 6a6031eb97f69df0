"""Links in the place of sources, temporary folders and outputs: only the named output changes."""

import contextlib
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import converters
import experiments.configs.evaluate as configs_evaluate
import experiments.configs.train as configs_train
from converters.files.writer import write_folder
from experiments.tasks import evaluate, train
from tests import checkpoints
from tests.converters.test_files import hub_cache
from vfjax import InputError
from vfjax.eval import log
from vfjax.train.checkpoint import Checkpoints
from vfjax.train.record import Record

NAMES = ("base", "one", "two")


def lay_folders(relative: bool, plain: Path, root: Path) -> None:
    """Every source a link to a folder."""
    for name in NAMES:
        target = os.path.relpath(plain / name, root) if relative else plain / name
        (root / name).symlink_to(target)


def lay_files(relative: bool, plain: Path, root: Path) -> None:
    """Folders of links to files."""
    for file in (x for x in plain.rglob("*") if x.is_file()):
        link = root / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent) if relative else file)


def lay_cache(plain: Path, root: Path) -> None:
    """As `huggingface_hub` does."""
    for name in NAMES:
        (root / name).symlink_to(hub_cache(plain / name, root / "hub"))


SOURCES: dict[str, Callable[[Path, Path], object]] = {
    "plain": lambda plain, root: shutil.copytree(plain, root, dirs_exist_ok=True),
    "links to folders": lambda plain, root: lay_folders(False, plain, root),
    "relative links to folders": lambda plain, root: lay_folders(True, plain, root),
    "links to files": lambda plain, root: lay_files(False, plain, root),
    "relative links to files": lambda plain, root: lay_files(True, plain, root),
    "the hub's cache": lay_cache,
}

TAKEN = {
    "nothing": None,
    "a link to a folder": "folder",
    "a link to a file": "file",
    "a link to a source": "../sources/one",
    "a link to nowhere": "nowhere",
}
"""What may have a name already, and where that leads, from a folder `mine` of the user's."""


def put(path: Path, kind: str, relative: bool, root: Path) -> None:
    """Has a name taken."""
    if (where := TAKEN[kind]) is not None:
        target = root / "mine" / where
        path.symlink_to(os.path.relpath(target, path.parent) if relative else target)


def tree(root: Path, but: Path | None = None) -> dict[Path, tuple[object, ...]]:
    """All below a folder, but for a path in it, of whose parent the times do not count.

    The time of the last change, which no program can set, stands for a file's bytes.
    """
    out: dict[Path, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        if but is None or (path != but and but not in path.parents):
            found = path.lstat()
            link = os.readlink(path) if stat.S_ISLNK(found.st_mode) else ""
            times = (found.st_mtime_ns, found.st_ctime_ns)
            own = (*times, found.st_size) if but is None or path != but.parent else ()
            out[path] = (found.st_ino, found.st_mode, *own, link)
    return out


@contextlib.contextmanager
def kept(root: Path, out: Path) -> Iterator[None]:
    """Nothing outside the output changes in the block."""
    before = tree(root, out)
    yield
    assert tree(root, out) == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two members of one layer."""
    root = tmp_path_factory.mktemp("plain")
    small = {"num_hidden_layers": 1}
    llm = checkpoints.make_llama(0, **small)
    checkpoints.llama_folder(root / "base", llm=llm)
    for i, name in enumerate(NAMES[1:]):
        more = {"weights": "safetensors", "vision": small}
        checkpoints.upstream_llava_folder(root / name, i, llm=checkpoints.tuned(llm, i), **more)
    return root


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "world"
    (root / "mine" / "folder").mkdir(parents=True)
    for name in ("file", "folder/file", "folder/config.json"):
        (root / "mine" / name).write_text("mine")
    (root / "sources").mkdir()
    return root


def places(root: Path) -> Iterator[tuple[Path, bool]]:
    """Every output, whether it may be written: names that are taken, beside temporary folders'
    that are taken, below a folder or a link to one.
    """
    kinds = [(kind, relative) for kind in TAKEN for relative in (False, True)]
    kinds.remove(("nothing", True))
    for i, ((out, one), (part, other)) in enumerate(itertools.product(kinds, kinds)):
        folder = root / f"out-{i}"
        folder.mkdir()
        put(folder / "out", out, one, root)
        put(folder / ".out.part", part, other, root)
        yield folder / "out", out == part == "nothing"
        shutil.rmtree(folder)
    for relative in (False, True):
        link = root / f"link-{relative}"
        (root / f"real-{relative}").mkdir()
        link.symlink_to(f"real-{relative}" if relative else root / f"real-{relative}")
        yield link / "out", True


@pytest.mark.parametrize("kind", SOURCES)
def test_fuse_and_export(plain: Path, world: Path, kind: str) -> None:
    """Each at 83 outputs, from sources of each kind; what is written is the same."""
    SOURCES[kind](plain, world / "sources")
    one, two, base = (world / "sources" / name for name in ("one", "two", "base"))
    model, _ = converters.load(one)
    tasks = {
        "fuse": lambda out: converters.fuse({"one": one, "two": two}, out, base=base, export="llm"),
        "export": lambda out: converters.export(model, out),
    }
    count, written = 0, set()
    for name, task in tasks.items():
        (world / name).mkdir()
        for out, free in places(world / name):
            count += 1
            real = out.parent.resolve() / out.name
            expected = contextlib.nullcontext() if free else pytest.raises(InputError)
            with kept(world, real if free else None), expected:
                task(out)
            if free:
                (file,) = real.glob("*.safetensors")
                assert not any(x.is_symlink() for x in real.rglob("*"))
                written.add((name, file.read_bytes()))
    assert count == 2 * 83 and len(written) == 2


def test_evaluate(world: Path) -> None:
    """Names of a working folder that are taken; questions and the working folder behind links."""
    rows = [{"question_id": i, "image": "0.jpg", "text": "?", "label": "yes"} for i in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (world / "mine" / "coco_pope_random.json").write_text(lines)
    config = configs_evaluate.get_config("pope")
    config.update({"data": str(world / "sources"), "images": str(world / "mine")})
    config.constant = "yes"
    count, kinds = 0, [(kind, relative) for kind in TAKEN for relative in (False, True)]
    names = ("predictions.jsonl", ".predictions.jsonl.part", "results.json", ".results.json.part")
    for name, (kind, relative), behind in itertools.product(names, kinds, (False, True)):
        link = world / "sources" / "coco_pope_random.json"
        link.unlink(missing_ok=True)
        target = world / "mine" / link.name
        link.symlink_to(os.path.relpath(target, link.parent) if relative else target)
        real = world / f"real-{count}"
        real.mkdir()
        out = world / f"link-{count}" if behind else real
        if behind:
            out.symlink_to(real.name if relative else real)
        put(real / name, kind, relative, world)
        # A link with a file's own name is replaced, or refused; one with a temporary name refused.
        refused = pytest.raises(InputError) if name[0] == "." else contextlib.suppress(InputError)
        expected = contextlib.nullcontext() if kind == "nothing" else refused
        with kept(world, real), expected:
            evaluate.run(config, out)
        count += 1
    assert count == 4 * 10 * 2


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in TAKEN if kind != "nothing"])
def test_train(world: Path, kind: str, relative: bool) -> None:
    """A stage's folder and what it has is no link; its metrics take a link's place."""
    (world / "mine" / "rows.json").write_text("[]")
    rows = [{"id": "0", "conversations": [{"from": x, "value": "a"} for x in ("human", "gpt")]}]
    (world / "mine" / "rows.json").write_text(json.dumps(rows))
    (world / "sources" / "rows.json").symlink_to(world / "mine" / "rows.json")
    config = configs_train.get_config()
    data = (f"{world}/sources/rows.json={world}/mine",)
    changes = {f"stages.{name}.data": data for name in ("align", "tune")}
    config.update_from_flattened_dict(changes | {"report": False, "model": str(world / "none")})
    for name in ("align", "tune", "align/model", "tune/model"):
        work = world / f"work-{name.replace('/', '-')}"
        (work / name).parent.mkdir(parents=True)
        put(work / name, kind, relative, world)
        match = f"{name}(: found an? (link|exist)|/config.json: found no readable)"  # if it is done
        with kept(world, work), pytest.raises(InputError, match=match):
            train.run(config, work)
    for name in ("states", "states/7", "states/config.json"):
        stage = world / f"stage-{name.replace('/', '-')}"
        (stage / name).parent.mkdir(parents=True)
        put(stage / name, kind, relative, world)
        with kept(world, None), pytest.raises(InputError, match=f"{name}: found a link"):
            Checkpoints(stage / "states", {"seed": 1})
    stage = world / "stage"
    stage.mkdir()
    put(stage / "metrics.jsonl", kind, relative, world)
    with kept(world, stage):
        record = Record(stage, 0, 1)
        record.write([{"step": 1, "loss": 0.5, "tokens": 3}], None)
        record.close()


def test_outputs_in_and_over_sources(plain: Path, world: Path) -> None:
    """In one, on another file system: right; over one, over its temporary folder: refused."""
    SOURCES["plain"](plain, world / "sources")
    one, two, base = (world / "sources" / name for name in ("one", "two", "base"))
    members = {"one": one, "two": two}
    other = Path("/dev/shm")
    with contextlib.ExitStack() as stack:
        outs = [one / "out", one / "deep" / "out"]
        if os.access(other, os.W_OK):
            folder = other / f"vfjax-{os.getpid()}"
            folder.mkdir()
            stack.callback(shutil.rmtree, folder)
            outs.append(folder / "out")
            (world / "far").symlink_to(folder)
            outs.append(world / "far" / "again")
        files = set()
        for out in outs:
            before = tree(world)
            converters.fuse(members, out, base=base, export="llm")
            files.add((out / "model.safetensors").read_bytes())
            new = {x for x in tree(world).keys() - before.keys() if x.name != "deep"}
            assert all(out == x or out in x.parents for x in new)
            assert all(before[x] == tree(world)[x] for x in before if not x.is_dir())
        assert len(files) == 1
    (world / "alias").symlink_to("sources")
    for out in (one, base, world / "alias" / "two", one / "config.json", one / "out"):
        with kept(world, None), pytest.raises(InputError, match="found an existing path"):
            converters.fuse(members, out, base=base, export="llm")


TWICE = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
from converters.files.writer import write_folder
def progress(nbytes):
    print("wrote", flush=True)
    sys.stdin.readline()
write_folder({out!r}, {{"": {{"w": np.ones(3, np.float32)}}}}, progress=progress)
"""


def test_two_runs_at_once(world: Path) -> None:
    """The second is refused, by whatever name it has the output; the first goes on."""
    root, out = Path(__file__).resolve().parents[2], world / "out"
    (world.parent / "alias").symlink_to(world)
    code = TWICE.format(root=str(root), out=str(out))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "wrote\n"
        for same in (out, world.parent / "alias" / "out"):
            with pytest.raises(InputError, match="out: found another run that is writing it"):
                write_folder(same, {"": {"w": np.zeros(3, np.float32)}})
        process.communicate("\n", timeout=60)
    match = "states: found another run that is writing it"
    with Checkpoints(world / "states", {"seed": 1}), pytest.raises(InputError, match=match):
        Checkpoints(world / "states", {"seed": 1})
    with Checkpoints(world / "states", {"seed": 1}):
        pass  # it is free again
    with log.Log(world / "predictions.jsonl", {"benchmark": "a"}) as first:
        first.write("1", "yes")
        with pytest.raises(InputError, match="jsonl: found another run that is writing it"):
            log.Log(world / "predictions.jsonl", {"benchmark": "a"})
    assert log.read(world / "predictions.jsonl")[1] == {"1": "yes"}


def test_a_users_file_with_the_name_of_answers(world: Path) -> None:
    """Is not cut: it has no header, not even a torn one."""
    file = world / "predictions.jsonl"
    file.write_text("mine")
    with pytest.raises(InputError, match="line 1: found a damaged line"):
        log.Log(file, {"benchmark": "a"})
    assert file.read_text() == "mine"
