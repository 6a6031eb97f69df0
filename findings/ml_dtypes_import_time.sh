#!/usr/bin/env bash
# ml_dtypes 0.7.0: importing it takes about a second of CPU, where 0.6.0 takes about 12 ms. jax
# 0.10.2 imports it, and its dependencies let pip choose the newest: `import jax` takes three times
# as long. One would look for that second in jax or flax. All of it is spent as the extension module
# is initialised. Mend: `ml-dtypes!=0.7.0` beside jax.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 scipy opt_einsum==3.4.0
cat > "$work/seconds.py" <<'PY'
import importlib
import sys
import time

import numpy  # its own import is not counted

start = time.process_time()
importlib.import_module(sys.argv[1])
print(time.process_time() - start)
PY
for version in 0.6.0 0.7.0; do
    "$work/env/bin/pip" install --quiet --no-deps "ml_dtypes==$version"
    for module in ml_dtypes._ml_dtypes_ext jax; do
        for run in 1 2 3 4; do # the first reads the files from the disk
            seconds=$("$work/env/bin/python" "$work/seconds.py" "$module")
            [ "$run" = 1 ] || echo "$version $module $seconds"
        done
    done
done > "$work/seen"
"$work/env/bin/python" - "$work/seen" <<'PY'
import statistics
import sys

seen = {}
for line in open(sys.argv[1]):
    version, module, seconds = line.split()
    seen.setdefault((version, module), []).append(float(seconds))
median = {key: statistics.median(value) for key, value in seen.items()}
for (version, module), seconds in median.items():
    print(f"ml_dtypes {version}: import {module}: {1000 * seconds:.0f} ms of CPU, median of 3")
old, new = (median[version, "ml_dtypes._ml_dtypes_ext"] for version in ("0.6.0", "0.7.0"))
assert new > 20 * old, "the behaviour changed"
PY
