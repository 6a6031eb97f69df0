"""Folders written to buckets, on moto's S3 server and a GCS emulator on this machine."""

import numpy as np
import pytest

import converters
from converters.files.paths import UNWRITTEN
from converters.files.writer import write_folder
from tests.buckets import BUCKET, put, read
from tests.checkpoints import llama_folder, make_llama, tuned
from vfjax import InputError

pytestmark = pytest.mark.usefixtures("servers")

TENSORS = {name: np.full((5, 4), i, np.float32) for i, name in enumerate("abc")}


def test_a_fusion_from_bucket_to_bucket_has_the_bytes_of_the_local_one(tmp_path):
    base = make_llama(0, num_hidden_layers=1)
    llama_folder(tmp_path / "base", llm=base)
    for i, name in enumerate("ab"):
        llama_folder(tmp_path / name, llm=tuned(base, i))
    options = {"method": "ties", "export": "llm", "shard_bytes": 50_000}
    members = {name: tmp_path / name for name in "ab"}
    converters.fuse(members, tmp_path / "out", base=tmp_path / "base", **options)
    urls = {x: put(tmp_path / x, f"s3://{BUCKET}/fusing/{x}") for x in ("base", "a", "b")}
    out = f"s3://{BUCKET}/deep/out"
    converters.fuse({name: urls[name] for name in "ab"}, out, base=urls["base"], **options)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert read(out) == expected and len(expected) > 4
    with pytest.raises(InputError, match=f"^{out}: found an existing path"):
        converters.fuse({name: urls[name] for name in "ab"}, out, base=urls["base"], **options)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_nothing_is_opened_before_all_is_written(scheme):
    out, seen = f"{scheme}://{BUCKET}/unfinished/out", []

    def late():
        seen.extend(read(out))
        with pytest.raises(InputError, match=f"^{out}: found a folder that is still written"):
            converters.open_source(out)
        with pytest.raises(InputError, match=f"^{out}: found another run that is writing it"):
            write_folder(out, {"": TENSORS})
        return b"late"

    files = {"config.json": b"{}", "MERGE.md": late}
    write_folder(out, {"": TENSORS}, files=files, shard_bytes=100)
    names = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert {*seen} == names | {UNWRITTEN}
    index = "model.safetensors.index.json"
    assert {*read(out)} == names | {"config.json", "MERGE.md", index}


def test_a_killed_run_is_gone_on_with_or_removed():
    out, read_rows = f"s3://{BUCKET}/killed/out", []

    class Told(np.ndarray):
        def __getitem__(self, rows):
            read_rows.append(float(super().__getitem__((0, 0))))
            return np.asarray(super().__getitem__(rows))

    def killed():
        raise KeyboardInterrupt

    told = {name: x.view(Told) for name, x in TENSORS.items()}
    how = {"shard_bytes": 100, "resume": True, "key": "k"}
    with pytest.raises(KeyboardInterrupt):
        write_folder(out, {"": told}, files={"config.json": killed}, **how)
    left = read(out)
    assert UNWRITTEN in left and "config.json" not in left
    with pytest.raises(InputError, match="found a folder that is still written, or whose writing"):
        converters.load(out)
    with pytest.raises(InputError, match="found a killed run of another recipe"):
        write_folder(out, {"": told}, shard_bytes=100, resume=True, key="other")
    read_rows.clear()
    write_folder(out, {"": told}, files={"config.json": b"{}"}, **how)
    assert read_rows == []
    again = f"s3://{BUCKET}/killed/again"
    with pytest.raises(KeyboardInterrupt):
        write_folder(again, {"": told}, files={"config.json": killed}, **how)
    write_folder(again, {"": TENSORS}, files={"config.json": b"{}"}, key="other")
    assert {*read(again)} == {"config.json", "model.safetensors"}


def test_an_error_leaves_nothing():
    out = f"s3://{BUCKET}/error/out"

    def failing():
        raise InputError("x", found="y", expected="z", fix="w")

    with pytest.raises(InputError, match="^x: found y"):
        write_folder(out, {"": TENSORS}, files={"config.json": failing})
    assert read(out) == {}
    with pytest.raises(InputError, match="^s3://no-such-one/out: found no bucket no-such-one"):
        write_folder("s3://no-such-one/out", {"": TENSORS})
