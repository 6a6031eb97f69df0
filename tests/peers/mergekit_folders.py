"""Records what mergekit 0.1.5 makes of folders: tied heads, dtypes, slices, LoRA, methods.

In the environment of tests/peers/mergekit.py:

    mk/bin/python tests/peers/mergekit_folders.py tests/data/mergekit_folders.npz

The file holds `cases`, JSON: case -> `yaml`, `names` (of all tensors that were written), `config`
(num_hidden_layers, vocab_size, tie_word_embeddings), or `error`; and CASE/TENSOR of those in
`STORED`, bfloat16 as uint16.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers

HIDDEN, ROWS, LAYERS, DEEP = 8, 20, 2, 3
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
LAST = "model.layers.3.mlp.down_proj.weight"
STORED = (EMBED, HEAD, NORM, DOWN, QUERY, LAST)
"""Tensors that are stored of a case, as far as it is about them; four layers where slices are
stacked."""

FOLDERS = {
    "base": ("own", False, 0, "F32", 0.0),
    "a": ("own", False, 0, "F32", 0.02),
    "b": ("own", False, 0, "F32", 0.02),
    "c": ("own", False, 0, "F32", 0.02),
    "half": ("own", False, 0, "BF16", 0.02),
    "tied": ("none", True, 0, "F32", 0.0),
    "tied_a": ("none", True, 0, "F32", 0.02),
    "heads": ("own", True, 0, "F32", 0.0),
    "heads_a": ("own", True, 0, "F32", 0.02),
    "wide": ("own", False, 2, "F32", 0.02),
    "tied_wide": ("none", True, 2, "F32", 0.02),
    "deep": ("own", False, 0, "F32", 0.02),
}
"""Folder -> a head of its own or none, what its config says of tying, rows beyond the rest's, dtype
and how far its weights lie from the base's."""
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def shapes(rows: int, count: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    layer = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
    layer |= {f"mlp.{x}_proj": (HIDDEN, HIDDEN) for x in ("gate", "up", "down")}
    layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    found = {EMBED: (rows, HIDDEN), HEAD: (rows, HIDDEN), NORM: (HIDDEN,)}
    for i in range(count):
        found |= {f"model.layers.{i}.{part}.weight": shape for part, shape in layer.items()}
    return found


def depth(folder: str) -> int:
    """Its number of layers."""
    return DEEP if folder == "deep" else LAYERS


def tensors(folder: str) -> dict[str, np.ndarray]:
    """Float32 tensors of a folder, as they are before they are rounded to its dtype."""
    head, _, more, _, far = FOLDERS[folder]
    base, own = np.random.default_rng(0), np.random.default_rng([*folder.encode()])
    found = {}
    for name, shape in shapes(ROWS, depth(folder)).items():
        start = base.standard_normal(shape) * 0.1 + (len(shape) == 1)
        value = start + far * own.standard_normal(shape)
        if name in (EMBED, HEAD):
            value = np.concatenate([value, own.standard_normal((more, HIDDEN))])
        found[name] = value.astype(np.float32)
    return {name: value for name, value in found.items() if head == "own" or name != HEAD}


def config(folder: str) -> dict[str, object]:
    """Its config.json."""
    _, tied, more, kind, _ = FOLDERS[folder]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": depth(folder),
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": ROWS + more,
        "tie_word_embeddings": tied,
        "dtype": {"F32": "float32", "BF16": "bfloat16"}[kind],
    }


def write(root: Path, save: object) -> None:
    """Makes the folders, and an adapter `lora` of `base`.

    Args:
        root: where.
        save: (name -> float32 array, dtype of the header, file) -> written.
    """
    words = ["<unk>", "<s>", "</s>", *(f"_tok_{i}" for i in range(3, ROWS))]
    for folder, (_, _, more, kind, _) in FOLDERS.items():
        path = root / folder
        path.mkdir()
        save(tensors(folder), kind, str(path / "model.safetensors"))
        (path / "config.json").write_text(json.dumps(config(folder)))
        model = tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>")
        made = tokenizers.Tokenizer(model)
        made.add_special_tokens([*words[:3], *(f"<new_{i}>" for i in range(more))])
        made.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    rng, factors = np.random.default_rng(9), {}
    for i in range(LAYERS):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"base_model.model.model.layers.{i}.{part}"
            factors[f"{name}.lora_A.weight"] = rng.standard_normal((2, HIDDEN)).astype(np.float32)
            factors[f"{name}.lora_B.weight"] = rng.standard_normal((HIDDEN, 2)).astype(np.float32)
    (root / "lora").mkdir()
    save(factors, "F32", str(root / "lora" / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **LORA}
    settings["base_model_name_or_path"] = "base"
    (root / "lora" / "adapter_config.json").write_text(json.dumps(settings))


def models(*entries: str | tuple[str, dict]) -> list[dict]:
    """The `models` of a recipe."""
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in entries]
    return [{"model": m, **({"parameters": own} if own else {})} for m, own in pairs]


def recipe(method: str, *entries: str | tuple[str, dict], **more: object) -> dict:
    """A recipe of whole models in float32; other keys as they are, parameters by their names."""
    found = {"merge_method": method, "models": models(*entries), "dtype": "float32"}
    keys = ("base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
    found |= {key: more.pop(key) for key in keys if key in more}
    return {key: x for key, x in found.items() if x} | ({"parameters": more} if more else {})


def layers(model: str, start: int, stop: int, **own: object) -> dict:
    """Some layers of a model."""
    more = {"parameters": own} if own else {}
    return {"model": model, "layer_range": [start, stop], **more}


def methods() -> dict[str, dict]:
    """Each method with the options that change what it does; `a`, `b`, `c` on `base`.

    Every member has a weight, also where the method reads none.
    """
    two = (("a", {"weight": 0.6}), ("b", {"weight": 0.4}))
    three = (*two, ("c", {"weight": 0.7}))
    task = {"base_model": "base"}
    found = {
        "copy": recipe("passthrough", "a"),
        "copy_scale": recipe(
            "passthrough", ("a", {"scale": [{"filter": "q_proj", "value": 0}, {"value": 1}]})
        ),
        "linear": recipe("linear", *three),
        "slerp": recipe("slerp", *two, base_model="a", t=0.35),
        "task_arithmetic": recipe("task_arithmetic", *three, **task),
        "breadcrumbs": recipe("breadcrumbs", *two, density=0.7, gamma=0.1, **task),
        "breadcrumbs_ties": recipe("breadcrumbs_ties", *two, density=0.7, **task),
        "ties": recipe("ties", *two, density=0.3, **task),
        "sce": recipe("sce", *two, select_topk=0.5, **task),
        "ram": recipe("ram", *two, **task),
        "ramplus_tl": recipe("ramplus_tl", *two, r=0.05, alpha=1.0, **task),
        "multislerp": recipe("multislerp", *two, **task),
        "model_stock": recipe("model_stock", *two, **task),
        "model_stock_rows": recipe("model_stock", *two, filter_wise=True, **task),
        "arcee_fusion": recipe("arcee_fusion", "base", *two[:1], **task),
        "nearswap": recipe("nearswap", *two, base_model="a", t=0.0001),
        "karcher": recipe("karcher", *two, max_iter=10, tol=1e-5),
        "dare_ties": recipe("dare_ties", *two, density=0.66, **task),
        "dare_linear": recipe("dare_linear", *two, density=0.66, rescale=False, **task),
        "della": recipe("della", *two, density=0.66, epsilon=0.05, **{"lambda": 0.5}, **task),
        "della_linear": recipe("della_linear", *two, density=0.66, epsilon=0.05, **task),
        "della_wide": recipe("della", *two, density=0.66, epsilon=1.35, **task),
    }
    for base in ({}, task):
        for flat, rows in ((True, False), (True, True), (False, False), (False, True)):
            options = {"nuslerp_flatten": flat, "nuslerp_row_wise": rows, **base}
            name = f"nuslerp{'_base' * bool(base)}{'_flat' * flat}{'_rows' * rows}"
            found[name] = recipe("nuslerp", *two, **options)
    less = (("a", {"weight": -0.5}), ("b", {"weight": 0.5}))
    found["nuslerp_zero"] = recipe("nuslerp", *less, nuslerp_flatten=False, **task)
    return found


def heads() -> dict[str, dict]:
    """Members whose heads are the embeddings with others, heads of their own, other rows."""
    found = {}
    pairs = {
        "tied_base": ("tied", "a"),
        "tied_member": ("base", "tied_a"),
        "both_tied": ("tied", "tied_a"),
        "own_heads": ("heads", "heads_a"),
        "own_head_on_tied": ("tied", "heads_a"),
        "tied_on_own_head": ("heads", "tied_a"),
        "own_head_on_untied": ("base", "heads_a"),
    }
    for name, (base, member) in pairs.items():
        listed = ((base, {"weight": 0.3}), (member, {"weight": 0.7}))
        found[f"{name}_linear"] = recipe("linear", *listed)
        if name in ("tied_member", "own_head_on_tied"):
            found[f"{name}_linear_turned"] = recipe("linear", *listed[::-1])
        found[f"{name}_slerp"] = recipe("slerp", base, member, base_model=base, t=0.3)
        one = (member, {"weight": 0.7})
        found[f"{name}_task"] = recipe("task_arithmetic", one, base_model=base)
        found[f"{name}_ties"] = recipe("ties", one, density=0.5, base_model=base)
    for base, member in (("base", "wide"), ("tied", "wide"), ("base", "tied_wide")):
        for source in ("base", "union"):
            name = f"rows_{base}_{member}_{source}"
            one = (member, {"weight": 0.7})
            more = {"base_model": base, "tokenizer_source": source}
            found[f"{name}_task"] = recipe("task_arithmetic", one, **more)
            found[f"{name}_linear"] = recipe("linear", (base, {"weight": 0.3}), one, **more)
    return found


def forms() -> dict[str, dict]:
    """Slices, modules, dtypes, adapters, gradients, filters."""
    half = {"weight": 0.5}
    stack = {
        "merge_method": "passthrough",
        "slices": [{"sources": [layers("a", 0, 2)]}, {"sources": [layers("a", 0, 2)]}],
        "dtype": "float32",
    }
    curve = [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.3}]
    blend = {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers("a", 0, 1, weight=1.0), layers("b", 1, 2, weight=0.5)]},
            {"sources": [layers("b", 0, 1, weight=0.2), layers("a", 1, 2, weight=0.6)]},
        ],
        "dtype": "float32",
    }
    own_base = {
        "merge_method": "task_arithmetic",
        "slices": [
            {"sources": [layers("base", 0, 1), layers("a", 0, 1, weight=0.5)]},
            {
                "sources": [layers("base", 1, 2), layers("b", 1, 2)],
                "parameters": {"weight": 0.25},
            },
        ],
        "base_model": "base",
        "dtype": "float32",
    }
    other_depth = {
        "merge_method": "slerp",
        "slices": [{"sources": [layers("a", 0, 2), layers("deep", 1, 3)]}],
        "base_model": "a",
        "parameters": {"t": [0.2, 0.6]},
        "dtype": "torch.float32",
    }
    module = {
        "merge_method": "linear",
        "modules": {"default": {"models": models(("a", half), ("b", half))}},
        "dtype": "float32",
    }
    return {
        "stack": stack,
        "blend": blend,
        "slice_parameters": own_base,
        "other_depth": other_depth,
        "modules": module,
        "curve": recipe("slerp", "a", "b", base_model="a", t=curve),
        "gradient": recipe("linear", ("a", {"weight": [0.2, 0.8]}), ("b", half)),
        "bf16": recipe("linear", ("a", half), ("b", half), dtype="bfloat16"),
        "out_bf16": recipe("linear", ("a", half), ("b", half), out_dtype="bfloat16"),
        "out_only": recipe("linear", ("half", half), dtype=None, out_dtype="float32"),
        "no_dtype": recipe("linear", ("half", half), ("b", half), dtype=None),
        "no_dtype_half": recipe("linear", ("half", half), dtype=None),
        "no_dtype_task": recipe("task_arithmetic", ("half", half), dtype=None, base_model="base"),
        "lora": recipe("linear", ("base+lora", half), ("a", half)),
        "lora_task": recipe("task_arithmetic", ("base+lora", half), base_model="base"),
        "lora_copy": recipe("passthrough", "base+lora"),
        "base_listed": recipe("task_arithmetic", "base", ("a", half), base_model="base"),
        "base_alone": recipe("task_arithmetic", "base", base_model="base"),
        "template": recipe("linear", ("a", half), ("b", half), chat_template="chatml"),
    }


def cases() -> dict[str, dict]:
    """Case -> recipe."""
    return methods() | heads() | forms()


def main(target: Path) -> None:
    """Records all cases.

    Args:
        target: npz to write.
    """
    sys.path.remove(str(Path(__file__).resolve().parent))
    import torch
    import yaml
    from mergekit.architecture import ConfiguredModuleArchitecture
    from mergekit.architecture.base import ConfiguredModelArchitecture
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file, save_file

    for model in (ConfiguredModuleArchitecture, ConfiguredModelArchitecture):
        model.model_rebuild(force=True, _types_namespace={"torch": torch})
    torch.set_num_threads(1)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16}

    def save(found: dict[str, np.ndarray], kind: str, file: str) -> None:
        made = {name: torch.from_numpy(x).to(kinds[kind]) for name, x in found.items()}
        save_file(made, file, {"format": "pt"})

    facts: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, save)
        os.chdir(root)
        for case, given in cases().items():
            LoaderCache().loaders.clear()
            text = yaml.safe_dump(given, sort_keys=False)
            fact = facts[case] = {"yaml": text}
            out = root / "out" / case
            options = MergeOptions(
                write_model_card=False, quiet=True, random_seed=7, lora_merge_cache=str(root)
            )
            try:
                run_merge(
                    MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options
                )
            except Exception as error:
                fact["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(case, fact["error"])
                continue
            (file,) = out.glob("*.safetensors")
            made = load_file(file)
            found = json.loads((out / "config.json").read_text())
            keys = ("num_hidden_layers", "vocab_size", "tie_word_embeddings")
            fact["config"] = {key: found.get(key) for key in keys}
            fact["names"] = sorted(made)
            for name in STORED if case in methods() or case in forms() else STORED[:3]:
                if name in made and (name != EMBED or case not in methods()):
                    x = made[name]
                    half = x.dtype == torch.bfloat16
                    arrays[f"{case}/{name}"] = (x.view(torch.uint16) if half else x).numpy()
    arrays["cases"] = np.array(json.dumps(facts))
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
