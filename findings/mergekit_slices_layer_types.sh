#!/usr/bin/env bash
# mergekit 0.1.5 with transformers 5.12.1: a passthrough of `slices` that makes a Qwen2 or Qwen3 of
# another depth ends in StrictDataclassClassValidationError: num_hidden_layers is updated, and
# layer_types, which transformers 5 writes into these models' config.json, is not. By then
# model.safetensors of the new depth is written; there is no config.json beside it. A Llama, whose
# config has no layer_types, is written whole. Mend: remove layer_types from the sources' config.json,
# or give it the slices' entries.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet mergekit==0.1.5 transformers==5.12.1
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import importlib.metadata
import json
import pathlib

import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file

print("mergekit", importlib.metadata.version("mergekit"), "transformers", transformers.__version__)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
for kind, fails in (("Qwen2", True), ("Qwen3", True), ("Llama", False)):
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=40, num_key_value_heads=2)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(kind)
    typed = "layer_types" in json.loads(pathlib.Path(kind, "config.json").read_text())
    slices = [{"sources": [{"model": kind, "layer_range": each}]} for each in ([0, 3], [1, 4])]
    recipe = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    out, error = pathlib.Path(f"{kind}-6"), None
    try:
        run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    except Exception as found:
        error = found
    layers = {name.split(".")[2] for name in load_file(out / "model.safetensors") if ".layers." in name}
    whole = (out / "config.json").is_file()
    print(f"{kind}: layer_types in config.json {typed}; {len(layers)} layers written, config.json {whole}")
    if error:
        print(f"  {type(error).__name__}: {' '.join(str(error).split())}")
    assert typed == fails and len(layers) == 6 and whole != fails, "the behaviour changed"
    assert (type(error).__name__ == "StrictDataclassClassValidationError") == fails, "the behaviour changed"
    assert not fails or "`num_hidden_layers` (6)" in str(error), "the behaviour changed"
PY
