"""The specification against fp64 arithmetic written another way, and against transformers' own experts."""

import math

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe.kernels.reference import check_expert_weights, combine_reference, experts_reference
from moe.kernels.weights import Activation, ExpertWeights

H, I, S = 24, 20, 5


def relu3(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.relu(gate) * torch.tanh(up)


ACTIVATIONS = [
    *[Activation(kind=kind) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss")],
    *[Activation(kind=kind, gated=False) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")],
    Activation(kind="silu", interleaved=True),
    Activation(kind="gpt_oss", interleaved=True, alpha=1.5, limit=0.9),
    Activation(kind="custom", function=relu3),
]


def make_weights(activation, dtype=torch.float32, biased=False):
    g = torch.Generator().manual_seed(7)
    n = 2 * I if activation.gated else I

    def normal(*shape):
        return (torch.randn(*shape, generator=g) * 0.3).to(dtype)

    bias = (normal(S, n), normal(S, H)) if biased else (None, None)
    return ExpertWeights(normal(S, n, H), normal(S, H, I), *bias, activation)


def scalar_activation(gate, up, a):
    """One element in python floats."""
    match a.kind:
        case "silu":
            v = gate / (1 + math.exp(-gate))
        case "gelu":
            v = 0.5 * gate * (1 + math.erf(gate / math.sqrt(2)))
        case "gelu_tanh":
            v = 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        case "relu":
            v = max(gate, 0.0)
        case "relu2":
            v = max(gate, 0.0) ** 2
        case "gpt_oss":
            gate, up = min(gate, a.limit), max(-a.limit, min(up, a.limit))
            return (up + 1) * gate / (1 + math.exp(-a.alpha * gate))
        case "custom":
            return max(gate, 0.0) * math.tanh(up)
    return v * up if a.gated else v


def exact(x, slot_ids, w):
    """fp64, one (token, k) at a time; no rounding anywhere."""
    a, y = w.activation, torch.zeros(*slot_ids.shape, H, dtype=torch.float64)
    for t, k in torch.cartesian_prod(*map(torch.arange, slot_ids.shape)).tolist():
        s = int(slot_ids[t, k])
        if s < 0:
            continue
        g = w.gate_up[s].double() @ x[t].double()
        g = (g + w.gate_up_bias[s].double() if w.gate_up_bias is not None else g).tolist()
        if not a.gated:
            pairs = [(v, 0.0) for v in g]
        elif a.interleaved:
            pairs = list(zip(g[::2], g[1::2], strict=True))
        else:
            pairs = list(zip(g[:I], g[I:], strict=True))
        h = torch.tensor([scalar_activation(gate, up, a) for gate, up in pairs], dtype=torch.float64)
        y[t, k] = w.down[s].double() @ h + (w.down_bias[s].double() if w.down_bias is not None else 0)
    return y


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind}-{a.gated}-{a.interleaved}")
@pytest.mark.parametrize("biased", [False, True])
def test_experts_against_fp64(activation, biased):
    w = make_weights(activation, biased=biased)
    check_expert_weights(w)
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(1))
    slot_ids = torch.randint(-1, S, (7, 3), generator=torch.Generator().manual_seed(2))
    y = experts_reference(x, slot_ids, w)
    assert y.dtype == torch.float32
    assert torch.equal(y[slot_ids < 0], torch.zeros(int((slot_ids < 0).sum()), H))
    assert relative(y, exact(x, slot_ids, w)) < 1e-6  # fp32 sums of 24 terms


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])  # two roundings
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype, bound, storage):
    w = make_weights(Activation(), storage, biased=True)
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    slot_ids = torch.randint(0, S, (9, 2), generator=torch.Generator().manual_seed(2))
    y = experts_reference(x, slot_ids, w)
    assert 0 < relative(y, exact(x, slot_ids, w)) < bound


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (63, 8)])
def test_odd_sizes(tokens, top_k):
    w = make_weights(Activation())
    slot_ids = torch.randint(-1, S, (tokens, top_k), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    y = experts_reference(torch.randn(tokens, H), slot_ids, w)
    assert y.shape == (tokens, top_k, H)
    assert combine_reference(y, torch.rand(tokens, top_k)).shape == (tokens, H)


def test_combine_is_a_sum_in_order_of_k():
    y = torch.tensor([1e8, 1.0, -1e8, 1.0]).view(1, 4, 1)  # any other order gives another sum
    assert combine_reference(y, torch.ones(1, 4)).item() == 1.0
    assert combine_reference(y.flip(1), torch.ones(1, 4)).item() == 0.0
    y = torch.tensor([1.0, 2**-8, 2**-8]).view(1, 3, 1)  # a bf16 running sum would stay at 1
    assert combine_reference(y, torch.ones(1, 3), torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_against_transformers(architecture, dtype):
    if architecture == "mixtral":
        config = MixtralConfig(num_local_experts=S, hidden_size=H, intermediate_size=I)
        module, activation = MixtralExperts(config), Activation()
    else:
        config = GptOssConfig(num_local_experts=S, hidden_size=H, intermediate_size=I)
        module, activation = GptOssExperts(config), Activation(kind="gpt_oss", interleaved=True)
    config._experts_implementation = "eager"
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    module = module.to(dtype).requires_grad_(False)
    transposed = architecture == "gpt_oss"
    w = ExpertWeights(
        module.gate_up_proj.mT.contiguous() if transposed else module.gate_up_proj,
        module.down_proj.mT.contiguous() if transposed else module.down_proj,
        getattr(module, "gate_up_proj_bias", None),
        getattr(module, "down_proj_bias", None),
        activation,
    )
    x = torch.randn(31, H, generator=g).to(dtype)
    slot_ids = torch.stack([torch.randperm(S, generator=g)[:3] for _ in range(31)])
    topk_weights = torch.rand(31, 3, generator=g).to(dtype)
    ours = combine_reference(experts_reference(x, slot_ids, w), topk_weights, dtype)
    theirs = module(x, slot_ids, topk_weights)
    truth = (exact(x, slot_ids, w) * topk_weights.double()[..., None]).sum(1)
    assert ours.dtype == theirs.dtype == dtype
    assert relative(ours, theirs.double()) < (1e-6 if dtype == torch.float32 else 1e-2)
    if dtype == torch.bfloat16:
        assert relative(ours, truth) < relative(theirs, truth)  # fewer roundings


def test_errors_name_the_numbers():
    w = make_weights(Activation())
    x, ids = torch.randn(2, H), torch.zeros(2, 1, dtype=torch.int64)
    for bad, words in [
        ((x[:, 1:], ids, w), "hidden size 23"),
        ((x[:1], ids, w), "of one T"),
        ((x.double(), ids, w), "float64"),
        ((x, ids.to(torch.int16), w), "int16"),
        ((x, ids + S, w), "slot id 5"),
        ((x, ids - 2, w), "slot id -2"),
    ]:
        with pytest.raises(ValueError, match=words):
            experts_reference(*bad)
    for bad, words in [
        (w._replace(down=w.down[:, 1:]), "down has shape"),
        (w._replace(gate_up=w.gate_up[:, 1:]), "gate_up has shape"),
        (w._replace(down=w.down.bfloat16()), "bfloat16"),
        (w._replace(down=w.down.mT.contiguous().mT), "last stride"),
        (make_weights(Activation(kind="gpt_oss", gated=False)), "gated"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_expert_weights(bad)
