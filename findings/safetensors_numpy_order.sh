#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save writes the values of a transposed, Fortran-ordered or
# strided array in another order, without an error. One would expect the array back, or a refusal as
# safetensors.torch has for tensors that are not contiguous. Mend: numpy.ascontiguousarray first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0
"$work/env/bin/python" - <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load, save

print("safetensors", safetensors.__version__, "numpy", np.__version__)
rows = np.arange(6, dtype=np.float32).reshape(2, 3)
seen = {
    "transposed": (rows.T, [[0, 1], [2, 3], [4, 5]]),
    "Fortran order": (np.asfortranarray(rows), [[0, 3, 1], [4, 2, 5]]),
    "every second column": (np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2], [[0, 1], [2, 3], [4, 5]]),
}
for name, (array, wrong) in seen.items():
    back = load(save({"x": array}))["x"]
    print(f"{name}: saved {array.tolist()}, loaded {back.tolist()}")
    assert back.tolist() == wrong, "the behaviour changed"
    whole = load(save({"x": np.ascontiguousarray(array)}))["x"]
    assert np.array_equal(whole, array)
PY
