#!/usr/bin/env bash
# Three hosts and a spare on one machine, each with a third of the demo model's experts, and 600 lines for them. Kill any
# of them meanwhile (kill -9 one of `pgrep -f ray::Host`) and see the lines go on; kill this command, and the same command
# goes on with the lines that are missing. From the root of the repository, with the extra [ray].
set -euo pipefail

out="${1:-out.jsonl}"
test -e "$out.in" || for number in $(seq 50); do
    sed "s/\"custom_id\": \"/&$number-/" examples/batch.jsonl
done > "$out.in"
python -m moe.launch.ray_cluster examples/tinymoe "$out.in" "$out" --hosts 3 \
    --set threads=1 --set cluster.cpus_per_host=0.25 --set cluster.spares=1
