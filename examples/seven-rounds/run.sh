#!/usr/bin/env bash
# Seven rounds with replay, and the matrix of what was learned and lost. Usage: run.sh [MODEL [OUT]]
# A run that was stopped goes on where it was when the same command is run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
cl=${CL:-cl}
model=${1:-models/smollm2}
out=${2:-runs/seven-rounds}
config=examples/seven-rounds/config.toml

resume=()
if [ -d "$out" ]; then resume=(--resume); fi
"$cl" check "$config" --set "model=$model"
"$cl" sequence "$config" --set "model=$model" --out "$out" ${resume[@]+"${resume[@]}"}
"$cl" table "LoRA-Rep=$out" --format markdown
