"""What reading ahead can win on a model, before anyone turns it on: recorded routing in virtual time, by slots."""

from typing import Any, NamedTuple

import numpy as np

from moe.config import EngineConfig
from moe.engine.known import probed
from moe.offload.policy import Access, Belady, Lfu
from moe.offload.predictor import Transitions
from moe.offload.virtual_time import Costs, Guess, replay
from moe.placement.machine import Machine
from moe.placement.trace import RoutingTrace

SHARES = (0.5, 0.25, 0.125)
LEARNED = 1280  # tokens that the predictor may have seen before the replayed ones: a run has more in a minute
TOKENS = 320  # replayed, one after another; the first half warms the slots
WORTH = 0.05  # of the speed: less is nothing to win


class Gain(NamedTuple):
    """At `slots` slots for all layers. misses: of a token, on demand; found: share of them that transitions foretell.

    stall: share of the time that waits for reads, on demand. transition, known, belady: speed over on demand, reading
    ahead by what the run shows, by the next layer itself, and with the best evictions alone.
    """

    slots: int
    misses: float
    found: float
    stall: float
    transition: float
    known: float
    belady: float

    def __str__(self) -> str:
        if self.known < 1 + WORTH:
            return "nothing to win"
        return f"{(self.transition - 1) / (self.known - 1):.0%} of {self.known - 1:.0%}"


def costs_of(trace: RoutingTrace, machine: Machine | None) -> Costs | None:
    """By what `moe probe` found of this machine's slowest disk and one thread; None where it, or the sizes, are not
    known. A layer's own work: four dense matrices of [H, H], one sequence."""
    if trace.sizes is None or machine is None or machine.overhead is None or not machine.disks:
        return None
    sizes = trace.sizes
    rates = [machine.read_bytes_per_s(disk, "direct", sizes.expert_bytes, 1) for disk in machine.disks]
    known = {r.format for r in machine.rates if r.work == "expert"} & {
        r.format for r in machine.rates if r.work == "dense"
    }
    if sizes.dtype not in known or not all(rates):
        return None
    weight, dense = (machine.seconds_per_weight(work, sizes.dtype, 1, 1) for work in ("expert", "dense"))
    itemsize = 4 if sizes.dtype == "float32" else 2
    layer = machine.overhead.layer + machine.overhead.apart + 4 * sizes.hidden_size**2 * dense
    read = sizes.expert_bytes / min(rate for rate in rates if rate)
    return Costs(read, layer, sizes.expert_bytes / itemsize * weight)


def even_costs(top_k: int) -> Costs:
    """Where nothing is known: an expert is read in the time of a layer, half its experts'; guesses are free."""
    return Costs(1.0, 0.5, 0.5 / top_k)


def gains(trace: RoutingTrace, costs: Costs) -> list[Gain]:
    """One for each of SHARES of all experts in slots that a layer's fit. Some seconds for a trace of 26 layers."""
    ids = trace.expert_ids[: LEARNED + TOKENS].astype(np.int64)
    num_before = max(0, len(ids) - TOKENS)
    num_tokens, num_layers, top_k = ids[num_before:].shape
    num_experts = [trace.num_experts] * num_layers
    first = np.arange(num_layers) * trace.num_experts
    predictor = Transitions(num_experts, top_k)
    nothing = Guess.joined([])
    accesses: list[Access] = []
    said: list[Guess] = []
    for now, token in enumerate(ids):
        for layer, chosen in enumerate(token):
            expected = predictor.expected(layer, chosen[None])
            if now < num_before:
                continue
            accesses.append(Access(layer, np.sort(chosen[chosen >= 0]) + first[layer]))
            said.append(nothing if expected is None else Guess.of(expected, first[layer + 1]))
    truth = [Guess.sure(then.keys) if then.layer else nothing for then in accesses[1:]] + [nothing]
    warm = num_tokens // 2 * num_layers
    found = []
    for share in SHARES:
        num_slots = int(share * sum(num_experts))
        if num_slots < top_k or num_tokens < 2:
            continue
        plain = replay(accesses, None, Lfu(num_experts), num_slots, costs, warm=warm)
        ahead, known = (replay(accesses, g, Lfu(num_experts), num_slots, costs, warm=warm) for g in (said, truth))
        best = replay(accesses, None, Belady(sum(num_experts), accesses), num_slots, costs, warm=warm)
        if not plain.misses:
            continue
        foretold = (ahead.useful + ahead.late) / max(1, known.useful + known.late)
        speeds = (plain.seconds / other.seconds for other in (ahead, known, best))
        found.append(
            Gain(
                num_slots, plain.misses / (num_tokens - num_tokens // 2), foretold, plain.stall / plain.seconds, *speeds
            )
        )
    return found


GAINS = (
    "slots",
    "misses a token",
    "foretold",
    "stall share",
    "stall x foretold",
    "x transitions",
    "x next known",
    "x Belady",
    "transitions win",
)
GAINS_TOLD = (
    "slots: of all layers together; foretold: share of the misses that recorded transitions name before their layer "
    "comes; stall share: of the time that waits for reads, without reading ahead; x: speed over that, reading ahead by "
    "transitions, by the next layer's experts themselves, and with Belady's evictions alone; the last column: how much "
    "of what the next layer's experts would win transitions do."
)


def rows_of_gains(trace: RoutingTrace) -> tuple[list[tuple[Any, ...]], str]:
    """A row for each share of slots, in the order of `GAINS`, and what their costs and a short trace are."""
    costs = costs_of(trace, probed(EngineConfig()))
    basis = "nothing probed: reads as slow as layers"
    if costs is not None:
        layer = costs.layer + trace.top_k * costs.expert
        basis = f"reads of {1e3 * costs.read:.2g} ms, layers of {1e3 * layer:.2g} ms"
    if trace.num_tokens < LEARNED + TOKENS:
        basis += f"; {trace.num_tokens} tokens recorded, fewer than the {LEARNED + TOKENS} that transitions learn from"
    found = gains(trace, costs or even_costs(trace.top_k))
    return [
        (g.slots, g.misses, g.found, g.stall, g.stall * g.found, g.transition, g.known, g.belady, str(g)) for g in found
    ], basis
