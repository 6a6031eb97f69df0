import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from converters.files import direct, output, writer
from converters.files.paths import sha256
from converters.files.reader import DTYPES, read_weights
from converters.files.writer import write_folder
from vfjax import InputError
from vfjax.merge import merge
from vfjax.merge import tensors as lazy

BF16 = np.dtype(ml_dtypes.bfloat16)
REPO = Path(__file__).resolve().parents[3]


class Lazy:
    """A tensor that is not an array, as files and merges are."""

    def __init__(self, array, claim=None):
        self.array, self.shape = array, claim or array.shape
        self.dtype = array.dtype

    def __getitem__(self, rows):
        return self.array[rows]


class Counted(Lazy):
    """Notes the largest slice asked for."""

    largest = 0

    def __getitem__(self, rows):
        part = self.array[rows]
        self.largest = max(self.largest, part.size)
        return part


def some(dtype=BF16, seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {
        name.replace("__", "."): rng.standard_normal(shape).astype(dtype)
        for name, shape in (shapes or {"a__w": (7, 5), "b__w": (3,)}).items()
    }


def left(folder):
    """All that is in a folder, temporaries too."""
    return sorted(path.name for path in folder.iterdir())


def test_bytes_are_those_of_the_library(tmp_path):
    tensors = {
        f'{name}.é"\\\n{i}': np.zeros(shape, dtype)
        for name, dtype in sorted(DTYPES.items())
        for i, shape in enumerate([(3, 2), (), (0, 4), (1,)])
    }
    write_folder(tmp_path / "out", {"": tensors})
    expected = safetensors.numpy.save(tensors, {"format": "pt"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected


names = st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=40)
@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(DTYPES))), min_size=1))
def test_any_tensors_give_the_bytes_of_the_library(tmp_path_factory, layout):
    tensors = {
        name: np.random.default_rng(i).integers(0, 2, shape).astype(DTYPES[dtype])
        for i, (name, (shape, dtype)) in enumerate(layout.items())
    }
    out = tmp_path_factory.mktemp("any") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "sync", lambda path: None)  # slow, and not what is tested
        write_folder(out, {"": {name: Lazy(array) for name, array in tensors.items()}})
    expected = safetensors.numpy.save(tensors, {"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == expected


def test_reads_back(tmp_path):
    tensors = {**some(), "x": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    write_folder(tmp_path / "out", {"": tensors}, metadata={"format": "np"})
    path = tmp_path / "out/model.safetensors"
    back = safetensors.numpy.load_file(path)
    assert {name: (x.dtype, x.tobytes()) for name, x in back.items()} == {
        name: (x.dtype, x.tobytes()) for name, x in tensors.items()
    }
    in_torch = safetensors.torch.load_file(path)
    assert in_torch["a.w"].dtype == torch.bfloat16
    np.testing.assert_array_equal(
        in_torch["a.w"].float().numpy(), tensors["a.w"].astype(np.float32)
    )
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "np"}
    ours = read_weights(tmp_path / "out")
    assert all(ours[name][...].tobytes() == x.tobytes() for name, x in tensors.items())


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def test_shards_load_in_transformers(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "theirs")
    tensors = read_weights(tmp_path / "theirs")
    config = tmp_path / "theirs/config.json"
    write_folder(tmp_path / "ours", {"": tensors}, files={"config.json": config}, shard_bytes=6000)
    names = left(tmp_path / "ours")
    shards = [name for name in names if name.endswith(".safetensors")]
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert sorted(names) == sorted([*shards, "config.json", "model.safetensors.index.json"])
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    total = sum(x.numel() * 2 for x in model.state_dict().values())
    assert index["metadata"] == {"total_size": total}
    assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == set(
        shards
    )
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info.values()), info
    state = back.state_dict()
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_shards_hold_their_limit_and_the_order(tmp_path):
    tensors = some(a=(10,), b=(30,), c=(100,), d=(5,), e=(5,))  # 20, 60, 200, 10 and 10 bytes
    write_folder(tmp_path / "out", {"": tensors}, shard_bytes=80)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert [index["weight_map"][name][6:11] for name in "abcde"] == [
        "00001",
        "00001",
        "00002",
        "00003",
        "00003",
    ]


def test_sub_folders_files_and_progress(tmp_path):
    source = tmp_path / "tokenizer"
    source.write_bytes(b"tok")
    done = []
    tower = some(seed=1)
    write_folder(
        tmp_path / "new/parents/out",
        {"": some(), "vision_tower": tower},
        files={"config.json": b"{}", "vision_tower/config.json": b"{1}", "tok/tokenizer": source},
        progress=done.append,
    )
    out = tmp_path / "new/parents/out"
    assert left(tmp_path / "new/parents") == ["out"]
    assert left(out) == ["config.json", "model.safetensors", "tok", "vision_tower"]
    assert (out / "vision_tower/config.json").read_bytes() == b"{1}"
    assert (out / "tok/tokenizer").read_bytes() == b"tok"
    back = safetensors.numpy.load_file(out / "vision_tower/model.safetensors")
    assert back["a.w"].tobytes() == tower["a.w"].tobytes()
    assert sum(done) == 2 * sum(x.nbytes for x in tower.values())
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode


def test_same_inputs_same_bytes_and_memory_of_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 1000)
    big = {name: Counted(x) for name, x in some(a=(999, 77), b=(20_000,), c=(2, 3000)).items()}
    for name in ("one", "two"):
        write_folder(tmp_path / name, {"": big}, shard_bytes=50_000)
    assert left(tmp_path / "one") == left(tmp_path / "two")
    for name in left(tmp_path / "one"):
        assert sha256(tmp_path / "one" / name) == sha256(tmp_path / "two" / name)
    assert [x.largest for x in big.values()] == [924, 1000, 3000]  # a row at least


def test_reading_ahead_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 100)
    monkeypatch.setattr(writer, "THREADS", 3)
    read = written = most = 0

    class Ahead(Lazy):
        def __getitem__(self, rows):
            nonlocal read, most
            read += 1
            most = max(most, read - written)
            return self.array[rows]

    def progress(_):
        nonlocal written
        written += 1

    write_folder(tmp_path / "out", {"": {"a": Ahead(np.zeros(10_000, BF16))}}, progress=progress)
    assert read == written == 100
    assert most <= 5


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_all_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    out = tmp_path / "out"
    synced = []
    monkeypatch.setattr(output, "sync", lambda path: synced.append((path.name, out.exists())))
    write_folder(out, {"": some(), "tower": some()}, files={"config.json": b"{}"})
    inner = ["config.json", "model.safetensors", "model.safetensors"]
    files = [*inner, "out", "tower", *(f"{name}.part" for name in inner)]
    assert sorted(synced[:-1]) == sorted((name, False) for name in files)
    assert synced[-1] == (tmp_path.name, True)


class Unread(Lazy):
    def __getitem__(self, rows):
        raise AssertionError("read before the checks")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"files": {"../x": b""}}, "x: found a path outside the folder"),
        ({"files": {"/x": b""}}, "x: found a path outside the folder"),
        ({"files": {"model.safetensors": b""}}, "model.safetensors: found a path given twice"),
        ({"files": {"config.json": Path("nowhere/c.json")}}, "nowhere/c.json: found no file"),
        ({"weights": {"../t": {}}}, "found a path outside the folder"),
        ({"weights": {"": {"z": np.zeros(3, np.complex64)}}}, "z: found dtype complex64"),
    ],
)
def test_errors_before_any_work(tmp_path, arguments, message):
    weights = {"": {"w": Unread(np.zeros(3, BF16))}}
    with pytest.raises(InputError, match=message):
        write_folder(tmp_path / "deep/out", **{"weights": weights, **arguments})
    assert left(tmp_path) == []


def test_an_existing_output_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: found an existing path.* remove it or choose"):
        write_folder(tmp_path / "out", {"": {"w": Unread(np.zeros(3, BF16))}})
    assert left(tmp_path) == ["out"]


def test_too_little_room_is_said_before_any_work(tmp_path):
    huge = Unread(np.zeros(1, BF16), claim=(1 << 60,))
    with pytest.raises(InputError, match=r"bytes free, expected [\d,]{20,}; free some space"):
        write_folder(tmp_path / "deep/out", {"": {"w": huge}})
    assert left(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, code, nth):
    calls = 0
    write = direct.write_all

    def failing(file, data):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(code, os.strerror(code))
        write(file, data)

    monkeypatch.setattr(direct, "write_all", failing)
    monkeypatch.setattr(lazy, "BLOCK", 10)
    message = f"out/model.safetensors: found {os.strerror(code)} while writing, expected .* bytes"
    with pytest.raises(InputError, match=message):
        write_folder(tmp_path / "out", {"": some()})
    assert left(tmp_path) == []


def test_a_real_refusal_of_the_system(tmp_path):
    """Files of this process may grow to 100 kB: the write is cut short, then refused."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(REPO)!r})
import numpy as np
from converters.files.writer import write_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_folder({str(tmp_path / "out")!r}, {{"": {{"w": np.zeros(90_000, np.float32)}}}})
except ValueError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith(
        f"InputError {tmp_path}/out/model.safetensors: found File too large while writing, "
        "expected permission, and room for 360,"
    ), result
    assert left(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(InputError, match="found (Not a directory|File exists) while writing"):
        write_folder(tmp_path / "file/out", {"": some()})
    assert left(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [KeyError("x"), KeyboardInterrupt(), OSError(5, "I/O error")])
def test_a_source_that_fails_leaves_nothing(tmp_path, failure):
    class Failing(Lazy):
        def __getitem__(self, rows):
            raise failure

    expected = InputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as caught:
        write_folder(tmp_path / "out", {"": {**some(), "zz": Failing(np.zeros(3, BF16))}})
    if expected is InputError:
        assert "zz: found [Errno 5] I/O error while reading it" in str(caught.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("claim", [(4,), (3, 1), (2,)])
def test_a_tensor_that_is_not_what_it_claims(tmp_path, claim):
    class Odd(Lazy):
        def __getitem__(self, rows):
            return self.array

    with pytest.raises(InputError, match=r"w: found bfloat16\[3\] where it was read, expected"):
        write_folder(tmp_path / "out", {"": {"w": Odd(np.zeros(3, BF16), claim)}})
    assert left(tmp_path) == []


def test_nan_in_a_member_leaves_nothing(tmp_path):
    bad = some()
    bad["a.w"][6, 4] = np.nan
    merged = merge(None, {"a": some(), "b": bad}, "linear", {"weights": (1, 1)})
    with pytest.raises(InputError, match="member 'b': a.w: found 1 NaN"):
        write_folder(tmp_path / "out", {"": merged})
    assert left(tmp_path) == []


def test_killed_while_writing(tmp_path):
    """`kill -9` in the middle: no output, and no folder with a config.json."""
    code = f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
import numpy as np
from converters.files import writer
slow = lambda n: (print("wrote", flush=True), time.sleep(60))
tensors = {{"w": np.zeros(3_000_000, np.float32)}}
writer.write_folder({str(tmp_path / "out")!r}, {{"": tensors}}, files={{"config.json": b"{{}}"}},
                    progress=slow)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "wrote\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (remains,) = tmp_path.iterdir()
    assert remains.name == ".out.part"
    assert list(tmp_path.rglob("config.json")) == []
    with pytest.raises(InputError, match="found no weights"):
        read_weights(remains)
    write_folder(tmp_path / "out", {"": some()})
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_killed_run_is_resumed(tmp_path):
    """Whole files are kept, the bytes are those of an unbroken run; another request is refused."""
    arrays = {name: np.full(1000, i, np.float32) for i, name in enumerate("abc")}
    write_folder(tmp_path / "whole", {"": arrays}, shard_bytes=5000)
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(REPO)!r})
import numpy as np
from converters.files import writer
arrays = {{name: np.full(1000, i, np.float32) for i, name in enumerate("abc")}}
def kill(nbytes, seen=[]):
    seen.append(nbytes)
    len(seen) == 3 and os.kill(os.getpid(), signal.SIGKILL)
writer.write_folder({str(tmp_path / "out")!r}, {{"": arrays}}, shard_bytes=5000, key="k",
                    progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    held = tmp_path / ".out.part"
    assert left(held / "out")[:2] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2)]
    with pytest.raises(InputError, match="out: found a killed run of another recipe, or of"):
        write_folder(tmp_path / "out", {"": arrays}, shard_bytes=5000, key="l", resume=True)
    assert held.exists()
    seen = []
    spies = {n: Unread(x) if n != "c" else Lazy(x) for n, x in arrays.items()}
    options = {"shard_bytes": 5000, "key": "k", "resume": True, "progress": seen.append}
    write_folder(tmp_path / "out", {"": spies}, **options)
    assert sum(seen) == 12000
    assert left(tmp_path) == ["out", "whole"]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_two_runs_do_not_write_one_folder(tmp_path):
    def second(nbytes):
        with pytest.raises(InputError, match="out: found another run that is writing it"):
            write_folder(tmp_path / "out", {"": some()})

    write_folder(tmp_path / "out", {"": some()}, progress=second)
    assert left(tmp_path) == ["out"]
