#!/usr/bin/env bash
# transformers 5.24.0 with gguf 0.19.0: the tokenizer that it builds of a GGUF file never reads
# `tokenizer.ggml.pre`, the name of the rule that text is split by, and takes GPT-2's. SmolLM's tokenizer.json
# ("smollm" in llama.cpp) splits digits off first, each by itself, so that spaces before one stay together:
# texts with digits become other tokens than the model was trained with, without a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import gguf
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = ["<|endoftext|>", *letters, "ĠĠ", "12"]
merges = [("Ġ", "Ġ"), ("1", "2")]
writer = gguf.GGUFWriter("m.gguf", "llama")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list(tokens)
writer.add_token_types([3] + [1] * (len(tokens) - 1))
writer.add_token_merges([" ".join(pair) for pair in merges])
writer.add_bos_token_id(0)
writer.add_eos_token_id(0)
for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
    getattr(writer, step)()
found = transformers.AutoTokenizer.from_pretrained(".", gguf_file="m.gguf")

vocab = {token: number for number, token in enumerate(tokens)}
published = tokenizers.Tokenizer(models.BPE(vocab, merges))
published.pre_tokenizer = pre_tokenizers.Sequence(  # SmolLM2's tokenizer.json
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
for text in ("a  b", "a  1", "a12"):
    theirs, ours = published.encode(text).tokens, found.tokenize(text)
    print(repr(text), "published", theirs, "transformers", ours)
    assert (theirs == ours) == (text == "a  b"), "the behaviour changed"
PY
