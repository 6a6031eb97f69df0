#!/usr/bin/env bash
# transformers 5.24.0: Ovis2's image processor turns its grids by a quarter. It measures how much of a
# picture a grid of r rows and c columns keeps, and then cuts the picture into r columns and c rows: a
# picture of 4:1 becomes tiles of 16:1, each squashed to a square.
# And a `hidden_stride` that does not divide the patches a side, for which the model pads, fails: the
# padding goes behind the tokens and the pictures in place of rows and columns.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.24.0 pillow==13.0.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import torch
import transformers
from PIL import Image
from transformers.models.ovis2.image_processing_pil_ovis2 import (
    compute_patch_covering_area,
    split_image_into_grid,
)
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel

print("transformers", transformers.__version__, "torch", torch.__version__)
width, height, tile = 1792, 448, 448
processor = transformers.Ovis2ImageProcessorPil(
    crop_to_patches=True, size={"height": tile, "width": tile}
)
image = Image.new("RGB", (width, height))
((rows, cols),) = processor(image)["grids"]


def kept(rows, cols):
    parts = split_image_into_grid(height, width, (rows, cols))
    return sum(compute_patch_covering_area(*part, tile) for part in parts) / (width * height)


print(f"{width} x {height} pixels: cut into {rows} rows, {cols} columns, which keep {kept(rows, cols):.2f}")
print(f"{cols} rows, {rows} columns, which were measured, keep {kept(cols, rows):.2f}")
assert (rows, cols, kept(cols, rows)) == (4, 1, 1.0) and kept(rows, cols) < 0.1, "the behaviour changed"

config = transformers.Ovis2VisionConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    image_size=28, patch_size=7, vocab_size=16, hidden_stride=3,
)
try:
    Ovis2VisionModel(config)(torch.zeros(1, 3, 28, 28))
except RuntimeError as error:
    print(f"hidden_stride 3 of 4 patches a side: {error}")
else:
    raise SystemExit("the behaviour changed")
PY
