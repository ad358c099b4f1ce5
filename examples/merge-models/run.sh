#!/usr/bin/env bash
# Merges two models with a mergekit YAML file. Needs neither libtorch nor a GPU. Usage: run.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
cl_merge=${CL_MERGE:-cl-merge}       # `cl merge` is the same
out=${1:-runs/merge-models}
file=examples/merge-models/merge.yaml
models=crates/cl-merge/tests/fixtures/models

$cl_merge run "$file" --dry-run      # bytes read and written and memory, or all problems
$cl_merge run "$file" --out "$out"
$cl_merge verify "$out"
$cl_merge diff "$models/ft0" "$out" --base "$models/base"
