#!/usr/bin/env bash
# Trains two adapters independently and combines them into one. Usage: run.sh [MODEL [OUT]]
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

"$cl" adapter diff "${adapters[@]}"                                                  # norms, cosine, overlap of subspaces
"$cl" adapter combine "${adapters[@]}" --method linear --out "$out/sum"              # exact, with rank 16
"$cl" adapter combine "${adapters[@]}" --method ties --density 0.5 --rank 8 --out "$out/ties"
"$cl" adapter fold "$model" "${adapters[@]}" --out "$out/model"                      # a model that needs no adapter
"$cl" generate "$model" --adapter "$out/sum" --chat --max-new-tokens 24 \
    --prompt "Which wifi should I use?" --prompt "When is the release?"
