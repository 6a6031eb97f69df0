"""Fusing folders: the merged LLM value by value, all or nothing."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import converters
from converters.files.reader import read_weights
from tests import checkpoints
from tests.adapters import lora_folder
from tests.checkpoints import (
    llama_folder,
    make_llama,
    tuned,
    write_json,
)
from tests.converters.fusing import (
    PLAIN,
    WEIGHTS,
    assert_merged,
    exact,
    fuse_two,
    llm_of,
    named,
    refused,
)
from vfjax import InputError
from vfjax.atomic import read_json


@pytest.mark.parametrize("names", ["up1 up2", "hf1 hf2", "hf1 up1"])
def test_llm_opens_in_transformers(family: Path, tmp_path: Path, names: str):
    converters.fuse(
        named(family, names),
        tmp_path / "out",
        base=family / "base",
        params={"weights": WEIGHTS["task_arithmetic"]},
        export="llm",
    )
    assert_merged(tmp_path / "out", family, names)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not any("mm_" in key or "vision" in key for key in config)


def test_two_members_of_transformers_without_a_base_keep_their_llm(family: Path, tmp_path: Path):
    """Where mergekit leaves the LLM out without a word: linear, two HF LLaVAs."""
    params = {"weights": WEIGHTS["linear"]}
    members = named(family, "hf1 hf2")
    converters.fuse(members, tmp_path / "out", method="linear", params=params, export="llm")
    assert_merged(tmp_path / "out", family, "hf1 hf2", "linear")


def test_two_members_of_transformers_on_a_plain_base_are_merged(family: Path, tmp_path: Path):
    """Where mergekit gives the base back: task arithmetic, a plain LLM, two HF LLaVAs."""
    converters.fuse(
        named(family, "hf1 hf2"),
        tmp_path / "out",
        base=family / "base",
        params={"weights": WEIGHTS["task_arithmetic"]},
    )
    assert_merged(tmp_path / "out", family, "hf1 hf2")


def test_config_of_a_fused_folder(fused: Path, family: Path):
    config = read_json(fused / "config.json")
    assert config["model_type"] == "visionfuse"
    assert config["template"] == "chatml_direct"
    assert [b["name"] for b in config["branches"]] == ["hf2", "up3"]
    assert [b["aspect"] for b in config["branches"]] == ["crop", "pad"]
    recipe = config["recipe"]
    assert recipe["method"] == "task_arithmetic"
    assert recipe["params"] == {"weights": [0.5, 0.5]}

    def sha(path: str) -> str:
        return hashlib.sha256((family / path).read_bytes()).hexdigest()

    assert recipe["sources"] == {
        "base": {"model.safetensors": sha("base/model.safetensors")},
        "hf2": {"model.safetensors": sha("hf2/model.safetensors")},
        "up3": {
            "model.safetensors": sha("up3/model.safetensors"),
            "branches.clip.encoder/model.safetensors": sha("up3/vision_tower/model.safetensors"),
        },
    }
    assert str(family) not in (fused / "config.json").read_text()


def test_same_inputs_same_bytes(fused: Path, family: Path, tmp_path: Path):
    again = tmp_path / "again"
    fuse_two(family, again)
    files = sorted(f.name for f in fused.iterdir())
    assert files == sorted(f.name for f in again.iterdir())
    for name in files:
        assert (again / name).read_bytes() == (fused / name).read_bytes(), name


def test_order_is_part_of_the_result(family: Path, tmp_path: Path):
    params = {"weights": [1.0, 1.0]}
    for names in ("up2 up3", "up3 up2"):
        converters.fuse(named(family, names), tmp_path / names, method="linear", params=params)
    one, other = (tmp_path / names for names in ("up2 up3", "up3 up2"))
    assert {n: x.tobytes() for n, x in llm_of(one).items()} == {
        n: x.tobytes() for n, x in llm_of(other).items()
    }
    orders = [read_json(p / "config.json")["branches"] for p in (one, other)]
    assert [[b["name"] for b in order] for order in orders] == [["up2", "up3"], ["up3", "up2"]]


def test_tokenizers(family: Path, tmp_path: Path):
    """A fused model has its first member's, an LLM its base's."""
    shutil.copytree(family / "base", tmp_path / "base")
    text = (tmp_path / "base" / "tokenizer.json").read_text()
    (tmp_path / "base" / "tokenizer.json").write_text(text + " ")
    for export, origin in (("model", family / "up2"), ("llm", tmp_path / "base")):
        converters.fuse(
            named(family, "up2 up3"),
            tmp_path / export,
            base=tmp_path / "base",
            params={"weights": [0.5, 0.5]},
            export=export,
        )
        content = (tmp_path / export / "tokenizer.json").read_bytes()
        assert content == (origin / "tokenizer.json").read_bytes()


def changed(source: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with another config.json."""
    shutil.copytree(source, out)
    config = read_json(out / "config.json")
    edit(config)
    write_json(out / "config.json", config)
    return out


@pytest.mark.parametrize(
    ("llama", "line"),
    [
        (
            {"vocab_size": 384},
            "odd: vocab_size: found vocabulary of 384 rows, base has 320, expected one vocabulary; "
            "if they differ at the end only",
        ),
        ({"hidden_size": 48}, "odd: hidden_size: found 48, expected 32 as in base"),
        ({"num_hidden_layers": 1}, "odd: num_hidden_layers: found 1, expected 2 as in base"),
        ({"intermediate_size": 64}, "odd: intermediate_size: found 64, expected 48 as in base"),
        ({"num_key_value_heads": 4}, "odd: num_key_value_heads: found 4, expected 2 as in base"),
        ({"rms_norm_eps": 1e-5}, "odd: rms_norm_eps: found 1e-05, expected 0.001 as in base"),
        ({"rope_theta": 5e5}, "odd: rope_theta: found 500000.0, expected 10000.0 as in base"),
    ],
)
def test_members_of_another_family(family: Path, tmp_path: Path, llama: dict, line: str):
    llama_folder(tmp_path / "odd", 9, **llama)
    members = {**named(family, "up2"), "odd": tmp_path / "odd"}
    assert refused(tmp_path, members, base=family / "base").startswith(line)


def test_a_config_that_hides_its_family(family: Path, tmp_path: Path):
    """Sizes that config.json does not tell are seen in the tensors."""
    odd = changed(family / "up2", tmp_path / "odd", lambda config: config.pop("vocab_size"))
    members = {"odd": odd, "up2": family / "up2"}
    line = refused(tmp_path, members, base=family / "base")
    assert "embed_tokens.weight: found shape (320, 32), expected (32000, 32) by the config" in line


def test_a_dry_run_says_what_would_be_written(family: Path, tmp_path: Path):
    arguments = (named(family, "up2 up3"), tmp_path / "out")
    more = {"base": family / "base", "params": {"weights": (0.5, 0.5)}, "shard_bytes": 50_000}
    said = converters.dry_run(*arguments, **more)
    assert not any(tmp_path.iterdir())
    converters.fuse(*arguments, **more)
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert said["files"] == written and len(written) > 2
    assert said["tensors"] == len(read_weights(tmp_path / "out"))
    assert said["methods"] == {"task_arithmetic": len(read_weights(family / "base"))}


def test_tensors_are_taken_from_who_the_rules_name(family: Path, tmp_path: Path):
    rules = [
        ("embed_tokens|lm_head", {"take": "base"}),
        ("norm", {"take": "up3"}),
        (r"layers\.1\.mlp", {"method": "linear", "params": {"weights": (1.0, 3.0)}}),
    ]
    members, out = named(family, "up2 up3"), tmp_path / "out"
    converters.fuse(members, out, base=family / "base", rules=rules, **PLAIN)
    found, base = llm_of(out), llm_of(family / "base")
    two, three = (llm_of(family / name) for name in ("up2", "up3"))
    for name, value in found.items():
        if "norm" in name:
            np.testing.assert_array_equal(value, three[name])
        elif "embed" in name or "head" in name:
            np.testing.assert_array_equal(value, base[name])
        elif "layers.1.mlp" in name:
            mean = (two[name].astype(np.float64) + 3 * three[name].astype(np.float64)) / 4
            np.testing.assert_allclose(value.astype(np.float64), mean, rtol=2**-8)


def test_added_tokens(family: Path, tmp_path: Path):
    """Dropped, or kept from the member that has them; the base's rows are merged either way."""
    wide = make_llama(7, vocab_size=325).bfloat16()
    llama_folder(tmp_path / "wide", llm=wide)
    members = {"up2": family / "up2", "wide": tmp_path / "wide"}
    more = {"base": family / "base", **PLAIN}
    line = refused(tmp_path, members, **more)
    assert line.startswith("wide: vocab_size: found vocabulary of 325 rows, base has 320")
    for vocab, rows in (("base", 320), ("wide", 325)):
        out = tmp_path / vocab / "out"
        converters.fuse(members, out, vocab=vocab, family=False, **more)
        found, own = llm_of(out), llm_of(tmp_path / "wide")
        assert read_json(out / "config.json")["vocab_size"] == rows
        table = found["model.embed_tokens.weight"]
        assert table.shape[0] == rows
        np.testing.assert_array_equal(table[320:], own["model.embed_tokens.weight"][320:rows])
        parts = [llm_of(family / n)["model.embed_tokens.weight"] for n in ("base", "up2")]
        expected = exact(
            parts[0], [parts[1], own["model.embed_tokens.weight"][:320]], "task_arithmetic"
        )
        np.testing.assert_allclose(table[:320].astype(np.float64), expected, atol=2**-7)


def test_a_mergekit_recipe_as_it_is(family: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"""
merge_method: ties
base_model: {family / "base"}
models:
  - model: {family / "up2"}
    parameters: {{weight: 0.5, density: [0.2, 0.8]}}
  - model: {family / "up3"}
    parameters: {{weight: [{{filter: mlp, value: 0.7}}, {{value: 0.5}}], density: 0.5}}
parameters: {{normalize: false}}
dtype: float32
out_dtype: bfloat16
""")
    converters.fuse({}, tmp_path / "yaml", recipe=recipe, export="llm")
    weights = (0.5, [{"filter": "mlp", "value": 0.7}, {"value": 0.5}])
    params = {"weights": weights, "density": ([0.2, 0.8], 0.5), "normalize": False}
    more = {"method": "ties", "params": params, "export": "llm"}
    converters.fuse(named(family, "up2 up3"), tmp_path / "own", base=family / "base", **more)
    own = llm_of(tmp_path / "own")
    for name, value in llm_of(tmp_path / "yaml").items():
        np.testing.assert_array_equal(value, own[name])
    assert (
        f"model: {family / 'up2'}"
        in json.loads(
            re.search(r"```json\n(.*?)```", (tmp_path / "yaml/MERGE.md").read_text(), re.S)[1]
        )["recipe"]
    )


def test_a_recipe_with_an_adapter_on_a_folder(family: Path, tmp_path: Path):
    """It is put on that folder, whatever LLM it names itself."""
    theirs = lora_folder(tmp_path / "lora", tuned(make_llama(0), 7), 3)
    llama_folder(tmp_path / "x", llm=tuned(make_llama(0), 7))
    text = f"""
merge_method: task_arithmetic
base_model: {family / "base"}
models:
  - model: {tmp_path / "x"}+{{}}
    parameters: {{{{weight: 1.0}}}}
dtype: float32
"""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text.format(tmp_path / "lora"))
    converters.fuse({}, tmp_path / "out", recipe=recipe, export="llm")
    expected = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for name, value in llm_of(tmp_path / "out").items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    recipe.write_text(text.format(family / "base"))
    with pytest.raises(InputError, match=r"x\+.*base: found a whole checkpoint behind the \+"):
        converters.fuse({}, tmp_path / "other", recipe=recipe, export="llm")


def test_members_of_other_tokenizers_are_refused(family: Path, tmp_path: Path):
    """Two ids the other way round; unused names may differ."""
    other = shutil.copytree(family / "up3", tmp_path / "up3")
    known = read_json(other / "tokenizer.json")
    words = known["model"]["vocab"]
    one, two = sorted(words, key=words.get)[100:102]
    words[one], words[two] = words[two], words[one]
    write_json(other / "tokenizer.json", known)
    members = {"up2": family / "up2", "up3": other}
    line = refused(tmp_path, members, base=family / "base", **PLAIN)
    assert line.startswith(f"{other}: tokenizer: found id 100 for {two!r}, expected 101, as in ")
    more = {"base": family / "base", "family": False, **PLAIN}
    converters.fuse(members, tmp_path / "forced", **more)


def test_llms_of_folders_without_a_processor(family: Path, tmp_path: Path):
    """No picture is read for a plain LLM; for a model the file is asked for."""
    for name in ("hf1", "hf2"):
        shutil.copytree(family / name, tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").unlink()
    members = named(tmp_path, "hf1 hf2")
    line = refused(tmp_path, members, base=family / "base")
    assert line.startswith(
        f"{tmp_path / 'hf1'}: found no preprocessor_config.json, expected it, or"
    )
    options = {**PLAIN, "params": {"weights": WEIGHTS["task_arithmetic"]}}
    converters.fuse(members, tmp_path / "out", base=family / "base", **options)
    assert_merged(tmp_path / "out", family, "hf1 hf2")


def test_nan_is_found_before_anything_is_written(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        sys.modules["converters.fusion"], "write_folder", lambda *a, **k: pytest.fail("written")
    )
    bad = tmp_path / "bad"
    shutil.copytree(family / "up2", bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, bad / "model.safetensors")
    line = refused(tmp_path, {"up3": family / "up3", "bad": bad}, base=family / "base", **PLAIN)
    assert line.startswith(
        f"{bad}/model.safetensors: model.norm.weight: found 1 NaN or infinite of 32"
    )


def test_a_source_that_changes_meanwhile(family: Path, tmp_path: Path):
    odd = tmp_path / "odd"
    shutil.copytree(family / "up2", odd)

    def touch(nbytes: int) -> None:
        (odd / "model.safetensors").touch()

    members = {"up3": family / "up3", "odd": odd}
    more = {"base": family / "base", "progress": touch, **PLAIN}
    line = refused(tmp_path, members, **more)
    assert line.startswith(f"{odd}/model.safetensors: found a file that changed while it was read")

    def cut(nbytes: int) -> None:
        (odd / "model.safetensors").write_bytes(b"short")

    line = refused(tmp_path, members, **{**more, "progress": cut})
    assert str(odd) in line and "found " in line
    assert not list(tmp_path.glob("*out*"))


def test_weights_of_another_origin_are_refused(tmp_path):
    """The same architecture, trained apart: nothing is written, unless it is asked for."""
    base = checkpoints.llama_folder(tmp_path / "base", 1)
    checkpoints.llama_folder(tmp_path / "a", llm=checkpoints.tuned(base, 2))
    checkpoints.llama_folder(tmp_path / "b", 9)
    members = {name: tmp_path / name for name in "ab"}
    options = {"base": tmp_path / "base", "export": "llm", "params": {"weights": (0.5, 0.5)}}
    with pytest.raises(
        InputError, match=r"'b': .*found weights with a cosine of -?0\.\d\d to those"
    ):
        converters.fuse(members, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    converters.fuse(members, tmp_path / "out", family=False, **options)
    assert (tmp_path / "out" / "config.json").is_file()
