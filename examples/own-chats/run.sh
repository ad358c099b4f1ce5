#!/usr/bin/env bash
# Fine-tunes a model on conversations and chats with it. Usage: run.sh [MODEL [OUT]]
set -euo pipefail
cd "$(dirname "$0")/../.."
cl=${CL:-cl}
model=${1:-models/smollm2}
out=${2:-runs/own-chats}
here=examples/own-chats

"$cl" data show "$here/chats.jsonl" --model "$model" --rows 2    # what the model will see
"$cl" check "$here/config.toml" --set "model=$model"             # what the run will do, and what may be wrong
"$cl" train "$here/config.toml" --set "model=$model" --out "$out"
printf '%s\n' "When do you open?" "And on Monday?" |
    "$cl" chat "$model" --adapter "$out/adapter" --max-new-tokens 40
