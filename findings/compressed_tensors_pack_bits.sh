#!/usr/bin/env bash
# compressed-tensors 0.18.0 packs weights of 3, 5, 6 and 7 bits otherwise than 0.17.1: from bit to bit, across
# the words of 32 bits, where it was as many whole weights as a word holds. `format` in quantization_config is
# "pack-quantized" before and after, and unpacking asks for no version: what 0.17.1 has packed, 0.20.1 unpacks
# to other weights, without an error. 2, 4 and 8 bits are the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
for version in 0.17.1 0.18.0 0.20.1; do
    "$work/env/bin/pip" install --quiet --no-deps --target "$work/$version" compressed-tensors==$version
done
cd "$work"
"$work/env/bin/python" - <<'PY'
import importlib.util

import torch


def helpers(version):
    path = f"{version}/compressed_tensors/compressors/pack_quantized/helpers.py"
    spec = importlib.util.spec_from_file_location("helpers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


old, changed, new = map(helpers, ("0.17.1", "0.18.0", "0.20.1"))
torch.manual_seed(0)
for bits in range(2, 9):
    half = 1 << bits - 1
    weight = torch.randint(-half, half, (4, 96)).to(torch.int8)
    stored = old.pack_to_int32(weight, bits)
    same = torch.equal(changed.pack_to_int32(weight, bits), new.pack_to_int32(weight, bits))
    read = new.unpack_from_int32(stored, bits, weight.shape)
    wrong = (read != weight).float().mean().item()
    words = stored.shape[1], new.pack_to_int32(weight, bits).shape[1]
    print(f"{bits} bits: {words[0]} words a row by 0.17.1, {words[1]} by 0.20.1; "
          f"{wrong:.0%} of 0.17.1's weights are read as others by 0.20.1")
    assert same and (wrong > 0.5) == (bits in (3, 5, 6, 7)), "the behaviour changed"
PY
