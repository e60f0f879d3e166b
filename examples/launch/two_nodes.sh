#!/usr/bin/env bash
# The same command on both machines; the first one's address goes into HEAD, its number (0 or 1) into NODE.
#   HEAD=10.0.0.1 NODE=0 examples/launch/two_nodes.sh MODEL in.jsonl out.jsonl --plan plan.json
# The model folder and in.jsonl must be readable on both; out.jsonl is written where NODE is 0.
set -euo pipefail
exec torchrun --nnodes 2 --node-rank "${NODE:?0 or 1}" --master-addr "${HEAD:?address of node 0}" \
  --master-port "${PORT:-29500}" --nproc-per-node "${RANKS:-4}" \
  -m moe.launch.torchrun "$@" --set parallel.dispatcher=hierarchical
