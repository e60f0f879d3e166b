#!/usr/bin/env bash
# One machine, one rank per GPU (or per few cores): each rank keeps a quarter of its share of the experts in memory.
#   examples/launch/one_node.sh MODEL in.jsonl out.jsonl [more settings]
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${RANKS:-4}" -m moe.launch.torchrun "$@" --experts-in-memory "${BUDGET:-0.25}"
