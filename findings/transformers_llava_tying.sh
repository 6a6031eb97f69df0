#!/usr/bin/env bash
# transformers 5.24.0: whether a LLaVA's head is its embedding depends on the class, not on the keys.
# With `text_config.tie_word_embeddings: true` and false on top, LlavaForConditionalGeneration is tied
# (its config copies the text's true to the top, over an explicit false) and
# LlavaNextForConditionalGeneration is not: it has a head of its own and saves it. And a tied config
# whose file holds two different tensors loads untied, with one warning, and is saved again with both
# under `tie_word_embeddings: true`: whoever drops `lm_head` because the config says "tied" computes
# something else.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
text = LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True)
vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
for config_class, model_class, tied in (
    (LlavaConfig, LlavaForConditionalGeneration, True),
    (LlavaNextConfig, LlavaNextForConditionalGeneration, False),
):
    config = config_class(vision_config=vision, text_config=text, image_token_index=39, tie_word_embeddings=False)
    model = model_class(config)
    model.save_pretrained(model_class.__name__)
    names = load_file(f"{model_class.__name__}/model.safetensors")
    found = model.lm_head.weight is model.get_input_embeddings().weight
    head = [name for name in names if "lm_head" in name]
    print(f"{model_class.__name__}: text true, top false: tied {found}, head in the file {head}")
    assert (found, bool(head)) == (tied, not tied), "the behaviour changed"

LlamaForCausalLM(text).save_pretrained("llama")
tensors = load_file("llama/model.safetensors")
assert "lm_head.weight" not in tensors
tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
save_file(tensors, "llama/model.safetensors", {"format": "pt"})
model = LlamaForCausalLM.from_pretrained("llama")
apart = not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
model.save_pretrained("again")
both = "lm_head.weight" in load_file("again/model.safetensors")
says = json.loads(pathlib.Path("again/config.json").read_text())["tie_word_embeddings"]
print(f"tied Llama with two tensors: untied {apart}; saved again: both {both}, tied says config {says}")
assert (apart, both, says) == (True, True, True), "the behaviour changed"
PY
