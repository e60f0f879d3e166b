"""Who computes a layer follows from what is resident; where all is, nothing in a layer waits for the host."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe.comm.membership import process_groups
from moe.layer.parallel import ExpertParallel
from moe.layer.runners import Resident
from moe.llm import LLM
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from tests.distributed import spawn
from tests.host_syncs import HostSyncs
from tests.moe.moe_cases import PROMPTS, TINYMOE, config, engine_says


def test_what_the_counter_finds():
    """Every way of waiting that this code had, and might have again."""
    ids = torch.tensor([[3, 1], [-1, 1]])
    ways = {
        "numpy": lambda: ids.numpy(force=True),
        "array": lambda: np.asarray(ids),
        "list": lambda: ids.tolist(),
        "number": lambda: int(ids.max()),
        "item": lambda: ids[0, 0].item(),
        "truth": lambda: bool((ids >= 0).all()),
        "copy": lambda: ids.cpu(),
        "size": lambda: (ids >= 0).nonzero(),
        "mask": lambda: ids[ids >= 0],
        "distinct": lambda: torch.unique(ids),
        "upload": lambda: torch.tensor([1, 2]),
    }
    for name, way in ways.items():
        with HostSyncs() as found:
            way()
        assert found.names, name
    with HostSyncs() as found:
        torch.zeros(4).index_select(0, ids[:, 1]).add_(ids.long().float().sum()).topk(2)
    assert found.names == []


class Counting:
    """In the place of a layer's compute: what it does to the host, by call."""

    def __init__(self, compute) -> None:
        self.compute, self.found = compute, []

    def __call__(self, *arguments):
        with HostSyncs() as syncs:
            y = self.compute(*arguments)
        self.found.append(syncs.names)
        return y


def counted_layers(llm) -> list[Counting]:
    layers = [llm.engine.model.get_submodule(site.module) for site in llm.engine.blueprint.index.sites]
    for module in layers:
        module.compute = Counting(module.compute)
    return [module.compute for module in layers]


@pytest.mark.parametrize("by_layers", [True, False])
def test_a_layer_whose_experts_are_there_never_waits_and_a_step_once(by_layers):
    """By compiled blocks, or all in one call: prompts, single tokens, several. A step hands over the chosen tokens, in
    one copy."""
    with LLM(TINYMOE, config("1.0")) as llm:
        engine = llm.engine
        assert isinstance(engine.experts.runner, Resident)
        layers, mode, per_step = counted_layers(llm) if by_layers else [], engine.place.mode, []
        forward, choose = mode.forward, mode.choose

        def out_of(syncs):
            return [n for n in syncs.names if n != "aten::lift_fresh"]  # the step's tokens and places go in

        def counted_forward(chunks):
            with HostSyncs() as syncs:
                logits = forward(chunks)
            per_step.append(out_of(syncs))
            return logits

        def counted_choose(chunks, logits):
            with HostSyncs() as syncs:
                choices = choose(chunks, logits)
            per_step[-1] += out_of(syncs)
            return choices

        mode.forward, mode.choose = counted_forward, counted_choose
        said = engine_says(llm, PROMPTS)
        assert all(len(layer.found) == len(per_step) > 8 for layer in layers)
        assert {name for layer in layers for found in layer.found for name in found} == set()
        assert {tuple(names) for names in per_step} == {("torch.Tensor.tolist",)}
        hits, waves = [s.hits for s in engine.layer_stats()], [s.waves for s in engine.layer_stats()]
        assert min(hits) > 0
        assert waves == [len(per_step)] * len(hits)
        assert sum(s.misses for s in engine.layer_stats()) == 0
    with LLM(TINYMOE, config("1.0", kernel="reference")) as llm:  # by modules; its kernel is the twin, which asks
        assert engine_says(llm, PROMPTS).tokens == said.tokens
        assert [s.hits for s in llm.engine.layer_stats()] == hits


def test_with_fewer_slots_every_layer_asks():
    with LLM(TINYMOE, config("0.9")) as llm:
        assert llm.engine.experts.runner is llm.engine.experts.waves
        layers = counted_layers(llm)
        engine_says(llm, PROMPTS[:1])
        assert all("torch.Tensor.numpy" in found for layer in layers for found in layer.found)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_runners_change_when_all_have_come_and_back(kernel):
    """Bit for bit the same logits by waves, by waves that find everything, and without them."""
    with LLM(TINYMOE, config("0.5", kernel=kernel, prefix_sharing=False)) as llm:
        experts = llm.engine.experts
        cache = experts.cache
        right = engine_says(llm, PROMPTS)
        experts.settle()
        assert experts.runner is experts.waves
        cache.limit.raise_to(96)
        cache.preload()
        kinds = []
        for _ in range(2):
            said = engine_says(llm, PROMPTS)
            assert all(torch.equal(a, b) for a, b in zip(said.logits, right.logits, strict=True))
            kinds.append(type(experts.runner))
        assert kinds == [Resident] * 2  # the first forward found them all
        hits = sum(s.hits for s in cache.stats)
        cache.unpin()
        experts.runner = experts.waves
        said = engine_says(llm, PROMPTS)
        assert all(torch.equal(a, b) for a, b in zip(said.logits, right.logits, strict=True))
        assert sum(s.hits for s in cache.stats) > hits


def read_tables() -> None:
    """All but the layers in which an expert has copies: those choose on the host, as the twin says."""
    hosted = Plan.random(3, 5, 2, seed=1).hosted.copy()
    hosted[1, :2] = True
    plan, ids = Plan.from_hosted(hosted), torch.tensor([[4, 0], [-1, 3], [1, 2]])
    with process_groups() as groups:
        ranks = ExpertParallel(groups, plan)
        for layer in range(3):
            with HostSyncs() as found:
                physical = ranks.physical(layer, ids)
            assert (found.names == []) == (layer != 1)
            expected = choose_replicas(ids.numpy(), groups.rank, ServingTable.of(plan, layer), home_first=True)
            np.testing.assert_array_equal(physical, expected)
            local = torch.tensor([[*range(plan.physical_per_rank), -1]])
            with HostSyncs() as found:
                logical = ranks.logical_here(layer, local)
            assert found.names == []
            assert sorted({*logical[0].tolist()} - {-1}) == ranks.hosted[layer]
            assert int(logical[0, -1]) == -1


def test_a_ranks_tables_are_read_without_waiting():
    spawn(2, read_tables)


class OneRank:
    """What a `SlotExperts` asks of the ranks, by a plan that may change."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.rank = rank
        self.use(plan)

    def use(self, plan: Plan) -> None:
        self.plan = plan
        self.hosted = [layer[:, self.rank].nonzero()[0].tolist() for layer in plan.hosted]


def test_a_plan_that_changes_lets_experts_go_and_brings_others():
    """A rank with as many slots as experts: those of the new plan come by waves, and stay once all are there."""
    with LLM(TINYMOE, replace(config("48"), kernel="cpu")) as llm:
        experts, cache = llm.engine.experts, llm.engine.experts.cache
        ranks = OneRank(Plan.contiguous(6, 16, 2), 0)
        cache.preload(ranks.hosted)
        experts.use_ranks(ranks)
        assert isinstance(experts.runner, Resident)
        x = torch.randn(3, llm.engine.blueprint.index.sites[0].hidden_size)
        ids = torch.tensor([[0, 7], [3, -1], [5, 5]])
        before = [experts.pairs(layer, x, ids) for layer in range(6)]
        ranks.use(Plan.round_robin(6, 16, 2))
        even = torch.arange(0, 16, 2)
        found = experts.pairs(0, x, even[ids])
        assert experts.runner is experts.waves
        cache.check()
        for layer in range(6):
            experts.pairs(layer, torch.cat([x, x])[:4], even.view(4, 2))
        for layer in range(6):
            again = experts.pairs(layer, x, even[ids])
            cache.check()
            if layer == 0:
                assert torch.equal(again, found)
        assert isinstance(experts.runner, Resident)
        ranks.use(Plan.contiguous(6, 16, 2))
        assert all(torch.equal(experts.pairs(layer, x, ids), y) for layer, y in enumerate(before))
