"""Windows of routing on a small model, for tests of the loop: uneven and even traffic, a plan with copies."""

import numpy as np

from moe.placement.loop_options import LoopOptions
from moe.placement.plan import Plan
from moe.placement.topology import Topology
from moe.placement.turn import Machine, Window
from moe.placement.wire_format import ModelSizes, WireFormat

LAYERS, EXPERTS, RANKS, TOP_K = 3, 16, 4, 3
SIZES = ModelSizes(hidden_size=64, dtype="bfloat16", expert_bytes=1000)
MACHINE = Machine(sizes=SIZES, wire=WireFormat(), topology=Topology.preset("h200x4"))
OPTIONS = LoopOptions(window=256, imbalance=1.25, calm=1.15, most_moved=0.25, bytes_per_step=4000)


def routing(tokens: int, hot: int, seed: int) -> Window:
    """Experts `hot`, `hot` + 1, ... are chosen most: contiguous ones, so that a contiguous plan is uneven."""
    rng = np.random.default_rng(seed)
    weight = np.roll(np.r_[np.full(4, 5.0), np.ones(EXPERTS - 4)], hot)
    keys = rng.exponential(size=(tokens, LAYERS, EXPERTS)) / weight
    return Window(np.argsort(keys, axis=2)[:, :, :TOP_K].astype(np.int16), rng.integers(0, RANKS, tokens))


def even(tokens: int, seed: int) -> Window:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
    return Window(ids.astype(np.int16), rng.integers(0, RANKS, tokens))


def replicated() -> Plan:
    """Contiguous, with a copy of expert e + 4 in a fifth place of each rank."""
    hosted = np.repeat(Plan.contiguous(LAYERS, EXPERTS, RANKS).hosted, 1, axis=0).copy()
    for rank in range(RANKS):
        hosted[:, (4 * rank + 4) % EXPERTS, rank] = True
    return Plan.from_hosted(hosted)
