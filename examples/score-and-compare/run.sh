#!/usr/bin/env bash
# Evaluates new and old knowledge before and after a round, and compares the two runs.
# Usage: run.sh [MODEL [OUT]]
set -euo pipefail
cd "$(dirname "$0")/../.."
cl=${CL:-cl}
model=${1:-models/smollm2}
out=${2:-runs/score-and-compare}
here=examples/score-and-compare
tasks=$here/bakery.toml,examples/seven-rounds/data/old.jsonl    # new, old

"$cl" train "$here/config.toml" --set "model=$model" --out "$out/train"
"$cl" eval "$model" --tasks "$tasks" --data "$here" --out "$out/before"
"$cl" eval "$model" --adapter "$out/train/adapter" --tasks "$tasks" --data "$here" --out "$out/after"
"$cl" eval compare "$out/before" "$out/after"                   # document by document: intervals, McNemar's test
"$cl" score "$out/after" --json > "$out/scores.json"            # recomputed from the predictions, without the model
