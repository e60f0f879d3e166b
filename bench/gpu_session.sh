#!/usr/bin/env bash
# Everything a GPU is needed for, in ten minutes, on any machine that has one: OUT=folder bash bench/gpu_session.sh
#
# From a plain checkout, with nothing installed but torch, triton and transformers. Every phase is a process with a
# time-out of its own; none ends the session. Rows grow in $OUT/rows.jsonl, one a measurement, and $OUT/phases.jsonl says
# how each phase ended. GPUS: cards of the phase `ranks`. BUDGET: seconds in all. PHASES: some of them. TINY=1: small layers, for TRITON_INTERPRET=1.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-out}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=. TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/triton_cache}
PYTHON=${PYTHON:-python3}
TINY=${TINY:+--tiny}
END=$((SECONDS + ${BUDGET:-570}))
WANTED=${PHASES:-machine compile correct decode kernels engine host copies ranks stress tune memcheck}

phase() { # name, seconds, command…
  local name=$1 limit=$2 left=$((END - SECONDS)) start=$SECONDS rc
  shift 2
  case " $WANTED " in *" $name "*) ;; *) return 0 ;; esac
  if [ "$left" -lt 10 ]; then
    echo "{\"phase\":\"$name\",\"skipped\":\"the budget is spent\"}" >>"$OUT/phases.jsonl"
    return 0
  fi
  if [ "$limit" -gt "$left" ] || [ -n "$TINY" ]; then limit=$left; fi
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  echo "{\"phase\":\"$name\",\"rc\":$rc,\"seconds\":$((SECONDS - start))}" | tee -a "$OUT/phases.jsonl"
  [ "$rc" -ne 0 ] && grep -v '^{"phase"' "$OUT/$name.log" | tail -n 6
  return 0
}

session="$PYTHON -m bench.gpu_session $TINY --gpus ${GPUS:-1} --out $OUT/rows.jsonl"
# shellcheck disable=SC2086
{
  phase machine 40 $session machine
  phase compile 110 $session compile
  phase correct 100 $session correct
  phase decode 40 $session decode
  phase kernels 130 $session kernels
  phase engine 180 $session engine
  phase host 40 $session host
  phase copies 40 $session copies
  phase ranks 60 $session ranks
  phase stress 50 $session stress
  phase tune 60 $session tune
  if command -v compute-sanitizer >/dev/null; then
    phase memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 $session --tiny correct
  fi
}
rm -rf "$OUT/triton_cache"
for log in "$OUT"/*.log; do
  [ -f "$log" ] || continue
  tail -c 20000 "$log" >"$log.end" && mv "$log.end" "$log"
done
touch "$OUT/rows.jsonl"
grep -h '"failed"' "$OUT/rows.jsonl" | head -n 20 | cut -c1-300
echo "$(wc -l <"$OUT/rows.jsonl") rows in $OUT/rows.jsonl"
