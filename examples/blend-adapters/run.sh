#!/usr/bin/env bash
# Builds a mixture of two adapters. Run combine-adapters/run.sh first. Usage: run.sh [MODEL [OUT [ADAPTERS]]]
set -euo pipefail
cd "$(dirname "$0")/../.."
cl=${CL:-cl}
model=${1:-models/smollm2}
out=${2:-runs/blend-adapters}
adapters=${3:-runs/combine-adapters}
file=examples/blend-adapters/blend.toml

mkdir -p "$out"
sed "s|models/smollm2|$model|; s|runs/combine-adapters|$adapters|" "$file" > "$out/blend.toml"
"$cl" moe blend "$out/blend.toml" --dry-run
"$cl" moe blend "$out/blend.toml" --out "$out/mixture"
"$cl" generate "$model" --adapter "$out/mixture" --chat --max-new-tokens 24 \
    --prompt "Which wifi should I use?" --prompt "When is the release?"
