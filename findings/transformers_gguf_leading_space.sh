#!/usr/bin/env bash
# transformers 5.24.0 with gguf 0.19.0: the tokenizer that it builds of a SentencePiece vocabulary in a GGUF
# file (Llama 2's, Mistral's) puts no space before a text that begins with one. SentencePiece, which the model
# was trained with, and llama.cpp (tokenizer.ggml.add_space_prefix) always do: " a" is two spaces and an a.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 sentencepiece==0.2.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import io

import gguf
import sentencepiece
import transformers

made = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["  a cat sat on  the mat   and  a  dog sat too"] * 20),
    model_writer=made, model_type="bpe", vocab_size=300, byte_fallback=True,
    hard_vocab_limit=False, remove_extra_whitespaces=False, minloglevel=2,
)
model = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
count = model.vocab_size()
kinds = [
    2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
    for i in range(count)
]
writer = gguf.GGUFWriter("m.gguf", "llama")
writer.add_tokenizer_model("llama")
writer.add_token_list([model.id_to_piece(i) for i in range(count)])
writer.add_token_scores([model.get_score(i) for i in range(count)])
writer.add_token_types(kinds)
writer.add_bos_token_id(model.bos_id())
writer.add_eos_token_id(model.eos_id())
writer.add_unk_token_id(model.unk_id())
writer.add_add_space_prefix(True)
for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
    getattr(writer, step)()

tokenizer = transformers.AutoTokenizer.from_pretrained(".", gguf_file="m.gguf")
print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
for text in ("a cat", " a cat"):
    theirs = model.encode(text)
    found = tokenizer(text, add_special_tokens=False).input_ids
    print(repr(text), "SentencePiece", [model.id_to_piece(i) for i in theirs], "transformers",
          [model.id_to_piece(i) for i in found])
    assert (found == theirs) == (text == "a cat"), "the behaviour changed"
PY
