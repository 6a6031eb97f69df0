"""Fusing folders: the merged LLM value by value, the branches as they were, all or nothing."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

import converters
from converters.files.reader import read_weights
from converters.mergekit import layer_lists
from tests import checkpoints
from tests.adapters import lora_folder
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    make_llama,
    tuned,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.sharding import make_mesh

BF16 = np.dtype(ml_dtypes.bfloat16)
WEIGHTS = {"task_arithmetic": [0.5, 0.5], "linear": [1.0, 1.0]}
HF = ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")
"""Prefixes of transformers' LLaVA, and of its LLM alone."""


def hf_member(path: Path, llm: transformers.LlamaForCausalLM, seed: int, **config: Any) -> None:
    """Transformers' LLaVA, in bfloat16, with a given LLM."""
    hf_llava_folder(path, seed, **config)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in llm.state_dict().items():
        old, new = HF["lm_head" in name]
        tensors[name.replace(new, old, 1)] = tensor
    save_file({n: x.bfloat16().clone() for n, x in tensors.items()}, path / "model.safetensors")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, three upstream members and two of transformers, fine-tuned from it, in bfloat16."""
    root = tmp_path_factory.mktemp("family")
    base = make_llama(0).bfloat16()
    llama_folder(root / "base", llm=base)
    for i, name in enumerate(("up1", "up2", "up3"), 1):
        weights = "bin" if i == 1 else "safetensors"
        upstream_llava_folder(root / name, 10 * i, llm=tuned(base, i).bfloat16(), weights=weights)
    hf_member(root / "hf1", tuned(base, 4), 40)
    hf_member(root / "hf2", tuned(base, 5), 50, kind="dinov2")
    return root


def named(family: Path, names: str) -> dict[str, Path]:
    return {name: family / name for name in names.split()}


def llm_of(folder: Path) -> dict[str, np.ndarray]:
    """The LLM's tensors of any of these folders, under its own names."""
    out = {}
    for name, tensor in read_weights(folder).items():
        for old, new in HF:
            name = name.replace(old, new)
        if not re.match(r"branches|multi_modal|vision|model\.mm", name):
            out[name] = tensor[...]
    return out


def exact(base: np.ndarray, members: Sequence[np.ndarray], method: str) -> np.ndarray:
    """The method's formula in float64."""
    weights = WEIGHTS[method]
    wide = [x.astype(np.float64) for x in members]
    if method == "linear":
        return sum(w * x for w, x in zip(weights, wide, strict=True)) / sum(weights)
    start = base.astype(np.float64)
    return start + sum(w * (x - start) for w, x in zip(weights, wide, strict=True))


def steps(array: np.ndarray) -> np.ndarray:
    """Bfloat16 values counted from zero."""
    bits = array.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -32768 - bits, bits)


def assert_merged(folder: Path, family: Path, names: str, method: str = "task_arithmetic") -> None:
    """Every value is the formula's, rounded once: the same bits, or next to them in 1 of 10,000."""
    base, found = llm_of(family / "base"), llm_of(folder)
    members = [llm_of(path) for path in named(family, names).values()]
    assert found.keys() == base.keys()
    other = total = 0
    for name, value in found.items():
        expected = exact(base[name], [m[name] for m in members], method).astype(BF16)
        assert (value.dtype, value.shape) == (BF16, expected.shape), name
        ulps = steps(value) - steps(expected)
        assert np.abs(ulps).max() <= 1, name
        other, total = other + np.count_nonzero(ulps), total + ulps.size
        assert all((value != m[name]).any() for m in (base, *members)), name
    assert other <= total / 10_000


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


def fuse_two(family: Path, out: Path) -> None:
    converters.fuse(
        named(family, "hf2 up3"),
        out,
        base=family / "base",
        params={"weights": WEIGHTS["task_arithmetic"]},
        template="chatml_direct",
    )


@pytest.fixture(scope="module")
def fused(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf2 and up3, in this order."""
    out = tmp_path_factory.mktemp("fused") / "fused"
    fuse_two(family, out)
    return out


PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def visual_tokens(folder: Path) -> np.ndarray:
    model, processor = converters.load(folder, dtype="float32")
    batch = processor([PICTURE], input_ids=[[1, -200, 5]])
    assert int((batch.visual >= 0).sum()) == sum(b.tokens for b in model.config.branches)
    return np.asarray(model.visual_tokens(batch.images).values)


def test_branches_are_read_in_the_members_order(fused: Path, family: Path):
    assert_merged(fused, family, "hf2 up3")
    own = [visual_tokens(family / name) for name in ("hf2", "up3")]
    np.testing.assert_array_equal(visual_tokens(fused), np.concatenate(own))


def test_branches_are_the_members_bytes(fused: Path, family: Path):
    found, count = read_weights(fused), 0
    for name in ("hf2", "up3"):
        source = converters.open_source(family / name)
        for part, tensors in source.parts.items():
            if part == "llm":
                continue
            for key, theirs in tensors.items():
                ours = found[f"branches.{name}.{part.split('.')[-1]}.{key}"]
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                assert ours[...].tobytes() == theirs[...].tobytes(), key
                count += 1
    assert count == len([name for name in found if name.startswith("branches.")])


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


def test_a_fused_member_keeps_its_branches(fused: Path, family: Path, tmp_path: Path):
    """Three branches, and an LLM merged twice."""
    members = {"two": fused, "up2": family / "up2"}
    params = {"weights": [1.0, 1.0], "normalize": True}
    converters.fuse(members, tmp_path / "out", method="linear", params=params)
    model, processor = converters.load(tmp_path / "out")
    assert [b.name for b in model.config.branches] == ["two-hf2", "two-up3", "up2"]
    assert processor.template == "chatml_direct"
    own = [visual_tokens(folder) for folder in (fused, family / "up2")]
    np.testing.assert_array_equal(visual_tokens(tmp_path / "out"), np.concatenate(own))


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


def test_dtype_of_the_merged_llm(family: Path, tmp_path: Path):
    converters.fuse(
        named(family, "up2 hf2"),
        tmp_path / "out",
        base=family / "base",
        params={"weights": [0.5, 0.5]},
        dtype="float32",
        export="llm",
    )
    assert {x.dtype.name for x in llm_of(tmp_path / "out").values()} == {"float32"}
    config = read_json(tmp_path / "out" / "config.json")
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float32"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("more", [{}, {"method": "linear"}, {"rules": (("mlp", {"take": "b"}),)}])
def test_the_dtype_is_the_bases(family: Path, tmp_path: Path, more: dict[str, Any]):
    """Of all tensors, whoever they are from."""
    for seed, name in enumerate("ab", 1):
        llm = tuned(make_llama(0), seed).half()
        upstream_llava_folder(tmp_path / name, seed, llm=llm, weights="safetensors")
    members = named(tmp_path, "a b")
    converters.fuse(members, tmp_path / "out", base=family / "base", **{**PLAIN, **more})
    assert {x.dtype.name for x in llm_of(tmp_path / "out").values()} == {"bfloat16"}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


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


def refused(tmp_path: Path, members: Mapping[str, Path], **more: Any) -> str:
    """The line with which a fusion is refused; nothing is left of it."""
    out = tmp_path / "refused" / "out"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(InputError) as error:
        converters.fuse(members, out, **{"params": {"weights": [0.5] * len(members)}, **more})
    assert list(out.parent.iterdir()) == []
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"base": None}, "model.embed_tokens.weight: found no base, expected one"),
        ({"method": "tise"}, "method: found 'tise', expected "),
        ({"params": {"weights": [1.0]}}, "params.weights: found [1.0], expected 2 values"),
        ({"params": {"wieghts": [1.0]}}, "params: found 'wieghts', expected parameters of"),
        (
            {"export": "gguf"},
            "export: found 'gguf', expected 'model' or 'whole' or 'llm'; choose one",
        ),
        ({"template": "vicuna"}, "template: found 'vicuna', expected one of "),
        ({"dtype": "int8"}, "dtype: found int8, expected bfloat16, float16, float32; choose one"),
        ({"members": {}}, "members: found none, expected names of letters"),
        ({"members": {"base": Path()}}, "members: found the name 'base', expected names of"),
        (
            {"members": {"a": "A"}},
            "members: found one, 'A', expected two or more to fuse; name the others behind a "
            "comma, ('A', 'path/to/another');",
        ),
        ({"members": ["A", "B"]}, "members: found list, expected names -> folders; write {'a'"),
        ({"densty": 0.5}, "options: found densty, expected base, method, params, rules, recipe, "),
        ({"members": {"a.b": Path()}}, "members: found the name 'a.b', expected names of letters"),
    ],
)
def test_wrong_arguments(family: Path, tmp_path: Path, more: dict[str, Any], line: str):
    arguments = {"members": named(family, "up2 up3"), "base": family / "base", **more}
    assert refused(tmp_path, arguments.pop("members"), **arguments).startswith(line)


PLAIN = {"method": "task_arithmetic", "params": {"weights": (0.5, 0.5)}, "export": "llm"}


def test_weights_are_even_by_default(family: Path, tmp_path: Path):
    """In files, and for a fusion of which none are written."""
    members, base = named(family, "up1 up2"), family / "base"
    converters.fuse(members, tmp_path / "out", base=base, export="llm")
    assert_merged(tmp_path / "out", family, "up1 up2")
    model, _ = converters.load_fused(members, base=base)
    found = llm_of(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.llm.embedding[...], found)


@pytest.mark.parametrize(
    ("mode", "more", "line"),
    [
        (
            "tokens",
            {"densty": 0.5},
            "options: found densty, expected mode, base, method, params, rules, recipe, template",
        ),
        ("tokens", {"export": "llm"}, "options: found export, expected mode, base, method"),
        ("tokens", {"account": False}, "options: found account, expected mode, base, method"),
        ("cache", {"positions": "parallel"}, "options of mode 'cache': found positions, expected"),
        ("cache", {"mask": "block"}, "options of mode 'cache': found mask, expected base, method"),
        (
            "logits",
            {"method": "ties"},
            "options of mode 'logits': found method, expected base, dtype",
        ),
        (
            "logits",
            {"positions": "parallel"},
            "options of mode 'logits': found positions, expected",
        ),
        ("logits", {"members": {"a": "A"}}, "members: found one, 'A', expected two or more"),
        ("tokens", {"members": {"a": "A"}}, "members: found one, 'A', expected two or more"),
    ],
)
def test_options_that_a_mode_does_not_use(family: Path, mode: str, more: dict[str, Any], line: str):
    arguments = {"members": named(family, "up2 up3"), "base": family / "base", **more}
    with pytest.raises(InputError) as error:
        converters.load_fused(arguments.pop("members"), mode=mode, **arguments)
    assert str(error.value).startswith(line)


def test_a_misspelt_option_of_a_dry_run(family: Path, tmp_path: Path):
    with pytest.raises(InputError, match="^options: found densty, expected base, method"):
        converters.dry_run(named(family, "up2 up3"), tmp_path / "out", densty=0.5)


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


def test_the_card_says_what_the_members_did(family: Path, tmp_path: Path):
    converters.fuse(named(family, "up2 up3"), tmp_path / "out", base=family / "base", **PLAIN)
    text = (tmp_path / "out" / "MERGE.md").read_text()
    digest = hashlib.sha256((family / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert f"| base | model.safetensors | {digest} |" in text
    assert (tmp_path / "out" / "merge.png").read_bytes()[:4] == b"\x89PNG"
    base, two, three = (llm_of(family / name) for name in ("base", "up2", "up3"))
    names = [name for name in base if "layers.1." in name]
    flat = [
        np.concatenate([x[n].astype(np.float64).ravel() for n in names]) for x in (base, two, three)
    ]
    first, second = flat[1] - flat[0], flat[2] - flat[0]
    lengths = [np.linalg.norm(x) / np.linalg.norm(flat[0]) for x in (first, second)]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    conflicts = np.mean(first * second < 0)
    row = f"{lengths[0]:.4%} | {lengths[1]:.4%} | {cosine:.4f} | {conflicts:.2%}"
    assert f"| layer 1 | {row} |" in text


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


BASE_LISTED = {
    "linear": ("models: [{b}, {{model: {a}, parameters: {{weight: 1}}}}]", "b", "up3 up2"),
    "slerp": ("parameters: {{t: 0.3}}\nmodels: [{{model: {a}}}, {{model: {c}}}]", "a", "up2 up3"),
    "task_arithmetic": ("models: [{b}, {{model: {a}}}]", "a", "up3 up2"),
    "karcher": ("models: [{{model: {c}}}]", "a", "up3 up2"),
    "ties": ("models: [{{model: {a}}}]", "a", "up2"),
    "dare_ties": ("models: [{b}]", "a", "up3"),
}
"""Method -> models, base_model, and the branches: those of all models that are merged.

Karcher reads no base, so one that is not listed is appended, as in mergekit.
"""


@pytest.mark.parametrize("method", BASE_LISTED)
def test_all_listed_models_keep_their_branches(family: Path, tmp_path: Path, method: str):
    """The base of a recipe is a member too where it is listed; alone, it is copied."""
    models, base, branches = BASE_LISTED[method]
    one = f"{{model: {family / 'up3'}, parameters: {{weight: 0.5}}}}"
    paths = {"a": family / "up2", "b": one, "c": family / "up3"}
    recipe = tmp_path / "recipe.yml"
    home = {"a": "up2", "b": "up3"}[base]
    recipe.write_text(
        f"merge_method: {method}\nbase_model: {family / home}\n{models.format(**paths)}\n"
    )
    converters.fuse({}, tmp_path / "out", recipe=recipe)
    model, _ = converters.load(tmp_path / "out")
    assert [branch.name for branch in model.config.branches] == branches.split()
    own = [visual_tokens(family / name) for name in branches.split()]
    np.testing.assert_array_equal(visual_tokens(tmp_path / "out"), np.concatenate(own))
    found = llm_of(tmp_path / "out")["model.embed_tokens.weight"]
    for name in ("up2", "up3"):
        copied = (found == llm_of(family / name)["model.embed_tokens.weight"]).all()
        assert copied == (method == "ties" and name == "up2")


def test_a_config_that_leaves_the_number_of_layers_to_its_class(tmp_path: Path):
    base = make_llama(0, num_hidden_layers=32)
    llama_folder(tmp_path / "base", llm=base)
    for seed, name in enumerate("ab", 1):
        upstream_llava_folder(tmp_path / name, seed, llm=tuned(base, seed), weights="safetensors")
        config = read_json(tmp_path / name / "config.json")
        write_json(tmp_path / name / "config.json", without(config, "num_hidden_layers"))
    converters.fuse(named(tmp_path, "a b"), tmp_path / "out", base=tmp_path / "base", **PLAIN)
    assert converters.load(tmp_path / "out")[0].config.llm.layers == 32


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


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


def test_layers_from_two_models(family: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {family / "up2"}, layer_range: [0, 2]}}]
  - sources: [{{model: {family / "up3"}, layer_range: [1, 2]}}]
""")
    converters.fuse({}, tmp_path / "out", recipe=recipe, export="llm")
    found, three = llm_of(tmp_path / "out"), llm_of(family / "up3")
    assert read_json(tmp_path / "out/config.json")["num_hidden_layers"] == 3
    name = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name.format(2)], three[name.format(1)])
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


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


def test_layer_types_follow_the_layers(tmp_path: Path):
    """Of a folder of transformers 5, which refuses a list of another length."""
    config = transformers.Qwen3Config(
        **{**checkpoints.LLAMA, "num_hidden_layers": 4}, head_dim=8, tie_word_embeddings=False
    )
    for seed, name in enumerate("ab"):
        model = checkpoints.randomize(transformers.Qwen3ForCausalLM(config), seed)
        model.save_pretrained(tmp_path / name)
    recipe = tmp_path / "recipe.yml"
    piece = "  - sources: [{{model: {}, layer_range: {}}}]\n"
    pieces = [(tmp_path / "a", [0, 3]), (tmp_path / "b", [1, 4])]
    recipe.write_text(
        "merge_method: passthrough\nslices:\n" + "".join(piece.format(*x) for x in pieces)
    )
    converters.fuse({}, tmp_path / "out", recipe=recipe, export="llm")
    assert read_json(tmp_path / "out/config.json")["layer_types"] == ["full_attention"] * 6
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()) and len(model.model.layers) == 6
    origins = [{"a": 1}, {"a": 0, "b": 1}, {"b": 1}]
    types = {"a": {"layer_types": ["x", "y"]}, "b": {"layer_types": ["y", "x"]}}
    assert layer_lists(types, origins) == {"layer_types": ["y", "x", "x"]}
    with pytest.raises(InputError, match="recipe: layer 0: layer_types: found x of a, y of b"):
        layer_lists(types, [{"a": 0, "b": 0}])


@pytest.mark.parametrize(
    ("method", "base", "members", "dtype"),
    [
        ("linear", None, "half full", "float32"),
        ("linear", None, "full half", "float32"),
        ("task_arithmetic", "half", "full", "float32"),
        ("task_arithmetic", "full", "half", "float32"),
        ("slerp", "half", "half full", "float32"),
        ("slerp", "half", "half other", "bfloat16"),
    ],
)
def test_dtype_of_a_recipe_without_one(
    family: Path, tmp_path: Path, method: str, base: str | None, members: str, dtype: str
):
    """What holds all, as mergekit 0.1.5 has it, in config.json too."""
    llama_folder(tmp_path / "full", llm=tuned(make_llama(0), 3).float())
    paths = {"half": family / "base", "other": family / "up2", "full": tmp_path / "full"}
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(paths[x])} for x in members.split()],
        "parameters": {"weight": 1, "t": 0.5},
    }
    if base:
        config["base_model"] = str(paths[base])
    write_json(tmp_path / "recipe.yml", config)
    with pytest.warns(UserWarning, match="the method does not read parameters"):
        converters.fuse({}, tmp_path / "out", recipe=tmp_path / "recipe.yml", export="llm")
    assert {x.dtype.name for x in llm_of(tmp_path / "out").values()} == {dtype}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype
    assert '"unread": [' in (tmp_path / "out" / "MERGE.md").read_text()


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


@pytest.mark.parametrize("sharded", [False, True])
def test_a_fusion_loads_without_a_folder_between(family: Path, fused: Path, sharded: bool):
    """Onto 8 devices too: the parameters are those of the folder that `fuse` writes."""
    mesh = make_mesh(data=2, model=4) if sharded else None
    params = {"weights": WEIGHTS["task_arithmetic"]}
    members = named(family, "hf2 up3")
    model, processor = converters.load_fused(
        members, base=family / "base", params=params, mesh=mesh
    )
    expected, _ = converters.load(fused, mesh=mesh)
    found, wanted = (dict(nnx.to_flat_state(nnx.state(x))) for x in (model, expected))
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in wanted.items():
        assert found[name].sharding == value.sharding
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
    assert processor.tokenizer is None or processor.chat("What?")


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
