#!/bin/bash
# What a GPU is asked for, in one call: a report of Mistral-7B's shape, and the deep recipe beside
# its vanilla twin on all the text that is given.
#
#     tools/gpu.sh OUT TEXT_FOLDER...
#     tools/gpu.sh --dry-run OUT TEXT_FOLDER...     # everything at a small size, on any CPU
#
# Needs a Python environment with this package and MLX for the GPU (pip install . 'mlx[cuda]').
# OUT gets device.txt, report.md, report.json, training.md, depth.png, runs/ and converted-*.json.
# A second call goes on where the first was stopped. training.md is of what is finished by then.
#
# SECONDS_FOR_REPORT (480) and SECONDS_FOR_TRAINING (540) bound the two parts. JOBS (2) trainings run
# at a time. TABLE (recipes/large.yaml) is the networks, as tools/ladder.py reads them; what stands
# first in it is trained first.
set -euo pipefail

dry=
if [ "${1-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -lt 2 ]; then sed -n '2,/^set/{/^#/s/^# \?//p}' "$0"; exit 2; fi
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

if [ -n "$dry" ]; then
  shape=$repository/docs/shape.json report_seconds=${SECONDS_FOR_REPORT:-60}
  training_seconds=${SECONDS_FOR_TRAINING:-600} dtype=float32
  export MLX_DISABLE_COMPILE=1  # a CPU's kernels take a second each to compile
else
  shape=Mistral-7B-v0.3 report_seconds=${SECONDS_FOR_REPORT:-480}
  training_seconds=${SECONDS_FOR_TRAINING:-540} dtype=bfloat16
fi

# MLX compiles CUDA kernels as it meets them. Training meets many shapes; what is compiled is kept.
export MLX_PTX_CACHE_DIR=$out/kernels MLX_CUDA_GRAPH_CACHE_SIZE=3000
export MLX_ENABLE_CACHE_THRASHING_CHECK=0 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
mkdir -p "$MLX_PTX_CACHE_DIR"

describe() {
  { nvidia-smi -L 2>/dev/null || true
    python -c 'import mlx.core as mx; print(mx.default_device(), mx.device_info())'
    python -m pip list 2>/dev/null | grep -iE '^(mlx|mlx-lm|mlx-cuda.*|numpy|transformers) ' || true
    git -C "$repository" log -1 --format='commit %h of %cd' 2>/dev/null || true
  } | tee "$out/device.txt"
}

report() {
  [ -f "$out/report.json" ] && return
  python - "$shape" "$report_seconds" "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

from mlx_skipless import convert
from mlx_skipless.cli.report_tables import write_report
from mlx_skipless.evaluation.device_report import report_device

shape, seconds, out = sys.argv[1:]


def tell(stage, done, total):
    print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)


found = report_device(convert, shape=shape, seconds=float(seconds), progress=tell)
(Path(out) / "report.md").write_text(write_report(found), encoding="utf-8")
(Path(out) / "report.json").write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
PYTHON
  cat "$out/report.md"
}

# The table of networks, small for a dry run.
write_table() {
  if [ -z "$dry" ]; then cp "${TABLE:-$repository/recipes/large.yaml}" "$out/table.yaml"; return; fi
  python - "${TABLE:-$repository/recipes/large.yaml}" "$out/table.yaml" <<'PYTHON'
import sys

import yaml

source, target = sys.argv[1:]
table = yaml.safe_load(open(source, encoding="utf-8"))
table["base"] |= {
    "hidden_size": 64, "intermediate_size": 96, "heads": 4, "kv_heads": 2, "vocab_size": 300,
    "context": 32, "batch_size": 2, "steps": 4, "warmup": 1,
}
table["depths"], table["rates"] = {2: {}}, table["rates"][:1]
for network in table["networks"].values():
    network.update({"rates": network["rates"][:1]} if "rates" in network else {})
yaml.safe_dump(table, open(target, "w", encoding="utf-8"), sort_keys=False)
PYTHON
}

# Goes on with what is not finished, and makes the tables of what is.
train() {
  local texts
  mapfile -t texts < <(find -L "$@" -type f \( -name '*.txt' -o -name '*.jsonl' \) | sort)
  if [ ${#texts[@]} -eq 0 ]; then echo "no .txt or .jsonl in $*" >&2; return 1; fi
  write_table
  python "$repository/tools/ladder.py" "$out/table.yaml" --data "${texts[@]}" \
    --output "$out/runs" --jobs "${JOBS:-2}" --dtype "$dtype" --seconds "$training_seconds" \
    --figure "$out/depth.png" | tee "$out/training.md"
}

# Q and P out of each skipless network that has them.
convert() {
  local run name
  for run in "$out"/runs/three_skips-*/; do
    run=${run%/} name=$(basename "$run")
    if [ ! -f "$run.json" ] || [ -f "$out/converted-$name.json" ]; then continue; fi
    python -m mlx_skipless.cli convert --model "$run" --mlx-path "$out/runs/removed-$name" \
      --remove qp --dtype float32 --json "$out/converted-$name.json"
  done
}

describe
report
train "$@"
convert
