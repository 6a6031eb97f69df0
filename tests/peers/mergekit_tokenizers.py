"""Records the tokenizers and embeddings that mergekit 0.1.5 makes of several.

In the environment of tests/peers/mergekit.py:

    mk/bin/python tests/peers/mergekit_tokenizers.py tests/data/mergekit_tokenizers.npz

The file holds `cases`, JSON: case -> `yaml`, `vocab` (token -> id), `added` (tokens), `chat`, two
messages under the chat template, or `error`; and CASE/embed and CASE/head, float32.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers

HIDDEN = 8
WORDS = ["<unk>", "<s>", "</s>", *(f"_tok_{i}" for i in range(3, 32))]
MESSAGES = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes"}]
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
MODELS = {
    "base": (32, [], [], None),
    "chatml": (34, [], ["<|im_start|>", "<|im_end|>"], PLAIN),
    "other": (40, ["more", "words"], ["<|im_end|>"], PLAIN),  # 35 tokens, padded
    "padded": (32, [], ["<UNUSED_0>", "<UNUSED_1>"], None),  # tokens without rows
    "long": (36, ["_a", "_b", "_c", "_d"], [], "{{ 'an' }}{{ 'other one' }}"),
}
"""Model -> rows, plain tokens and added tokens beyond the base's, chat template."""


def write(root: Path, save: object) -> None:
    """Makes the folders.

    Args:
        root: where.
        save: (name -> float32 array, file) -> written.
    """
    for seed, (model, (rows, words, added, chat)) in enumerate(MODELS.items()):
        rng, folder = np.random.default_rng(seed), root / model
        folder.mkdir()
        shapes = {
            "model.embed_tokens": (rows, HIDDEN),
            "lm_head": (rows, HIDDEN),
            "model.norm": (HIDDEN,),
            "model.layers.0.input_layernorm": (HIDDEN,),
            "model.layers.0.post_attention_layernorm": (HIDDEN,),
            **{f"model.layers.0.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
            **{f"model.layers.0.mlp.{x}_proj": (HIDDEN, HIDDEN) for x in ("gate", "up", "down")},
        }
        tensors = {
            f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        save(tensors, str(folder / "model.safetensors"))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": rows,
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps(config))
        vocab = {word: i for i, word in enumerate([*WORDS, *words])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
        made.add_special_tokens([*WORDS[:3], *added])
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
        if chat:
            settings["chat_template"] = chat
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def merge(*models: str, method: str = "linear", base: str | None = "base", **more: object) -> dict:
    """A recipe of equal weights."""
    listed = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    config = {"merge_method": method, "models": listed, "dtype": "float32", **more}
    return config | ({"base_model": base} if base else {})


def cases() -> dict[str, dict]:
    """Case -> recipe."""
    three = ("base", "padded", "chatml")
    tokens = {
        "_tok_10": {"source": "chatml", "force": True},
        "_tok_11": {"source": "base", "force": True},
        "_tok_12": {"source": {"kind": "zero"}, "force": True},
        "_tok_13": {
            "source": {"kind": "model_token", "model": "chatml", "token_id": 33},
            "force": True,
        },
        "_tok_14": {
            "source": {"kind": "model_token", "model": "base", "token": "<s>"},
            "force": True,
        },
        "<|im_end|>": {"source": "chatml"},
        "new": {"source": {"kind": "model_token", "model": "base", "token": "_tok_3"}},
    }
    found = {
        "base": merge(*three, tokenizer_source="base"),
        "union": merge(*three, tokenizer_source="union"),
        "model": merge(*three, tokenizer_source="chatml"),
        "slerp": merge(
            "base", "chatml", method="slerp", tokenizer_source="union", parameters={"t": 0.4}
        ),
        "task": merge("chatml", "long", method="task_arithmetic", tokenizer={"source": "union"}),
        "no_base": merge(
            *("base", "chatml"), base=None, tokenizer={"source": "union"}, chat_template="chatml"
        ),
        "shared": merge("base", "chatml", "other", tokenizer_source="union"),
        "from_other": merge("base", "chatml", "other", tokenizer_source="other"),
        "shrunk": merge("base", "long", base="long", tokenizer={"source": "base"}),
        "tokens": merge("base", "chatml", tokenizer={"source": "union", "tokens": tokens}),
        "tokens_base": merge("base", "chatml", tokenizer={"source": "base", "tokens": tokens}),
        "padding": merge(
            "chatml", "base", base="chatml", tokenizer={"source": "base", "pad_to_multiple_of": 16}
        ),
        "chat_name": merge("base", "padded", chat_template="chatml"),
        "chat_llama": merge("base", "padded", chat_template="llama3"),
        "chat_text": merge("base", "padded", chat_template="{{ messages[0]['content'] }} !"),
        "chat_auto": merge(
            "chatml",
            "base",
            "long",
            "other",
            base=None,
            chat_template="auto",
            tokenizer_source="union",
        ),
    }
    found["outer_source"] = merge("base", "padded", tokenizer_source="chatml")
    return found


def main(target: Path) -> None:
    """Records all cases.

    Args:
        target: npz to write.
    """
    sys.path.remove(str(Path(__file__).resolve().parent))
    import torch
    import transformers
    import yaml
    from mergekit.architecture import ConfiguredModuleArchitecture
    from mergekit.architecture.base import ConfiguredModelArchitecture
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.numpy import load_file, save_file

    for model in (ConfiguredModuleArchitecture, ConfiguredModelArchitecture):
        model.model_rebuild(force=True, _types_namespace={"torch": torch})
    facts: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, lambda tensors, file: save_file(tensors, file, {"format": "pt"}))
        os.chdir(root)
        for case, config in cases().items():
            LoaderCache().loaders.clear()
            text = yaml.safe_dump(config, sort_keys=False)
            fact = facts[case] = {"yaml": text}
            out = root / "out" / case
            try:
                parsed = MergeConfiguration.model_validate(yaml.safe_load(text))
                run_merge(parsed, str(out), MergeOptions(write_model_card=False, quiet=True))
            except Exception as error:
                fact["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            made = transformers.AutoTokenizer.from_pretrained(out)
            fact["vocab"] = dict(sorted(made.get_vocab().items()))
            fact["added"] = sorted(x.content for x in made.added_tokens_decoder.values())
            fact["rows"] = json.loads((out / "config.json").read_text())["vocab_size"]
            if made.chat_template:
                fact["chat"] = made.apply_chat_template(
                    MESSAGES, tokenize=False, add_generation_prompt=True
                )
            tensors = load_file(out / "model.safetensors")
            arrays[f"{case}/embed"] = tensors["model.embed_tokens.weight"]
            arrays[f"{case}/head"] = tensors["lm_head.weight"]
    arrays["cases"] = np.array(json.dumps(facts))
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
