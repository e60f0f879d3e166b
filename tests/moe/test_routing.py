"""What stands between routers and experts: stages change routing in their order, observers see what experts get."""

import pytest
import torch

from moe.layer.routing import Routing, RoutingLog, RoutingSeam
from moe.llm import LLM
from tests.moe.moe_cases import PROMPTS, TINYMOE, config, engine_says


class Shift:
    """Every expert becomes the one `by` further on."""

    def __init__(self, by: int, num_experts: int = 16) -> None:
        self.by, self.num_experts = by, num_experts

    def route(self, x, routing):
        return routing._replace(topk_ids=(routing.topk_ids + self.by) % self.num_experts)


def test_stages_in_order_then_observers():
    seam, log = RoutingSeam(), RoutingLog(2)
    seam.observers.append(log)
    seam.stages += [Shift(3), Shift(5, 7)]
    ids, weights = torch.tensor([[0, 15], [6, 1]]), torch.rand(2, 2)
    said = seam.through(torch.zeros(2, 4), Routing(1, ids, weights))
    expected = [[((i + 3) % 16 + 5) % 7 for i in row] for row in ids.tolist()]
    assert said.topk_ids.tolist() == expected
    first, second = log.take()
    assert first is None
    assert second.topk_ids.tolist() == expected
    assert torch.equal(torch.from_numpy(second.topk_weights), weights)
    assert log.take() == [None, None]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_experts_follow_the_stages(kernel):
    """A stage and its inverse change nothing; a stage alone changes what the model says, by blocks and by modules."""
    with LLM(TINYMOE, config("0.5", kernel=kernel)) as llm:
        right = engine_says(llm, PROMPTS[:2]).tokens
        seam = llm.engine.experts.routing
        seam.stages += [Shift(3), Shift(13)]
        assert engine_says(llm, PROMPTS[:2]).tokens == right
        del seam.stages[0]
        assert engine_says(llm, PROMPTS[:2]).tokens != right
