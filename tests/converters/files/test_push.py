"""Models sent to a hub on loopback."""

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants, get_token

import converters
from converters import open_source
from converters.__main__ import main
from converters.files.push import check_push, push
from converters.model_card import readme
from tests import checkpoints
from tests.checkpoints import write_json
from tests.converters.fusing import hf_member
from tests.hub import Account, Hub, files_of, serving
from vfjax import InputError

QUICK = {"method": "linear", "account": False, "checksums": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    llm = checkpoints.make_llama(0)
    checkpoints.llama_folder(root / "base", llm=llm)
    for i, name in enumerate(("one", "two"), 1):
        hf_member(root / name, checkpoints.tuned(llm, i), i)
    for folder in root.iterdir():
        (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    return root


@pytest.fixture
def server(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The members are there; a login that may write as "me" and for "team"."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving(tmp_path / "cache", monkeypatch) as found:
        for folder in models.iterdir():
            found.add(f"org/{folder.name}", folder)
        found.accounts["t"] = Account(orgs={"team": "write", "club": "read"})
        monkeypatch.setenv("HF_TOKEN", "t")
        assert get_token() == "t"
        yield found


def sent(server: Hub, name: str) -> dict[str, bytes]:
    repository = server.repositories[name]
    files = dict(repository.commits[repository.refs["main"]])
    files.pop(".gitattributes", None)
    return files


def front(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_a_fusion_is_sent(server: Hub, tmp_path: Path):
    """All of its folder in one commit, with a card; and opens by its name."""
    out = tmp_path / "out"
    members = {name: f"org/{name}" for name in ("one", "two")}
    converters.fuse(members, out, base="org/base", push_to_hub="team/fused", private=True, **QUICK)
    assert sent(server, "team/fused") == files_of(out)
    repository = server.repositories["team/fused"]
    assert repository.private and len(repository.commits) == 2  # the first is the hub's
    card = (out / "README.md").read_bytes()
    assert front(card) == {
        "base_model": ["org/base", "org/one", "org/two"],
        "base_model_relation": "merge",
        "library_name": "vfjax",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vfjax", "merge", "visionfuse"],
        "license": "apache-2.0",
    }
    for code in re.findall(r"```python\n(.*?)```", card.decode(), re.S):
        compile(code, "README.md", "exec")
        assert '("team/fused"' in code
    assert open_source("team/fused").layout == "visionfuse"


@pytest.mark.parametrize(
    ("export", "library", "task"),
    [
        ("llm", "transformers", "text-generation"),
        ("whole", "transformers", "image-text-to-text"),
    ],
)
def test_cards_of_other_merges(
    server: Hub, models: Path, tmp_path: Path, export: str, library: str, task: str
):
    """Of local folders without one license."""
    shutil.copytree(models / "two", tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("---\nlicense: other\nlicense_name: x\n---\n")
    members = {"one": models / "one", "two": tmp_path / "two"}
    out = tmp_path / "out"
    converters.fuse(members, out, export=export, push_to_hub="me/merged", family=False, **QUICK)
    card = front(sent(server, "me/merged")["README.md"])
    tags = ["vfjax", "merge"]
    assert card == {"library_name": library, "pipeline_tag": task, "tags": tags}


def test_the_card_of_a_folder_with_code():
    """No vfjax in torch, but leave to run the code."""
    card = readme("me/fused", "fused", [], {}, True).decode()
    assert card.count('from_pretrained("me/fused", trust_remote_code=True') == 2
    assert "converters.hf" not in card and "import converters\n" in card


def test_an_export_is_sent(server: Hub, tmp_path: Path):
    """In place of weights that were there, which would be read first."""
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / "config.json", {})
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "notes.txt", "x.gguf"):
        (tmp_path / "old" / name).write_bytes(b"old")
    server.add("me/model", tmp_path / "old")
    model, _ = converters.load("org/base")
    converters.export(model, tmp_path / "out", push_to_hub="me/model")
    files = sent(server, "me/model")
    assert files.keys() == files_of(tmp_path / "out").keys() | {"notes.txt", "x.gguf"}
    card = front(files["README.md"])
    assert card["base_model"] == ["org/base"] and "base_model_relation" not in card
    assert (card["library_name"], card["license"]) == ("transformers", "apache-2.0")


def test_the_command(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A folder is sent as it came; nothing is there where the token may not write."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["converters", "export", *map(str, words)])
        return main()

    assert run("org/base", tmp_path / "out", "--push_to_hub=me/copy", "--private") == 0
    assert sent(server, "me/copy") == files_of(tmp_path / "out")
    assert server.repositories["me/copy"].private
    server.accounts["t"] = Account(role="read")
    assert run("org/base", tmp_path / "none", "--push_to_hub=me/other") == 2
    line = capsys.readouterr().err
    assert "found a token of me that may not write to me/other" in line and line.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_the_card_is_of_the_layout_that_is_sent(server: Hub, tmp_path: Path):
    checkpoints.upstream_llava_folder(tmp_path / "authors", 1)
    converters.export(tmp_path / "authors", tmp_path / "out", layout="hf", push_to_hub="me/hf")
    assert front(sent(server, "me/hf")["README.md"])["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("account", "name", "found"),
    [
        (Account(role="read"), "me/new", "found a token of me that may not write to me/new"),
        (Account(role="fineGrained", scoped=("team",)), "me/new", "that may not write to me/new"),
        (Account(), "other/new", "found other, where me may make no repository, expected me"),
        (Account(orgs={"club": "read"}), "club/new", "found club, where me may make no repository"),
        (Account(), "org/base", "found a repository that is closed to this login"),
        (None, "me/new", "found a token that the hub does not know"),
    ],
)
def test_who_may_not_write_is_told_before_any_work(
    server: Hub, tmp_path: Path, account: Account | None, name: str, found: str
):
    server.accounts = {} if account is None else {"t": account}
    with pytest.raises(InputError) as error:
        converters.fuse({"a": "no/where", "b": "no/where"}, tmp_path / "out", push_to_hub=name)
    line = str(error.value)
    assert line.startswith("push_to_hub: ") and found in line and "\n" not in line
    assert name == "org/base" or name not in server.repositories


def test_what_may_be_written(server: Hub, tmp_path: Path):
    server.accounts["t"] = Account(role="fineGrained", scoped=("me",))
    assert check_push("me/new", tmp_path).name == "me/new"
    server.accounts["t"] = Account(orgs={"team": "contributor"})
    assert check_push("team/new", tmp_path).name == "team/new"


def test_bad_requests(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def line(name: str, out: str | Path = tmp_path, private: bool | None = None) -> str:
        with pytest.raises(InputError) as error:
            check_push(name, out, private)
        return str(error.value)

    for name in ("name", "me/new@v1", "./me/new"):
        assert line(name).startswith(f"push_to_hub: found {name!r}, expected 'org/name'")
    assert "found a folder in a bucket, gs://a/b, to send" in line("me/new", "gs://a/b")
    server.add("me/open", tmp_path)
    assert "found me/open, which is public" in line("me/open", private=True)
    assert check_push("me/open", tmp_path).name == "me/open"
    monkeypatch.delenv("HF_TOKEN")
    assert "found no login, expected a token that may write; make one at http" in line("me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "found HF_HUB_OFFLINE set" in line("me/new")


@pytest.mark.parametrize("part", ["PUT /lfs", "/preupload/", "/commit/", "/repos/create"])
def test_an_upload_that_is_refused(server: Hub, models: Path, part: str):
    """Nothing is there that opens; the next one goes through, of what is lacking alone."""
    server.faults += [(part, 503)] * 99
    repo = check_push("me/model", models / "base")
    with pytest.raises(InputError) as error:
        push(models / "base", repo)
    line = str(error.value)
    assert "found status 503 after" in line
    assert line.endswith(f"{models / 'base'} is whole: hf upload me/model {models / 'base'}")
    assert "me/model" not in server.repositories or sent(server, "me/model") == {}
    server.faults.clear()
    before = len([x for x, _ in server.asked if x.startswith("PUT")])
    push(models / "base", repo)
    assert sent(server, "me/model") == files_of(models / "base")
    after = len([x for x, _ in server.asked if x.startswith("PUT")])
    assert after - before == (0 if part == "/commit/" else 1)
