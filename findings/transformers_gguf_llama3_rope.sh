#!/usr/bin/env bash
# transformers 5.24.0 with gguf 0.19.0: a GGUF file of Llama 3.1 to 3.3 loads without Llama 3's scaling of
# positions. llama.cpp has no keys for it: it writes a tensor, rope_freqs.weight, of what each frequency is
# divided by. transformers drops the tensor without a word (no missing or unexpected key) and turns by plain
# RoPE, so that the model answers as another one, from the first hundreds of tokens on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 accelerate
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import gguf
import numpy as np
import torch
import transformers

torch.manual_seed(0)
rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
    rope_parameters=rope, tie_word_embeddings=True, initializer_range=0.3,
)
model = transformers.LlamaForCausalLM(config).eval()
print("transformers", transformers.__version__, "torch", torch.__version__)

writer = gguf.GGUFWriter("m.gguf", "llama")
writer.add_context_length(2048)
writer.add_embedding_length(64)
writer.add_block_count(2)
writer.add_feed_forward_length(64)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_rope_freq_base(5e5)
writer.add_rope_dimension_count(16)
writer.add_vocab_size(64)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
for name, value in model.state_dict().items():
    if name == "lm_head.weight":
        continue
    value = value.numpy()
    if "q_proj" in name or "k_proj" in name:
        value = value.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
plain = 5e5 ** -(np.arange(0, 16, 2) / 16)
factors = plain / model.model.rotary_emb.inv_freq.numpy()
writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
    getattr(writer, step)()

again, info = transformers.AutoModelForCausalLM.from_pretrained(
    ".", gguf_file="m.gguf", dtype=torch.float32, output_loading_info=True
)
ids = torch.randint(0, 64, (1, 400))
with torch.no_grad():
    was, now = model(input_ids=ids).logits, again(input_ids=ids).logits
apart = float((was - now).abs().max() / was.abs().max())
short = float((was - now)[:, :2].abs().max() / was.abs().max())
print("the file divides frequencies by up to", factors.max())
print("loaded:", again.config.rope_parameters, {k: sorted(v) for k, v in info.items()})
print(f"logits apart by {short:.4f} of the largest in two tokens, by {apart:.3f} in 400")
assert again.config.rope_parameters["rope_type"] == "default", "the behaviour changed"
assert not any(info.values()) and apart > 0.02, "the behaviour changed"
PY
