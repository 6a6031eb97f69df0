#!/usr/bin/env bash
# transformers 5.24.0 on a CPU: Qwen3-VL's chat template writes a video as <|vision_start|>,
# <|video_pad|>, <|vision_end|>. Its processor puts times and marks of their own around each two
# frames, but in the place of <|video_pad|> alone, so that the template's two marks stand around
# them all once more: <|vision_start|><0.2 seconds><|vision_start|>...<|vision_end|><|vision_end|>.
# The processor of 4.57, as the model was published with, replaces the three together. Nothing
# warns: every video is shown with two tokens more than the model was trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

print("transformers", transformers.__version__)
START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
ids = [START, PAD, END, "<|image_pad|>"]
tokenizer = SimpleNamespace(convert_tokens_to_ids=ids.index, chat_template=None, init_kwargs={})
videos = SimpleNamespace(merge_size=2, temporal_patch_size=2)
with mock.patch.object(Qwen3VLProcessor, "check_argument_for_proper_class"):  # needs torchvision
    processor = Qwen3VLProcessor(SimpleNamespace(merge_size=2), tokenizer, videos)
shown = SimpleNamespace(fps=2.0, frames_indices=[0, 1, 2, 3])
grids = {"video_grid_thw": torch.tensor([[2, 2, 2]]), "video_metadata": [shown]}
written = processor.replace_video_token(grids, 0)
(text,), _ = processor.get_text_with_replacements([f"{START}{PAD}{END}"], [], [written])
print(text)
frames = "".join(f"<{t} seconds>{START}{PAD}{END}" for t in (0.2, 1.2))
assert text == f"{START}{frames}{END}", "the behaviour changed"
PY
