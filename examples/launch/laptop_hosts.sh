#!/usr/bin/env bash
# Three hosts and a spare on one machine, each with a third of the demo model's experts: kill any of them and see the
# lines go on. From the root of the repository, with the extra [ray].
set -euo pipefail

python -m moe.launch.ray_cluster examples/tinymoe examples/batch.jsonl "${1:-out.jsonl}" --hosts 3 \
    --set threads=1 --set cluster.cpus_per_host=0.25 --set cluster.spares=1
