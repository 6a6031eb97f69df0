#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0 on a CPU: Idefics3 and SmolVLM find the row of a patch's
# position by comparing float32 fractions, i * (1 / n) against arange(1 / n, 1, 1 / n). Where n has
# no exact inverse the two round apart: with 25 patches a side, of a whole square picture, 16 of 25
# rows and columns take their neighbour's position, or 400 of 625 patches; among 2 to 59 patches a
# side a quarter are so. The published sizes, 26 (364 / 14) and 32 (512 / 16), are exact, so nobody
# sees it; a port that writes arange for the positions of a whole picture is right for these two and
# wrong for others. Which sizes are hit hangs on how arange is vectorised.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import torch
import transformers
from transformers import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

print("transformers", transformers.__version__, "torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
apart = {}
for side in range(2, 60):
    config = Idefics3VisionConfig(**sizes, image_size=side * 2, patch_size=2)
    module, seen = Idefics3VisionEmbeddings(config), []
    module.position_embedding.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    module(torch.zeros(1, 3, side * 2, side * 2), torch.ones(1, side, side, dtype=torch.bool))
    wrong = int((seen[0][0] != torch.arange(side**2)).sum())
    if wrong:
        apart[side] = wrong
print("patches a side: patches of a whole picture at another's position:", apart)
assert 26 not in apart and 32 not in apart and apart.get(25) == 400, "the behaviour changed"
assert len(apart) >= 10, "the behaviour changed"
PY
