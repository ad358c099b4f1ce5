#!/usr/bin/env bash
# Trains seven rounds with replay, and prints the score table. Usage: run.sh [MODEL [OUT]]
# Running the same command again continues an interrupted run.
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
