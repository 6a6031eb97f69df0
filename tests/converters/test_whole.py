"""Members of one architecture merged whole: every tensor by its formula, the folder as its own."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import converters
from converters.files.checksums import mapped
from converters.files.reader import read_weights
from tests.adapters import peft_folder
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    tokenizer_files,
    upstream_llava_folder,
)
from tests.onevision import port_folder
from vfjax import InputError
from vfjax.atomic import read_json

Arrays = dict[str, np.ndarray]


def tune(source: Path, out: Path, seed: int, size: float = 0.1) -> Path:
    """A copy of a folder as fine-tuning leaves it: every tensor moved by `size` of its spread."""
    shutil.copytree(source, out)
    rng = np.random.default_rng(seed)
    for file in sorted(out.rglob("*.safetensors")):
        tensors = load_file(file)
        moved = {
            name: x
            if x.dtype.kind != "f"
            else np.asarray(x + size * (x.std() + 0.01) * rng.standard_normal(x.shape), x.dtype)
            for name, x in tensors.items()
        }
        save_file(moved, file, {"format": "pt"})
    return out


def arrays(folder: Path) -> Arrays:
    """All tensors of a folder, those of a sub-folder behind its name."""
    found = {name: np.asarray(x[...]) for name, x in read_weights(folder).items()}
    for inner in folder.iterdir():
        if (inner / "model.safetensors").is_file():
            found |= {
                f"{inner.name}/{n}": x for n, x in load_file(inner / "model.safetensors").items()
            }
    return found


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two members of it."""
    root = tmp_path_factory.mktemp("onevision")
    port_folder(root / "base")
    return {"base": root / "base"} | {
        name: tune(root / "base", root / name, seed) for seed, name in enumerate("ab")
    }


def test_every_tensor(onevision: dict[str, Path], tmp_path: Path):
    """Deltas of towers, connectors and LLMs in float64, rules by what the files call tensors."""
    base, members = onevision["base"], {name: onevision[name] for name in "ab"}
    rules = (
        ("multi_modal_projector", {"params": {"weights": (1.0, 0.25)}}),
        ("vision_tower.*patch_embedding", {"take": "b"}),
    )
    options: dict[str, Any] = {"base": base, "params": {"weights": (0.3, 0.6)}, "rules": rules}
    said = converters.dry_run(members, tmp_path / "out", export="whole", **options)
    converters.fuse(members, tmp_path / "out", export="whole", **options)
    start, one, two = (arrays(onevision[name]) for name in ("base", "a", "b"))
    found = arrays(tmp_path / "out")
    assert sorted(found) == sorted(start) and said["tensors"] == len(found)
    for name, value in found.items():
        weights = (1.0, 0.25) if "multi_modal_projector" in name else (0.3, 0.6)
        weights = (0.0, 1.0) if "patch_embedding" in name else weights
        deltas = (x[name].astype(np.float64) - start[name] for x in (one, two))
        expected = start[name] + sum(w * d for w, d in zip(weights, deltas, strict=True))
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
    files = {"config.json", "processor_config.json", "tokenizer.json", "MERGE.md"}
    assert files <= {x.name for x in (tmp_path / "out").iterdir()}
    _, seen = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not seen["missing_keys"] and not seen["unexpected_keys"]
    card = (tmp_path / "out" / "MERGE.md").read_text()
    assert card.splitlines()[2] == 'tags: ["vfjax", "merge"]'  # the layout is the members'
    assert "| vision_tower layer 0 |" in card and "| layer 0 |" in card


def state(model: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


def test_in_memory(onevision: dict[str, Path], tmp_path: Path):
    """The same as of the folder, and exported the same."""
    members = {name: onevision[name] for name in "ab"}
    options: dict[str, Any] = {"method": "linear", "params": {"weights": (0.5, 0.5)}}
    converters.fuse(members, tmp_path / "out", export="whole", **options)
    there, its = converters.load(tmp_path / "out")
    here, processor = converters.load_fused(members, mode="whole", **options)
    assert processor.config == its.config and processor.template == its.template
    expected = state(there)
    for name, value in state(here).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    converters.export(here, tmp_path / "exported")
    one, other = arrays(tmp_path / "exported"), arrays(tmp_path / "out")
    assert sorted(one) == sorted(other)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    first, second = (read_json(tmp_path / x / "config.json") for x in ("exported", "out"))
    assert first == second


def test_the_authors_layout(tmp_path: Path):
    """The tower of a sub-folder is merged, too, by names behind the sub-folder's."""
    upstream_llava_folder(tmp_path / "a", weights="safetensors")
    tune(tmp_path / "a", tmp_path / "b", 1)
    members = {name: tmp_path / name for name in "ab"}
    rules = (("vision_tower/.*layers.1", {"take": "b"}),)
    options: dict[str, Any] = {"method": "linear", "params": {"weights": (0.25, 0.75)}}
    converters.fuse(members, tmp_path / "out", export="whole", rules=rules, **options)
    one, two, found = (arrays(tmp_path / name) for name in ("a", "b", "out"))
    assert sorted(found) == sorted(one)
    for name, value in found.items():
        taken = name.startswith("vision_tower/") and "layers.1." in name
        expected = two[name] if taken else 0.25 * one[name] + 0.75 * two[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
    assert (tmp_path / "out/vision_tower/preprocessor_config.json").is_file()
    first, second = (read_json(tmp_path / x / "config.json") for x in ("a", "out"))
    assert second.pop("dtype", second.pop("torch_dtype", None)) == "float32"
    assert second == {key: x for key, x in first.items() if key not in ("dtype", "torch_dtype")}
    assert converters.open_source(tmp_path / "out").branches


@pytest.mark.parametrize("case", ["dc_sti_siglip", "mgm_hd", "slime_llama3"])
def test_families(shared: Path, tmp_path: Path, case: str):
    """ConvNeXt beside CLIP, a whole SigLIP with its text half, a resampler: as `export` writes."""
    skip = shutil.ignore_patterns("inputs.*", "outputs.*", "case.json")
    shutil.copytree(shared / "golden" / case, tmp_path / "a", ignore=skip)
    tune(tmp_path / "a", tmp_path / "b", 1, size=0.02)
    members = {name: tmp_path / name for name in "ab"}
    converters.fuse(members, tmp_path / "out", method="linear", export="whole", account=False)
    mapped(converters.open_source(tmp_path / "out"))  # each parameter has its tensor
    for name, path in members.items():
        converters.export(converters.load(path)[0], tmp_path / f"like-{name}")
    one, two, out = (arrays(tmp_path / name) for name in ("like-a", "like-b", "out"))
    assert sorted(out) == sorted(one)
    for name, value in out.items():
        pair = [x[name].astype(np.float64) for x in (one, two)]
        expected = sum(pair) / 2 if value.dtype.kind == "f" else pair[0]
        atol = 1e-6 if value.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(value.astype(np.float64), expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaVA and a plain LLM, fine-tuned from one LLM."""
    root = tmp_path_factory.mktemp("text")
    sizes = {"num_hidden_layers": 3}
    theirs = hf_llava_folder(root / "eyes", 1, text=sizes)
    llm = llama_folder(root / "first", 2, **sizes)
    llm.model.load_state_dict(theirs.model.language_model.state_dict())
    llm.lm_head.load_state_dict(theirs.lm_head.state_dict())
    llama_folder(root / "first", llm=llm)
    return {"eyes": root / "eyes", "text": tune(root / "first", root / "text", 3)}


SCHEDULE = ((1, 1, 0.4), (0, 0, 0.6))


def test_a_text_expert(text: dict[str, Path], tmp_path: Path):
    """Without weight it changes nothing; by a schedule each layer has the formula's value."""
    options: dict[str, Any] = {"method": "linear", "params": {"weights": (1, 0)}}
    converters.fuse(text, tmp_path / "same", export="whole", **options)
    eyes, expert = arrays(text["eyes"]), arrays(text["text"])
    same = arrays(tmp_path / "same")
    assert sorted(same) == sorted(eyes)
    assert all(np.array_equal(same[name], eyes[name]) for name in eyes)
    options["params"] = {"weights": SCHEDULE}
    converters.fuse(text, tmp_path / "late", export="whole", **options)
    late = arrays(tmp_path / "late")
    shares = (0.0, 0.0, 0.6)  # of layers 0, 1, 2 at t = 0, 1/2, 1
    seen = set()
    for name, value in late.items():
        standard = name.replace("language_model.", "")
        layer = name.partition("layers.")[2].partition(".")[0]
        share = shares[int(layer)] if standard in expert and layer else 0.0
        seen.add(share)
        expected = eyes[name].astype(np.float64)
        if standard in expert:
            expected = (1 - share) * expected + share * expert[standard]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
    assert seen == {0.0, 0.6}


def test_a_text_expert_without_weight_is_the_member(text: dict[str, Path]):
    """In a fusion of branches, too, whichever stands first; prompts are the member's."""
    alone, its = converters.load(text["eyes"])
    members = {name: text[name] for name in ("text", "eyes")}
    params = {"weights": (0, 1)}
    model, processor = converters.load_fused(members, method="linear", params=params)
    assert processor.template == its.template and processor.image_token == its.image_token
    expected = state(alone)
    for name, value in state(model).items():
        other = name.replace("/eyes/", f"/{alone.config.branches[0].name}/")
        np.testing.assert_array_equal(value, expected[other], err_msg=name)


def test_modules_of_other_models(text: dict[str, Path], tmp_path: Path):
    """Two that see and a text expert, each module from those that a YAML names for it."""
    tune(text["eyes"], tmp_path / "b", 5)

    def models(**weights: float) -> str:
        folders = {**text, "b": tmp_path / "b"}
        listed = (
            f"{{model: {folders[name]}, parameters: {{weight: {w}}}}}"
            for name, w in weights.items()
        )
        return f"{{models: [{', '.join(listed)}]}}"

    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodules:\n"
        f"  text_decoder: {models(eyes=0.25, b=0.25, text=0.5)}\n"
        f"  vision_tower: {models(eyes=0.5, b=0.5)}\n"
        f"  multi_modal_projector: {models(b=0.3)}\n"
    )
    converters.fuse({}, tmp_path / "out", recipe=tmp_path / "recipe.yml", export="whole")
    eyes, expert, b, out = (arrays(x) for x in (*text.values(), tmp_path / "b", tmp_path / "out"))
    for name, value in out.items():
        standard = name.replace("language_model.", "")
        if standard in expert:
            expected = 0.25 * eyes[name] + 0.25 * b[name] + 0.5 * expert[standard]
        else:
            expected = b[name] if "projector" in name else (eyes[name] + b[name]) / 2
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)


def test_an_adapter_among_the_members(text: dict[str, Path], tmp_path: Path):
    """Of tower and LLM, with a tokenizer beside it; the processor is its base's."""
    eyes = text["eyes"]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(eyes)
    where = r".*(language_model|vision_tower).*(q_proj|v_proj)"
    tuned = peft_folder(tmp_path / "lora", model, 1, r=2, target_modules=where)
    tokenizer_files(tmp_path / "lora")
    tuned.merge_and_unload().save_pretrained(tmp_path / "full")
    members = {"lora": tmp_path / "lora", "b": tune(eyes, tmp_path / "b", 2)}
    options: dict[str, Any] = {"base": eyes, "params": {"weights": (0.75, 0.5)}}
    converters.fuse(members, tmp_path / "out", export="whole", family=False, **options)
    base, full, b, out = (arrays(x) for x in (eyes, *(tmp_path / n for n in ("full", "b", "out"))))
    assert sorted(out) == sorted(base)
    for name, value in out.items():
        expected = base[name] + 0.75 * (full[name] - base[name]) + 0.5 * (b[name] - base[name])
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6, err_msg=name)
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (eyes / name).read_bytes()
    here, _ = converters.load_fused(members, mode="whole", family=False, **options)
    converters.export(here, tmp_path / "exported")
    assert (tmp_path / "exported" / name).is_file()


def test_tokens_of_one_alone(text: dict[str, Path], tmp_path: Path):
    """Rows that the text expert lacks are the member's; those that config.json names stay."""
    llama_folder(tmp_path / "short", 4, num_hidden_layers=3, vocab_size=300)
    members = {"short": tmp_path / "short", "eyes": text["eyes"]}
    options: dict[str, Any] = {"method": "linear", "export": "whole", "family": False}
    converters.fuse(members, tmp_path / "out", vocab="eyes", **options)
    short, eyes, out = (arrays(x) for x in (*members.values(), tmp_path / "out"))
    (name,) = (x for x in eyes if x.endswith("embed_tokens.weight"))
    own = (short["model.embed_tokens.weight"] + eyes[name][:300]) / 2
    np.testing.assert_allclose(out[name], np.concatenate([own, eyes[name][300:]]), atol=1e-6)
    with pytest.raises(InputError, match="image_token_index: found 319, a row that is dropped"):
        converters.dry_run(members, tmp_path / "less", vocab="short", **options)
