"""Records what mergekit 0.1.5 merges tiny Llama checkpoints to, as tests/data/mergekit.npz.

Its pins exclude ours, so it has an environment of its own, and its results are stored:

    python3.11 -m venv mk && mk/bin/pip install mergekit==0.1.5 transformers==5.12.1
    mk/bin/python tests/peers/mergekit.py tests/data/mergekit.npz

Recordings are equal to the bit, but for mergekit's multislerp, which varies by roundings from run
to run. Each case is a YAML that runs through mergekit's whole pipeline. The file holds

* `cases`: JSON, case -> `yaml`, `seed`, `inputs` ("float32", "bfloat16" or "thin"), and what was
  said if the merge failed (`error`);
* `in/MODEL/TENSOR`: float32 inputs; the bfloat16 ones are these rounded, the thin ones have an MLP
  of width 1;
* `CASE/TENSOR`: results, bfloat16 as uint16.
"""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

HIDDEN, INNER, LAYERS, VOCAB = 16, 24, 3, 40
DELTAS = {"base": 0.0, "a": 5e-4, "b": 1e-3, "c": 1e-3, "near": 3e-4, "far": 0.05, "away": 0.05}
"""Model -> standard deviation of its difference from the base."""
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QUERIES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS + 1)]
DOWN = "model.layers.1.mlp.down_proj.weight"
FEW, ALL = (DOWN, NORM), (EMBED, HEAD, NORM, DOWN, *QUERIES)
"""Tensors that are stored of a case; there are four layers where slices are stacked."""


def shapes(inner: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with two key-value heads of four."""
    half = HIDDEN // 2
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (half, HIDDEN),
        "self_attn.v_proj": (half, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (inner, HIDDEN),
        "mlp.up_proj": (inner, HIDDEN),
        "mlp.down_proj": (HIDDEN, inner),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    inside = {
        f"model.layers.{i}.{part}.weight": shape
        for i, (part, shape) in itertools.product(range(LAYERS), layer.items())
    }
    return {EMBED: (VOCAB, HIDDEN), **inside, NORM: (HIDDEN,), HEAD: (VOCAB, HIDDEN)}


def inputs() -> dict[str, dict[str, np.ndarray]]:
    """Model -> tensor -> float32: norms about 1, the rest about 0."""
    rng = np.random.default_rng(0)
    models: dict[str, dict[str, np.ndarray]] = {model: {} for model in DELTAS}
    for name, shape in shapes(INNER).items():
        base = 0.02 * rng.standard_normal(shape) + (len(shape) == 1)
        for model, size in DELTAS.items():
            models[model][name] = np.float32(base + size * rng.standard_normal(shape))
    models["twin"] = models["a"]
    return models


def listed(method: str, *entries: str | tuple[str, dict], **rest: object) -> dict:
    """A recipe of whole models; `base` and `dtype` are its keys, the rest its parameters."""
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in entries]
    models = [{"model": model, "parameters": own} for model, own in pairs]
    config = {"merge_method": method, "models": models, "dtype": rest.pop("dtype", "float32")}
    for key in ("out_dtype", "base_model"):
        if key in rest:
            config[key] = rest.pop(key)
    return config | ({"parameters": rest} if rest else {})


def task(method: str, *entries: tuple[str, dict], **rest: object) -> dict:
    """A recipe of task vectors."""
    return listed(method, *entries, base_model="base", **rest)


def each(*weights: float, **own: float) -> list[tuple[str, dict]]:
    """The fine-tunes with their weights."""
    return [(model, {"weight": w, **own}) for model, w in zip("abc", weights, strict=False)]


def layers(model: str, start: int, stop: int, **own: object) -> dict:
    """Some layers of a model."""
    return {"model": model, "layer_range": [start, stop], "parameters": own}


def cases() -> dict[str, dict]:
    """Case -> recipe, in float32."""
    three, two = each(0.5, 0.3, 0.4), each(0.7, 0.4)
    sparse = each(0.5, -0.3, 0.4, density=0.6, gamma=0.05)
    dense = each(0.5, -0.3, density=1.0)
    one = each(1.0, density=0.5)
    idle = [*one, ("b", {"weight": 0.0, "density": 1.0})]  # for which mergekit draws nothing
    found = {
        "linear": listed("linear", *three),
        "linear_sum": listed("linear", *three, normalize=False),
        "slerp": listed("slerp", "base", "b", base_model="base", t=0.3),
        "slerp_far": listed("slerp", "far", "a", base_model="a", t=0.3),
        "slerp_near": listed("slerp", "base", "a", base_model="base", t=0.3),
        "nuslerp": listed("nuslerp", *two),
        "nuslerp_base": task("nuslerp", *two),
        "nuslerp_last": task("nuslerp", *two, nuslerp_flatten=False),
        "nuslerp_first": task("nuslerp", *two, nuslerp_flatten=False, nuslerp_row_wise=True),
        "multislerp": listed("multislerp", *three),
        "multislerp_base": task("multislerp", *three),
        "multislerp_sum": task("multislerp", *three, normalize_weights=False),
        "karcher": listed("karcher", "a", "b", "far"),
        "model_stock": task("model_stock", "a", "b", "c"),
        "model_stock_rows": task("model_stock", "a", "b", "c", filter_wise=True),
        "task_arithmetic": task("task_arithmetic", *each(0.5, -0.3, 0.4), **{"lambda": 0.8}),
        "task_arithmetic_mean": task("task_arithmetic", *three, normalize=True),
        "ram": task("ram", *three, epsilon=5e-4),
        "ramplus_tl": task("ramplus_tl", "a", "b", "c", r=0.5, alpha=1.5, epsilon=5e-4),
        "ties": task("ties", *each(0.5, 0.3, 0.4, density=0.5)),
        "ties_sum": task("ties", *each(0.5, -0.3, 0.4, density=0.3), normalize=False),
        "ties_lambda": task("ties", *each(0.5, 0.3, 0.4, density=0.3), **{"lambda": 1.5}),
        "ties_rescale": task("ties", *each(0.5, 0.3, 0.4, density=0.3), rescale=True),
        "breadcrumbs": task("breadcrumbs", *sparse),
        "breadcrumbs_ties": task("breadcrumbs_ties", *sparse),
        "breadcrumbs_no_outliers": task("breadcrumbs", *each(1.0, density=0.6, gamma=0.0)),
        "dare_linear_dense": task("dare_linear", *dense),
        "dare_ties_dense": task("dare_ties", *dense),
        "della_linear_dense": task("della_linear", *dense),
        "della_dense": task("della", *dense),
        "dare_linear": task("dare_linear", *idle),
        "dare_ties": task("dare_ties", *idle),
        "della_linear": task("della_linear", *idle),
        "della": task("della", *idle),
        "dare_linear_beside": task("dare_linear", *one, ("b", {"weight": 0.0, "density": 0.5})),
        "sce": task("sce", "far", "away"),
        "sce_half": task("sce", "far", "away", select_topk=0.5),
        "sce_small": task("sce", "near", "a"),
        "sce_same": task("sce", "a", "twin", select_topk=0.5),
        "nearswap": task("nearswap", "b", t=5e-4),
        "arcee_fusion": task("arcee_fusion", "far"),
        "passthrough": listed("passthrough", ("a", {"scale": 0.7})),
        "ties_none": task("ties", *each(1.0, density=0.05)),
        "della_thin": task("della_linear", *one),
    }
    density = [{"filter": "q_proj", "value": [0.3, 0.5, 0.9]}, {"value": 0.7}]
    curves = each([0.2, 1.0], 0.3), each(0.0, 0.0, density=density)
    both = [(m, own | more) for (m, own), (_, more) in zip(curves[1], curves[0], strict=True)]
    found["ties_curves"] = task("ties", *both, **{"lambda": [1.0, 0.5]})
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    found["slerp_curves"] = {
        "merge_method": "slerp",
        "slices": [{"sources": [layers("base", 0, 3), layers("a", 0, 3)]}],
        "base_model": "base",
        "parameters": {"t": t},
        "dtype": "float32",
    }
    scale = [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}]
    found["slices"] = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers("a", 0, 2)]},
            {"sources": [layers("b", 1, 3, scale=scale)]},
        ],
        "dtype": "float32",
    }
    found["slices_linear"] = {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers("a", 0, 1, weight=0.6), layers("b", 1, 2, weight=0.4)]},
            {"sources": [layers("b", 1, 3, weight=[0.2, 0.8]), layers("c", 1, 3, weight=0.5)]},
        ],
        "dtype": "float32",
    }
    return found


HALF = (
    *("linear", "linear_four", "slerp", "karcher", "model_stock"),
    *("task_arithmetic", "sce"),
)
"""Cases that are also run on bfloat16 checkpoints: in bfloat16, and in float32 as CASE_exact."""
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della", "dare_linear_beside")
STORED = {
    **dict.fromkeys(("linear", "task_arithmetic", "ties_curves", "slerp_curves"), ALL),
    **dict.fromkeys(("slices", "slices_linear"), ALL),
    **dict.fromkeys(RANDOM, (EMBED, HEAD)),
    **dict.fromkeys(("della_linear_dense", "della_dense"), (HEAD,)),
    **dict.fromkeys(("arcee_fusion", "nuslerp", "nuslerp_base", "model_stock"), (DOWN,)),
    **dict.fromkeys(("model_stock_bf16", "model_stock_exact"), (DOWN,)),
}
"""Case -> tensors that are stored, if not `FEW`. Random masks are judged by their statistics."""
FAILING = ("della_thin",)
"""Cases in which mergekit raises; what it says is recorded."""
SEED = 7


def main(target: Path) -> None:
    """Records all cases.

    Args:
        target: npz to write.
    """
    # Where this script lies there must be nothing else called mergekit.
    sys.path.remove(str(Path(__file__).resolve().parent))
    import torch
    import yaml
    from mergekit.architecture import ConfiguredModuleArchitecture
    from mergekit.architecture.base import ConfiguredModelArchitecture
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file, save_file

    # transformers 5 annotates with names that pydantic does not find (mergekit's issue 681).
    for model in (ConfiguredModuleArchitecture, ConfiguredModelArchitecture):
        model.model_rebuild(force=True, _types_namespace={"torch": torch})
    torch.set_num_threads(1)
    models = inputs()

    def write(folder: Path, inner: int, dtype: torch.dtype) -> None:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": inner,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
        }
        for model, tensors in models.items():
            (folder / model).mkdir(parents=True)
            (folder / model / "config.json").write_text(json.dumps(config))
            cut = {
                name: np.ascontiguousarray(tensors[name][tuple(map(slice, shape))])
                for name, shape in shapes(inner).items()
            }
            data = {name: torch.from_numpy(x).to(dtype) for name, x in cut.items()}
            save_file(data, folder / model / "model.safetensors", {"format": "pt"})

    runs = {name: (config, "float32") for name, config in cases().items()}
    runs["della_thin"] = (runs["della_thin"][0], "thin")
    runs["ties_exact"] = (runs["ties"][0], "bfloat16")
    four = (*each(0.2, 0.3, 0.1), ("near", {"weight": 0.4}))
    for name in HALF:
        config = listed("linear", *four) if name == "linear_four" else runs[name][0]
        runs[f"{name}_bf16"] = (config | {"dtype": "bfloat16"}, "bfloat16")
        runs[f"{name}_exact"] = (config, "bfloat16")

    facts: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    names = [name for name in ALL if name in shapes(INNER)]
    for model in DELTAS:
        arrays |= {f"in/{model}/{name}": models[model][name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "float32", INNER, torch.float32)
        write(root / "bfloat16", INNER, torch.bfloat16)
        write(root / "thin", 1, torch.float32)
        for case, (config, kind) in runs.items():
            os.chdir(root / kind)
            LoaderCache().loaders.clear()
            text = yaml.safe_dump(config, sort_keys=False)
            fact = facts[case] = {"yaml": text, "seed": SEED, "inputs": kind}
            parsed = MergeConfiguration.model_validate(yaml.safe_load(text))
            options = MergeOptions(
                copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=SEED
            )
            try:
                run_merge(parsed, str(root / "out" / case), options)
            except Exception as error:
                if case not in FAILING:
                    raise
                fact["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            (file,) = (root / "out" / case).glob("*.safetensors")
            made = load_file(file)
            for name in STORED.get(case, FEW):
                if name not in made:
                    continue
                x = made[name]
                half = x.dtype == torch.bfloat16
                arrays[f"{case}/{name}"] = (x.view(torch.uint16) if half else x).numpy()
    arrays["cases"] = np.array(json.dumps(facts))
    part = target.with_name(f"{target.stem}.part.npz")
    np.savez_compressed(part, **arrays)
    part.replace(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
