"""The fused gate against its torch twin, and the twin against transformers' own routers."""

from types import SimpleNamespace

import pytest
import torch

from moe.kernels.gate import GateConfig, gate, gate_reference

SIGMOID_GROUPS = GateConfig(
    top_k=6, score="sigmoid", num_groups=8, topk_groups=4, group_score="top2", renormalize=True, eps=1e-20, scale=2.5
)
CASES = [  # experts, config, bias
    (8, GateConfig(top_k=2, renormalize=True), False),
    (60, GateConfig(top_k=4), False),  # not a power of two
    (40, GateConfig(top_k=6, num_groups=5, topk_groups=2, scale=16.0), False),
    (64, SIGMOID_GROUPS, True),
    (16, GateConfig(top_k=3), True),
    (32, GateConfig(top_k=4, score="softmax_topk"), False),
    (16, GateConfig(top_k=1, score="sigmoid"), False),
    (1, GateConfig(top_k=1), False),
]


@pytest.mark.parametrize(("num_experts", "config", "with_bias"), CASES)
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
def test_equals_reference(num_experts, config, with_bias, num_tokens):
    torch.manual_seed(num_experts)
    logits = torch.randn(num_tokens, num_experts)
    bias = 0.1 * torch.randn(num_experts) if with_bias else None
    got, want = gate(logits, config, bias), gate_reference(logits, config, bias)
    assert torch.equal(got.topk_ids, want.topk_ids)
    torch.testing.assert_close(got.topk_weights, want.topk_weights, rtol=1e-6, atol=1e-7)  # order of fp32 sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_and_low_precision_logits(dtype):
    logits = torch.randint(-2, 3, (63, 24)).to(dtype)  # nearly all scores are tied
    got, want = gate(logits, GateConfig(top_k=8)), gate_reference(logits, GateConfig(top_k=8))
    assert torch.equal(got.topk_ids, want.topk_ids)
    torch.testing.assert_close(got.topk_weights, want.topk_weights, rtol=1e-6, atol=1e-7)


def test_wide_logits_keep_their_order():
    logits = torch.arange(0, -1600, -100).float()[None]  # a softmax over all underflows from the second expert on
    assert gate(logits, GateConfig(top_k=4, score="softmax_topk")).topk_ids.tolist() == [[0, 1, 2, 3]]


def router_of(module, name, num_experts, top_k, **extra):
    """One of transformers' routers with random weights, its logits' input, and what it chose."""
    config = SimpleNamespace(
        num_experts_per_tok=top_k, num_local_experts=num_experts, num_experts=num_experts, hidden_size=16, **extra
    )
    router = getattr(module, name)(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(63, 16)
    with torch.no_grad():
        _, weights, ids = router(x)
    return router, x @ router.weight.detach().T, weights, ids


def assert_same_choice(weights, ids, got):
    order, got_order = ids.argsort(-1), got.topk_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order).int(), got.topk_ids.gather(1, got_order))
    torch.testing.assert_close(weights.gather(1, order), got.topk_weights.gather(1, got_order), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "name", "config"),
    [
        ("mixtral", "MixtralTopKRouter", GateConfig(top_k=2, renormalize=True)),
        ("olmoe", "OlmoeTopKRouter", GateConfig(top_k=4)),
        ("gpt_oss", "GptOssTopKRouter", GateConfig(top_k=4, score="softmax_topk")),
    ],
)
def test_reference_equals_transformers(family, name, config):
    from importlib import import_module

    module = import_module(f"transformers.models.{family}.modeling_{family}")
    _, logits, weights, ids = router_of(module, name, 16, config.top_k, norm_topk_prob=config.renormalize)
    assert_same_choice(weights, ids, gate_reference(logits, config))


def test_reference_equals_transformers_deepseek_v3():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    extra = {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": True}
    router, logits, _, _ = router_of(modeling_deepseek_v3, "DeepseekV3TopkRouter", 64, 6, **extra)
    router.e_score_correction_bias.normal_(std=0.1)
    x = torch.randn(63, 16)
    with torch.no_grad():
        logits, weights, ids = router(x)
    assert_same_choice(weights, ids, gate_reference(logits, SIGMOID_GROUPS, router.e_score_correction_bias))


@pytest.mark.parametrize(
    ("config", "experts", "message"),
    [
        (GateConfig(top_k=9), 8, r"top_k \(9\) must lie in \[1, 8\]"),
        (GateConfig(top_k=1, num_groups=3), 8, "8 experts do not form 3 equal groups"),
        (GateConfig(top_k=5, num_groups=2), 8, r"top_k \(5\) must lie in \[1, 4\]"),
    ],
)
def test_impossible_configs_are_refused(config, experts, message):
    with pytest.raises(ValueError, match=message):
        gate(torch.zeros(1, experts), config)
