#!/usr/bin/env bash
# Two people teach one model apart; their adapters become one. Usage: run.sh [MODEL [OUT]]
set -euo pipefail
cd "$(dirname "$0")/../.."
cl=${CL:-cl}
model=${1:-models/smollm2}
out=${2:-runs/combine-adapters}
here=examples/combine-adapters

for person in ana ben; do
    "$cl" train "$here/config.toml" --set "model=$model" --set "data.train=$here/$person.jsonl" --out "$out/$person"
done
adapters=("$out/ana/adapter" "$out/ben/adapter")

"$cl" adapter diff "${adapters[@]}"                                                  # do they touch the same directions?
"$cl" adapter combine "${adapters[@]}" --method linear --out "$out/sum"              # rank 16, nothing lost
"$cl" adapter combine "${adapters[@]}" --method ties --density 0.5 --rank 8 --out "$out/ties"
"$cl" adapter fold "$model" "${adapters[@]}" --out "$out/model"                      # a model that needs no adapter
"$cl" generate "$model" --adapter "$out/sum" --chat --max-new-tokens 24 \
    --prompt "Which wifi should I use?" --prompt "When is the release?"
