"""What PEFT saves of an LLM's adapter, against the logits of what PEFT loads from it."""

import dataclasses
import itertools
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file

import converters
from converters import adapter_config
from converters.lora import LoRATensor, Part, RowsReplaced, Shifted, Transposed
from tests.adapters import peft_folder
from tests.checkpoints import LLAMA, llama_folder, published, randomize, write_json
from vfjax import InputError
from vfjax.atomic import read_json

IDS = torch.tensor([[1, 7, 200, 31, 319, 280]])
MLP = ["gate_proj", "up_proj", "down_proj"]
EMBEDDINGS = ["embed_tokens", "lm_head"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "every layer": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "an expression": {"target_modules": r".*\.1\..*(gate|up)_proj", "exclude_modules": ".*up_proj"},
    "patterns": {
        "target_modules": [*MLP, "q_proj"],
        "rank_pattern": {"up_proj": 2, r"layers\.1\.mlp\.gate_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "up_proj": 16},
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "fan in, fan out": {"fan_in_fan_out": True, "target_modules": ["q_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora, everywhere": {"use_dora": True, "target_modules": ["v_proj", *EMBEDDINGS]},
    "bias": {"lora_bias": True, "bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "only its bias": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj", "embed_tokens"]},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=2)},
    "monteclora": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    "kept embedding": {"modules_to_save": ["embed_tokens"]},
    "kept head": {"modules_to_save": ["lm_head"]},
    "kept both": {"modules_to_save": EMBEDDINGS},
    "kept norm": {"modules_to_save": ["norm", "classifier"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": EMBEDDINGS, "r": 5},
    "head beside a kept embedding": {
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "tokens": {"trainable_token_indices": [280, 7]},
    "tokens of each": {"trainable_token_indices": {"embed_tokens": [7, 200], "lm_head": [5]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [5, 200]}},
}
TIES: dict[str, dict[str, Any]] = {
    name: {**SETTINGS[name], "ensure_weight_tying": True}
    for name in ("kept embedding", "kept head", "kept both", "head", "embedding", "both", "tokens")
}
RESIZED = {
    name: SETTINGS[name]
    for name in ("plain", "kept embedding", "kept both", "both", "embedding", "tokens")
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tied or not -> a base with biases in its attention."""
    path = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        llama_folder(path / str(tied), 1, tie_word_embeddings=tied, attention_bias=True)
    return {tied: path / str(tied) for tied in (False, True)}


def opened(base: Path, rows: int) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows != LLAMA["vocab_size"]:
        model.resize_token_embeddings(rows)
    return model


@torch.no_grad()
def theirs(folder: Path, base: Path, rows: int = 320, ids: torch.Tensor = IDS) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(opened(base, rows), folder)
    return model(ids).logits


@torch.no_grad()
def ours(folder: Path, base: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Our tensors in transformers' model."""
    source = converters.open_source(folder, base=base)
    state = {name: torch.from_numpy(x[...]) for name, x in source.parts["llm"].items()}
    config = transformers.LlamaConfig.from_dict(
        {**source.llm, "tie_word_embeddings": "lm_head.weight" not in state}
    )
    model = transformers.LlamaForCausalLM(config)
    wrong = model.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys
    assert wrong.missing_keys == ["lm_head.weight"] * config.tie_word_embeddings
    return model.eval()(ids).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(bases: dict[bool, Path], tmp_path: Path, name: str, tied: bool):
    base = bases[tied]
    peft_folder(tmp_path, opened(base, 320), 3, **SETTINGS[name])
    expected = theirs(tmp_path, base)
    assert distance(ours(tmp_path, base), expected) <= 1e-5
    assert distance(opened(base, 320)(IDS).logits, expected) >= 1e-2


@pytest.mark.parametrize("name", TIES)
def test_ties_that_stay(bases: dict[bool, Path], tmp_path: Path, name: str):
    peft_folder(tmp_path, opened(bases[True], 320), 3, **TIES[name])
    assert distance(ours(tmp_path, bases[True]), theirs(tmp_path, bases[True])) <= 1e-5
    assert "lm_head.weight" not in converters.open_source(tmp_path, base=bases[True]).parts["llm"]


STORED = {
    "a tied head that is stored": ("lm_head.weight", "model.embed_tokens.weight"),
    "a tied head alone": ("lm_head.weight",),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["kept embedding", "head", "embedding", "tokens"])
def test_tied_bases_of_other_writers(
    bases: dict[bool, Path], tmp_path: Path, name: str, stored: str
):
    shutil.copytree(bases[True], tmp_path / "base")
    state = load_file(bases[True] / "model.safetensors")
    embedding = state.pop("model.embed_tokens.weight")
    state |= {tensor: embedding.clone() for tensor in STORED[stored]}
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    folder = tmp_path / "lora"
    peft_folder(folder, opened(bases[True], 320), 3, **SETTINGS[name])
    assert distance(ours(folder, tmp_path / "base"), theirs(folder, bases[True])) <= 1e-5


def test_an_adapter_of_a_model_without_its_head(bases: dict[bool, Path], tmp_path: Path):
    whole = opened(bases[False], 320)
    adapted = peft_folder(tmp_path, transformers.AutoModel.from_pretrained(bases[False]), 3)
    whole.model = adapted.merge_and_unload()
    assert distance(ours(tmp_path, bases[False]), whole(IDS).logits) <= 1e-5


EXPERTS = {
    "all": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "every layer": {"target_modules": "all-linear"},
    "one parameter": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj", "o_proj.weight", "mlp.gate.weight"],
        "rank_pattern": {"gate_up_proj": 2},
        "alpha_pattern": {"down_proj": 9, "o_proj.weight": 2},
    },
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
    path = tmp_path_factory.mktemp("mixtral")
    randomize(transformers.MixtralForCausalLM(config), 1).save_pretrained(path)
    return path


def assert_experts(folder: Path, mixtral: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(opened(mixtral, 320), folder)
    expected = published(adapted.merge_and_unload())
    found = converters.open_source(folder, base=mixtral).parts["llm"]
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name][...], x.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(mixtral: Path, tmp_path: Path, name: str):
    peft_folder(tmp_path, opened(mixtral, 320), 3, **EXPERTS[name])
    assert_experts(tmp_path, mixtral)


def test_experts_of_transformers_4(mixtral: Path, tmp_path: Path):
    """Each was a module; PEFT fuses their factors on loading."""
    peft_folder(tmp_path, opened(mixtral, 320), 3, target_modules=["q_proj"])
    state, rng = load_file(tmp_path / "adapter_model.safetensors"), torch.manual_seed(5)
    for layer, expert, name in itertools.product(range(2), range(4), ("w1", "w2", "w3")):
        start = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        into, out = (48, 32) if name == "w2" else (32, 48)
        state[f"{start}.lora_A.weight"] = torch.randn(4, into, generator=rng)
        state[f"{start}.lora_B.weight"] = torch.randn(out, 4, generator=rng)
    save_file(state, tmp_path / "adapter_model.safetensors")
    settings = read_json(tmp_path / "adapter_config.json")
    settings["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    write_json(tmp_path / "adapter_config.json", settings)
    assert_experts(tmp_path, mixtral)


@pytest.mark.parametrize("rows", [290, 330])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", RESIZED)
def test_other_vocabularies(
    bases: dict[bool, Path], tmp_path: Path, name: str, tied: bool, rows: int
):
    """PEFT saves both layers, but of a targeted embedding without the head."""
    base = bases[tied]
    peft_folder(tmp_path, opened(base, rows), 3, base=str(base), **RESIZED[name])
    if name == "embedding" and not tied:
        with pytest.raises(InputError, match="320 rows, and"):
            converters.open_source(tmp_path, base=base)
        return
    ids = torch.clamp(IDS, max=rows - 1)
    assert distance(ours(tmp_path, base, ids), theirs(tmp_path, base, rows, ids)) <= 1e-5


VALUES: dict[str, list[Any]] = {
    "task_type": ["CAUSAL_LM", "SEQ_CLS", None],
    "peft_type": ["IA3", "PREFIX_TUNING"],
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM"}],
    "peft_version": ["0.1.0", None],
    "base_model_name_or_path": ["nobody/nothing", "", None],
    "revision": ["v2"],
    "inference_mode": [False],
    "r": [2, 8],
    "target_modules": [
        ["q_proj"],
        ["q_proj", "k_proj", "down_proj", "v_proj"],
        ["layers.0.self_attn.q_proj", "k_proj", "down_proj"],
        "all-linear",
        ".*(q|k|down)_proj",
        ".*q_proj",
        None,
    ],
    "exclude_modules": [["k_proj"], ["up_proj"], ".*k_proj", []],
    "lora_alpha": [12],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"], ["q_proj"], ["classifier"], []],
    "init_lora_weights": [
        *(False, "gaussian", "eva", "olora", "pissa", "pissa_niter_2", "corda", "loftq"),
        *("orthogonal", "mica", "lora_ga"),
    ],
    "layers_to_transform": [[0], 1, [0, 1], []],
    "layers_pattern": ["layers", ["layers", "h"], "h"],
    "rank_pattern": [{"q_proj": 2}, {"q_proj": 4, ".*": 4}, {"o_proj": 2}],
    "alpha_pattern": [{"k_proj": 1}, {".*proj": 3, "k_proj": 1}, {"^model.layers.0.*q_proj": 9}],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "megatron_core": ["megatron"],
    "trainable_token_indices": [[3], {"embed_tokens": [3]}],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 1.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 2}],
    "alora_invocation_tokens": [[7, 200]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True],
    "target_parameters": [["o_proj.weight"]],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{}],
    "ensure_weight_tying": [True],
}
"""Key of LoraConfig -> values beside those of the adapter that is saved."""


def test_every_key_of_the_settings(bases: dict[bool, Path], tmp_path: Path, capsys: Any):
    """One key at a time: as PEFT, or refused by name; counted."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    fates = (adapter_config.USED, adapter_config.IDLE, tuple(adapter_config.ALLOWED))
    assert VALUES.keys() == fields
    assert fields <= {key for keys in fates for key in keys}
    assert len({key for keys in fates for key in keys}) == sum(map(len, fates))
    peft_folder(tmp_path, opened(bases[False], 320), 3)
    settings, before = read_json(tmp_path / "adapter_config.json"), theirs(tmp_path, bases[False])
    counts = {"as before": 0, "as PEFT": 0, "refused": 0, "refused by PEFT": 0}
    for key, value in [(key, value) for key, values in VALUES.items() for value in values]:
        write_json(tmp_path / "adapter_config.json", {**settings, key: value})
        try:
            found = ours(tmp_path, bases[False])
        except InputError as error:
            assert key in str(error), (key, value)
            assert "\n" not in str(error)
            counts["refused"] += 1
            continue
        try:
            expected = theirs(tmp_path, bases[False])
        except Exception:  # whatever PEFT raises
            counts["refused by PEFT"] += 1
            assert (key, value) in [("layers_pattern", x) for x in VALUES["layers_pattern"]]
            continue
        assert distance(found, expected) <= 1e-5, (key, value)
        counts["as before" if distance(found, before) <= 1e-5 else "as PEFT"] += 1
    with capsys.disabled():
        print(f"\nadapter_config.json: {[len(keys) for keys in fates]} keys used, idle, refused:")
        print(f"of {sum(map(len, VALUES.values()))} values {counts}")
    assert counts["as PEFT"] >= 3


@pytest.mark.parametrize("kind", [x.value for x in peft.PeftType if x != peft.PeftType.LORA])
def test_other_kinds_of_adapters(bases: dict[bool, Path], tmp_path: Path, kind: str):
    """Only some can be merged: others have no weights, or weights for each input."""
    write_json(tmp_path / "adapter_config.json", {"peft_type": kind})
    with pytest.raises(InputError) as error:
        converters.open_source(tmp_path, base=bases[False])
    where = f"{tmp_path / 'adapter_config.json'}: peft_type: found {kind!r}, expected 'LORA'; "
    assert str(error.value).startswith(where)
    merges = kind not in adapter_config.PROMPTS
    assert str(error.value).endswith(adapter_config.MERGE if merges else adapter_config.TRAIN)
    known = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    assert merges <= hasattr(known, "merge_and_unload")
    assert hasattr(known, "merge_and_unload") <= (merges or kind in ("POLY", "SHADOW", "XLORA"))


REFUSED = {
    "unknown": ({"new_key": 3}, "new_key: found 3, expected a key of PEFT's LoraConfig"),
    "rank": ({"r": 0}, "r: found 0, expected a positive whole number"),
    "half a rank": ({"r": 4.5}, "r: found 4.5, expected a positive whole number"),
    "tokens": ({"trainable_token_indices": {"x": ["3"]}}, "trainable_token_indices: found ['3']"),
    "revision": ({"revision": 3}, "revision: found 3, expected a value of type str"),
    "text": ({"lora_alpha": "8"}, "lora_alpha: found '8', expected a positive number"),
    "an expression": ({"rank_pattern": {"(": 2}}, "rank_pattern: found "),
    "a rank of a pattern": ({"rank_pattern": {"q_proj": None}}, "rank_pattern: q_proj: found None"),
    "a list": (
        {"modules_to_save": "lm_head"},
        "modules_to_save: found 'lm_head', expected a value",
    ),
    "names": ({"target_modules": [3]}, "target_modules: found "),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa'"),
    "cut": ({"layer_replication": [[0, 1]] * 99}, "layer_replication: found [[0, 1], "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(bases: dict[bool, Path], tmp_path: Path, name: str):
    peft_folder(tmp_path, opened(bases[False], 320), 3)
    settings = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", settings | REFUSED[name][0])
    with pytest.raises(InputError) as error:
        converters.open_source(tmp_path, base=bases[False])
    assert str(error.value).startswith(f"{tmp_path}/adapter_config.json: {REFUSED[name][1]}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_tensors_that_are_refused(bases: dict[bool, Path], tmp_path: Path):
    """Of another kind, on a layer without a bias, of another module."""
    file = tmp_path / "adapter_model.safetensors"
    peft_folder(tmp_path, opened(bases[False], 320), 3, lora_bias=True, target_modules=["q_proj"])
    state, start = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj."
    settings = read_json(tmp_path / "adapter_config.json")
    cases = {
        f"{start}lora_C.weight": "found a LoRA of another kind",
        start.replace("q_proj", "v_proj") + "lora_A.weight": "found an update of model.layers.0",
        start.replace("rs.0", "rs.9") + "lora_A.weight": "which has model.*self_attn.q_proj.weight",
        "base_model.model.model.norm.lora_B.bias": "found an update of model.norm, which",
        f"{start}lora_A.weight": "r: found 4, expected 3, the rank of model.layers.0",
        f"{start}lora_B.weight": r"found shape \(0,\), expected a whole matrix",
    }
    for name, found in cases.items():
        shape = {"A": (3, 32), "B": (0,), "C": (4, 32)}[name.split("lora_")[1][0]]
        save_file({**state, name: torch.ones(shape)}, file)
        with pytest.raises(InputError, match=found):
            converters.open_source(tmp_path, base=bases[False])
    peft_folder(tmp_path, opened(bases[False], 320), 3, lora_bias=True, target_modules=["up_proj"])
    with pytest.raises(InputError, match="found a bias for .*up_proj, which has none"):
        converters.open_source(tmp_path, base=bases[False])
    write_json(tmp_path / "adapter_config.json", settings | {"target_modules": ["up_proj"]})
    write_json(tmp_path / "adapter_config.json", settings | {"lora_bias": False})
    save_file(state, file)
    with pytest.raises(InputError, match="lora_bias: found False"):
        converters.open_source(tmp_path, base=bases[False])


def test_tensors_by_rows():
    """A slice is that of the whole, of every kind of tensor."""
    rng = np.random.default_rng(3)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    linear, conv = (
        (drawn(10, 6), drawn(2, 6), drawn(10, 2)),
        (drawn(10, 3, 2, 2), drawn(4, 3, 2, 2)),
    )
    tensors = {
        "plain": LoRATensor(*linear, 0.5),
        "magnitude": LoRATensor(*linear, 0.5, drawn(10)),
        "columns": LoRATensor(*linear, 0.5, drawn(6), columns=True),
        "convolution": LoRATensor(*conv, drawn(10, 4, 1, 1), 0.5, drawn(1, 10, 1, 1)),
        "transposed": Transposed(drawn(6, 10)),
        "part": Part(drawn(15, 9), 4, 10, 1, 3),
        "bias": Shifted(drawn(10), drawn(10), 0.5),
        "rows": RowsReplaced(drawn(10, 6), (8, 3, 4), drawn(3, 6)),
    }
    for name, tensor in tensors.items():
        whole = tensor[...]
        assert whole.shape == tensor.shape, name
        for start, stop in ((0, 10), (3, 5), (4, 9), (9, 10)):
            np.testing.assert_allclose(tensor[start:stop], whole[start:stop], rtol=1e-5, atol=1e-6)
    assert tensors["part"].shape == (10, 3)
    rows = tensors["rows"]
    np.testing.assert_array_equal(rows[...][[8, 3, 4]], rows.rows)


def test_the_revision_of_a_base(
    bases: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the hub's cache, that which the settings name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--someone--base"
    (repository / "refs").mkdir(parents=True)
    for name, tied in (("main", False), ("v2", True)):
        (repository / "refs" / name).write_text(f"0{name}")
        shutil.copytree(bases[tied], repository / "snapshots" / f"0{name}")
    peft_folder(tmp_path / "lora", opened(bases[True], 320), 3, revision="v2")
    found = converters.open_source(tmp_path / "lora").base
    assert found is not None
    assert found.name == "0v2"


def test_adapters_in_folders_by_name(bases: dict[bool, Path], tmp_path: Path):
    """PEFT saves all but the one called default so."""
    model = peft_folder(tmp_path / "x", opened(bases[False], 320), 3)
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["two"])
    assert distance(ours(tmp_path / "both", bases[False]), model(IDS).logits) <= 1e-5
    with pytest.raises(InputError, match="adapters in two, expected .*; name one, as .*two"):
        converters.open_source(tmp_path / "one", base=bases[False])
    converters.open_source(tmp_path / "one" / "two", base=bases[False])
