#!/usr/bin/env bash
# mergekit 0.1.5 with transformers 5.12.1: a merge of two LLaVA folders that transformers 5 saved
# ends without an error, and no tensor of the LLM is in the output: vision tower and projector
# alone, under the names that they have in memory. from_pretrained reports the LLM's 12 tensors as
# missing and newly initialised. Mend: merge the LLMs' tensors as plain LLM folders, and copy tower
# and projector.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet mergekit==0.1.5 transformers==5.12.1
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import importlib.metadata

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file

print("mergekit", importlib.metadata.version("mergekit"), "transformers", transformers.__version__)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
text = transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2)
vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
for name in ("one", "two"):
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(name)
half = {"weight": 0.5}
recipe = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": half} for name in ("one", "two")],
    "dtype": "float32",
}
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
run_merge(MergeConfiguration.model_validate(recipe), "out", options)


def kinds(folder):
    names = load_file(f"{folder}/model.safetensors")
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    return {part: sum(part in name for name in names) for part in parts} | {"all": len(names)}


before, after = kinds("one"), kinds("out")
print("tensors of a source:", before, "| of the merge:", after)
assert before["language_model"] == 12, "the behaviour changed"
assert after["language_model"] == 0 and after["vision_tower"] > 0, "the behaviour changed"
_, seen = transformers.LlavaForConditionalGeneration.from_pretrained("out", output_loading_info=True)
missing = [name for name in seen["missing_keys"] if "language_model" in name or "lm_head" in name]
print("missing keys of the LLM on opening it:", len(missing))
assert len(missing) == 12, "the behaviour changed"
PY
