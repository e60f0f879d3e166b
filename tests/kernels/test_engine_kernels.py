"""The engine's layer kernels by Triton, alone and under the demo model."""

from pathlib import Path

import pytest
import torch
from kernels_experts import random_ids, random_weights, relative_error

from moe.kernels.reference import LEFT, combine_reference, experts_reference
from moe.kernels.triton_experts import GroupedExperts, SingleLaunch
from moe.layer.experts import ReferenceKernel

DEMO = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"


def test_layers_share_a_launch_and_equal_the_reference():
    launch = SingleLaunch(max_tokens=6)
    layers = [random_weights(5, 24, 20, seed=seed) for seed in (1, 2)]
    for weights in layers * 2:
        x, ids, topk_weights = torch.randn(5, 24), random_ids(5, 2, 5, skew="holes"), torch.rand(5, 2)
        want = combine_reference(experts_reference(x, ids, weights), topk_weights)
        for kernel in (GroupedExperts(weights), launch.layer(weights)):
            assert relative_error(kernel.combine(x, ids.long(), topk_weights), want) <= 1e-6
    launch.check()


def test_slab_much_larger_than_a_step():
    launch, weights = SingleLaunch(max_tokens=3), random_weights(40, 16, 16)
    fused = launch.layer(weights)
    for tokens in (3, 0, 1):
        x, ids, topk_weights = torch.randn(tokens, 16), random_ids(tokens, 2, 40), torch.rand(tokens, 2)
        want = combine_reference(experts_reference(x, ids, weights), topk_weights)
        assert relative_error(fused.combine(x, ids, topk_weights), want) <= 1e-6
    assert [shape.num_experts for shape in launch._made] == [6]


def test_out_y_is_filled():
    weights, ids, x = random_weights(3, 16, 16), random_ids(4, 2, 3), torch.randn(4, 16)
    out = torch.full((4, 2, 16), torch.nan)
    assert GroupedExperts(weights).experts(x, ids, out) is out
    assert relative_error(out, experts_reference(x, ids, weights)) <= 1e-6


def test_pairs_that_were_computed_before_stay():
    weights, ids, x = random_weights(4, 16, 16), random_ids(5, 3, 4, skew="holes"), torch.randn(5, 16)
    topk_weights, y = torch.rand(5, 3), experts_reference(x, ids, weights)
    later = torch.where(ids % 2 == 1, LEFT, ids)
    for kernel in (GroupedExperts(weights), SingleLaunch(max_tokens=5).layer(weights), ReferenceKernel(weights)):
        first = kernel.experts(x, torch.where(ids % 2 == 1, ids, -1))
        assert (
            relative_error(kernel.combine(x, later, topk_weights, first.clone()), combine_reference(y, topk_weights))
            <= 1e-6
        )
        assert relative_error(kernel.experts(x, later, first), y) <= 1e-6


def test_more_tokens_than_the_launch_holds_take_the_grouped_path():
    launch, weights = SingleLaunch(max_tokens=2), random_weights(3, 16, 16)
    x, ids, topk_weights = torch.randn(3, 16), random_ids(3, 2, 3), torch.rand(3, 2)
    fused = launch.layer(weights)
    want = combine_reference(experts_reference(x, ids, weights), topk_weights)
    assert relative_error(fused.combine(x, ids, topk_weights), want) <= 1e-6
    assert not launch._made


@pytest.mark.heavy
def test_demo_model_says_the_same_by_every_path():
    """Greedy tokens of the demo model: the CPU kernel, the grouped path, the single launch."""
    from moe.llm import LLM
    from moe.params import SamplingParams

    answers = {}
    for path in ("cpu", "grouped", "single"):
        with LLM(DEMO, experts_in_memory=1.0) as llm:
            experts = llm.engine.experts
            if path != "cpu":
                make = GroupedExperts if path == "grouped" else SingleLaunch(max_tokens=16).layer
                experts.kernels[:] = [make(kernel.weights) for kernel in experts.kernels]
            outputs = llm.generate(["The old", "A number"], SamplingParams(max_tokens=4, temperature=0.0))
            answers[path] = [output.outputs[0].token_ids for output in outputs]
    assert all(len(tokens) == 4 for tokens in answers["cpu"])
    assert answers["grouped"] == answers["cpu"]
    assert answers["single"] == answers["cpu"]
