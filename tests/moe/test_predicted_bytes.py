"""Every byte that dispatchers count on real ranks is one that the simulator predicts from a recorded trace.

Left out on both sides: the counts that precede rows (`Traffic.control_bytes_to`), the agreement on a step, and what
coherent decode gathers behind the layers (keys and values).
"""

import numpy as np
import pytest
import torch
from test_parallel import DEMO, config_of

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.coherent import CoherentDispatcher
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, ParallelConfig
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.plan import Plan
from moe.placement.simulate import Workload, simulate
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes, WireFormat
from tests.distributed import spawn

PROMPTS = ["Once upon a time there was a", "The dog", "Lily and Tom went to the park to", "One day", "He said, I am"]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
NODES = Topology.uniform(2, 2)


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    with LLM(DEMO, config_of("1.0", None, "all_to_all")) as llm:
        recorder = llm.engine.record()
        llm.generate(PROMPTS, PARAMS)
        return recorder.trace()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.random(6, 16, 4, seed=3)


def serve(plan: str, dispatchers: list[str]) -> list[list[int]]:
    """One rank answers its share of the prompts by each dispatcher: the bytes that it counted, by destination."""
    counted = []
    with process_groups() as groups:
        for dispatcher in dispatchers:
            config = EngineConfig(
                dtype="float32",
                batch=BatchConfig(max_tokens=24, max_sequences=3, kv_tokens=512, prefix_sharing=False),
                parallel=ParallelConfig(plan=plan, dispatcher=dispatcher, broadcast_tokens=0),
            )
            with LLM(DEMO, config, groups=groups) as llm:
                llm.generate(PROMPTS[groups.rank :: groups.world_size], PARAMS)
                (traffic,) = llm.engine.traffic
                counted.append(traffic.bytes_to)
    return counted


def test_a_run_sends_the_bytes_that_were_predicted(trace, plan, tmp_path):
    """Prefill in chunks and decode, on two nodes of two ranks."""
    plan.save(tmp_path / "plan.json")
    ranks = spawn(4, serve, str(tmp_path / "plan.json"), ["all_to_all", "hierarchical"], ranks_per_node=2)
    for index, dispatcher in enumerate(("all_to_all", "hierarchical")):
        work = Workload(wire=WireFormat(dispatcher=dispatcher))
        predicted = simulate(trace, plan, NODES, work).link_bytes
        np.testing.assert_array_equal([counted[index] for counted in ranks], predicted)
        assert (predicted > 0).sum() >= 8


def replay(path: str, plan_path: str, width: int, combine: str) -> list[list[int]]:
    """One rank sends the trace's tokens through every layer by each dispatcher: the bytes counted, by destination.

    A row's first element is its token's number, so that whoever has the token knows its routing.
    """
    trace, plan = RoutingTrace.load(path), Plan.load(plan_path)
    rank_of = torch.from_numpy(plan.rank_of_physical())
    counted = []
    with process_groups() as groups:
        home = np.repeat(np.arange(trace.num_sequences) % groups.world_size, trace.sequence_lengths)
        for kind in (AllToAllDispatcher, HierarchicalDispatcher, CoherentDispatcher):
            dispatcher = kind(groups, rank_of, combine=combine)
            x = torch.zeros(int((home == groups.rank).sum()), width)
            x[:, 0] = torch.from_numpy(np.flatnonzero(home == groups.rank))
            for layer in range(trace.num_layers):
                token = x[:, 0].long().numpy()
                logical = trace.expert_ids[token, layer]
                physical = torch.from_numpy(np.where(logical >= 0, plan.log2phy[layer][logical, 0], -1))
                weights = torch.from_numpy(trace.weights[token, layer])
                moving = {"payload": x[:, :0]} if kind is CoherentDispatcher else {}
                sent = dispatcher.dispatch(x, physical, weights, **moving)
                back = dispatcher.combine(torch.zeros(*sent.local_ids.shape, width), sent.handle)
                x = back.x if kind is CoherentDispatcher else x
            counted.append(dispatcher.traffic.bytes_to)
    return counted


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_a_replay_sends_the_bytes_that_were_predicted(trace, plan, combine, tmp_path):
    """All dispatchers, coherent decode included, with tokens of no expert among them."""
    ids = trace.expert_ids.copy()
    ids[::7, 1, 1], ids[3::11, 2] = -1, -1
    trace = RoutingTrace(
        expert_ids=ids,
        weights=trace.weights,
        sequence_lengths=trace.sequence_lengths,
        num_experts=16,
        model="",
        sizes=ModelSizes(hidden_size=5, dtype="float32", expert_bytes=1),
    )
    files = tmp_path / "trace.npz", tmp_path / "plan.json"
    trace.save(files[0])
    plan.save(files[1])
    width = 5
    ranks = spawn(4, replay, *map(str, files), width, combine, ranks_per_node=2)
    with_weights = {"all_to_all": combine == "partial", "hierarchical": combine == "partial", "coherent": True}
    for index, (dispatcher, has_weights) in enumerate(with_weights.items()):
        work = Workload(wire=WireFormat(dispatcher=dispatcher, combine=combine), payload_bytes=0, steps="decode")
        assert work.wire.sends_weights == has_weights
        predicted = simulate(trace, plan, NODES, work).link_bytes
        np.testing.assert_array_equal([counted[index] for counted in ranks], predicted)
