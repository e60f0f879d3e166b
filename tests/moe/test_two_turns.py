"""Experts in two turns say what they say in one, bit for bit: by runner, slots, dispatcher and world size."""

import numpy as np
import pytest
import torch
from test_parallel import config_of

from moe.comm.membership import process_groups
from moe.config import ParallelConfig
from moe.layer.home_first import LATER_BYTES, HomeFirst
from moe.layer.runners import Resident
from moe.llm import LLM
from tests.distributed import spawn
from tests.moe.moe_cases import TINYMOE, config


@pytest.mark.parametrize("num_first", [0, 1, 4, 7])
def test_turns_are_the_distinct_experts(num_first):
    asked = np.array([[3, 0], [-1, 5], [3, -1], [2, 2], [0, 9], [-1, -1], [9, 1]])
    first, later = HomeFirst(num_first, 1).turns(asked)
    assert {*first} == {*asked[:num_first].ravel()} - {-1}
    assert {*later} == {*asked[num_first:].ravel()} - {-1} - {*first}
    assert HomeFirst(0, 1).turns(asked[:0])[0].size == 0


class Counted:
    """A layer's kernel, and the calls of `experts`."""

    def __init__(self, kernel) -> None:
        self.kernel, self.num_calls = kernel, 0

    def experts(self, *arguments):
        self.num_calls += 1
        return self.kernel.experts(*arguments)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("budget", ["1.0", "40", "1 expert"])
def test_two_turns_are_one(kernel, budget):
    with LLM(TINYMOE, config(budget, kernel=kernel)) as llm:
        experts = llm.engine.experts
        assert isinstance(experts.runner, Resident) == (budget == "1.0")
        counted = [Counted(k) for k in experts.kernels]
        experts.kernels[:] = counted
        experts.runner.kernels = experts.waves.kernels = counted
        generator = torch.Generator().manual_seed(0)
        hidden, num_split = llm.engine.blueprint.index.sites[0].hidden_size, 0
        for rows in (0, 1, 5, 33):
            for layer, kernel_of in enumerate(counted):
                x = torch.randn(rows, hidden, generator=generator)
                ids = torch.rand(rows, 16, generator=generator).argsort(1)[:, :2]
                ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
                expected = experts.pairs(layer, x, ids)
                for num_first in {0, rows // 2, rows}:
                    for later_bytes in (1, LATER_BYTES):
                        before = kernel_of.num_calls
                        turns = experts.home_first(layer, x, ids, num_first, later_bytes)
                        y = next(turns)
                        assert torch.equal(y[:num_first], expected[:num_first])
                        at_home = kernel_of.num_calls - before
                        assert next(turns, None) is None
                        assert torch.equal(y, expected), (rows, layer, num_first, later_bytes)
                        num_split += at_home < kernel_of.num_calls - before
                        experts.cache.check()
        assert num_split > 0


def layers_of(folder, cases, seed):
    """Random rows through every layer of each case, with and without the second turn: the bits of both."""
    found = []
    with process_groups() as groups:
        for budget, dispatcher, combine in cases:
            parallel = ParallelConfig(dispatcher=dispatcher, combine=combine)
            with LLM(folder, config_with(budget, parallel), groups=groups) as llm:
                experts, ranks = llm.engine.experts, llm.engine.parallel
                assert (ranks.later_bytes < np.inf) == (groups.num_nodes > 1)
                generator = torch.Generator().manual_seed(seed + groups.rank)
                for rows in (0 if groups.rank else 3, 1, 17):
                    for layer in range(2):
                        x = torch.randn(rows, llm.engine.blueprint.index.sites[0].hidden_size, generator=generator)
                        ids = torch.rand(rows, 16, generator=generator).argsort(1)[:, :2]
                        weights = torch.rand(rows, 2, generator=generator)
                        both = []
                        for ranks.later_bytes in (np.inf, 1):
                            both.append(experts.compute(layer, x, ids, weights))
                        assert torch.equal(*both), (budget, dispatcher, combine, rows, layer)
                        found.append(((rows, layer), *(t.numpy() for t in (x, ids, weights, both[0])), combine))
                experts.cache.check()
    return found


def config_with(budget, parallel):
    base = config_of(budget, None, "all_to_all")
    return type(base)(dtype="float32", offload=base.offload, batch=base.batch, parallel=parallel)


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 2), (2, 1), (3, 1), (4, 2)])
def test_ranks_say_the_same_in_one_turn_and_in_two_and_what_one_process_says(world_size, ranks_per_node):
    cases = [
        (b, d, c) for b in ("1.0", "1 expert") for d in ("all_to_all", "hierarchical") for c in ("exact", "partial")
    ]
    answers = spawn(world_size, layers_of, str(TINYMOE), cases, 7, ranks_per_node=ranks_per_node)
    with LLM(TINYMOE, config("1.0")) as llm:
        for (rows, layer), *arrays, combine in (one for answer in answers for one in answer):
            x, ids, weights, out = map(torch.from_numpy, arrays)
            alone = llm.engine.experts.compute(layer, x, ids, weights)
            if combine == "exact":
                assert torch.equal(out, alone), (rows, layer)
            else:
                torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)  # K = 2 sums in another order
