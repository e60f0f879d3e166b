"""Published figures of GPUs, in the form that a probe gives: for plans where there is none to measure.

Experts and dense layers in bfloat16: vLLM 0.24.0's Triton kernel for Mixtral-8x7B on one H200 with balanced routing
(ai-dynamo/aiconfigurator, NVIDIA, Apache-2.0, commit 095f58a51c4c; bench/data/h200_fused_moe.csv), by weight that is
read and row. Its table for Qwen3-30B-A3B, whose experts are 37 times smaller, tells what a layer costs beside weights.
Memory and links: NVIDIA's data sheet, and topology.py.
"""

from collections.abc import Sequence

from moe.placement.machine import Attention, Machine, Overhead, Rate, Reads, Work
from moe.placement.topology import H200_NVLINK, NVME, PCIE5_HOST, Link

HOST, DISK = "host memory", "disk"
MIXTRAL = 8, 2, 3 * 4096 * 14336  # experts, top-k, weights of one
QWEN3 = 128, 8, 3 * 2048 * 768
# Tokens, microseconds of a layer's experts.
MIXTRAL_US = ((1, 211.6), (8, 657.1), (32, 688.9), (128, 687.8), (512, 798.3), (2048, 2100.5), (16384, 17372.6))
QWEN3_US = ((1, 40.3),)
_WORK: tuple[Work, ...] = ("expert", "dense")
_MEMORY = {"h200": 141e9}  # bytes
_BANDWIDTH = {"h200": 4.8e12}


def gpus_of(text: str) -> tuple[int, str]:
    """`h200`, `4xh200`. Raises ValueError for a kind without figures."""
    number, _, kind = text.rpartition("x") if "x" in text else ("1", "", text)
    if kind not in _MEMORY or not number.isdigit() or int(number) < 1:
        raise ValueError(f"--gpus ({text}) must be a number and a kind with published figures, such as 4xh200")
    return int(number), kind


def memory_of(kind: str) -> float:
    return _MEMORY[kind]


def machine_link(kind: str) -> Link:
    """Between GPUs of one node."""
    return {"h200": H200_NVLINK}[kind]


def rates_of(table: Sequence[tuple[int, float]], shape: tuple[int, int, int]) -> list[tuple[float, float]]:
    """(rows of an expert, seconds of a weight) where routing is balanced: experts fill one after another."""
    experts, top_k, weights = shape
    found = []
    for tokens, microseconds in table:
        distinct = min(experts, tokens * top_k)
        found.append((tokens * top_k / distinct, microseconds * 1e-6 / (distinct * weights)))
    return found


def published(kind: str) -> Machine:
    """What is known of one GPU; overhead beside a layer's launch is not."""
    by_rows = rates_of(MIXTRAL_US, MIXTRAL)
    ((_, each),) = rates_of(QWEN3_US, QWEN3)
    launch = (each - by_rows[0][1]) * QWEN3[1] * QWEN3[2]
    work = [Rate(w, "bfloat16", 1, round(rows), s) for w in _WORK for rows, s in by_rows]
    reads = {HOST: PCIE5_HOST, DISK: NVME}
    return Machine(
        name={"h200": "NVIDIA H200"}[kind],
        when="published",
        cores=1 << 10,
        memory={1: _BANDWIDTH[kind]},
        rates=tuple(work),
        attention=Attention(_BANDWIDTH[kind], 1 / by_rows[-1][1] * by_rows[-1][0]),
        overhead=Overhead(0.0, 0.0, launch, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        copy_bytes_per_s=_BANDWIDTH[kind] / 2,
        disks={name: (Reads("direct", 1 << 24, 1, link.bandwidth),) for name, link in reads.items()},
    )
