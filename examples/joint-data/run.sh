#!/usr/bin/env bash
# Trains jointly on three data sets, and lists the rows that were used. Usage: run.sh [MODEL [OUT]]
set -euo pipefail
cd "$(dirname "$0")/../.."
cl=${CL:-cl}
model=${1:-models/smollm2}
out=${2:-runs/joint-data}
here=examples/joint-data

"$cl" check "$here/config.toml" --set "model=$model"    # rows per epoch by data set
"$cl" train "$here/config.toml" --set "model=$model" --out "$out"
"$cl" data rows "$out" > "$out.rows.jsonl"              # every row of the run, in order
"$cl" generate "$model" --adapter "$out/adapter" --prompt "The capital of Merin is" --max-new-tokens 8
