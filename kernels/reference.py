"""The specification of expert compute, in plain torch: every expert kernel is compared with this file.

Rounding points, the same for every kernel (`d` is the dtype of x, fp32 here means: no rounding there):

    gate_up = round_d(x · W1ᵀ + b1)        fp32 products and sums, storage widened exactly
    h       = round_d(act(gate) * up)      the whole activation in fp32, one rounding
    y       = h · W2ᵀ + b2                 kept in fp32
    out     = round_d(Σ_k w_k · y_k)       k = 0 … K-1 in this order, product and sum rounded to fp32 each

Weights in 8 bits are first multiplied by their scales in fp32 (`dequantized`); nothing else changes.
The first two roundings are where transformers' eager experts round too. They also round act(gate), y, w·y and every
partial sum; those only add error, so that a result here lies nearer to exact arithmetic than theirs (a test measures
it).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.weights import LOW_BIT_DTYPES, Activation, ExpertWeights, Scales

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def activation_reference(gate_up: Tensor, activation: Activation) -> Tensor:
    """The activation between the two projections. gate_up: [R, N]. Returns [R, I], fp32 unless `custom`."""
    if activation.function is not None:
        return activation.function(gate_up)
    gate_up = gate_up.float()
    if not activation.gated:
        return _nonlinearity(gate_up, activation)
    if activation.interleaved:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    if activation.kind == "gpt_oss":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * (gate * torch.sigmoid(activation.alpha * gate))
    return _nonlinearity(gate, activation) * up


def _nonlinearity(v: Tensor, activation: Activation) -> Tensor:
    match activation.kind:
        case "silu":
            return F.silu(v)
        case "gelu":
            return F.gelu(v)
        case "gelu_tanh":
            return F.gelu(v, approximate="tanh")
        case "relu":
            return F.relu(v)
        case "relu2":
            return F.relu(v).square()
        case kind:
            raise ValueError(f"activation {kind!r} exists only in its gated form; set gated=True")


def experts_reference(x: Tensor, slot_ids: Tensor, weights: ExpertWeights) -> Tensor:
    """y[t, k] = expert(slot_ids[t, k])(x[t]), the rows of slot_ids == -1 being 0.

    x: [T, H] fp32, bf16 or fp16; slot_ids: int [T, K], -1 = no expert; T may be 0. Returns y [T, K, H] in fp32.
    Loops over the slots in use; costs one host sync.
    """
    check_expert_input(x, slot_ids, weights)
    num_tokens, top_k = slot_ids.shape
    y = torch.zeros(num_tokens, top_k, weights.down.shape[1], dtype=torch.float32, device=x.device)
    used: list[int] = torch.unique(slot_ids).tolist()  # host sync
    for slot in used:
        if slot == -1:
            continue
        if not 0 <= slot < len(weights.gate_up):
            raise ValueError(f"slot id {slot} must be -1 or lie in [0, {len(weights.gate_up)}), the slots of the slab")
        token, k = torch.where(slot_ids == slot)
        y[token, k] = one_expert_reference(x[token], slot, weights)
    return y


def one_expert_reference(x: Tensor, slot: int, weights: ExpertWeights) -> Tensor:
    """One expert on the rows x [R, H]. Returns [R, H] in fp32."""
    first, second = dequantized(weights, slot)
    gate_up = F.linear(x.float(), first, _widened(weights.gate_up_bias, slot)).to(x.dtype)
    h = activation_reference(gate_up, weights.activation).to(x.dtype)
    return F.linear(h.float(), second, _widened(weights.down_bias, slot))


def dequantized(weights: ExpertWeights, slot: int) -> tuple[Tensor, Tensor]:
    """gate_up [N, H] and down [H, I] of one slot in fp32, multiplied by their scales where they have any."""
    first, second = weights.gate_up[slot].float(), weights.down[slot].float()
    if weights.scales is None:
        return first, second
    scales, act = weights.scales, weights.activation
    inter, hidden = second.shape[1], second.shape[0]
    halves = [spread_scales(scale, (inter, hidden), scales.block) for scale in scales.gate_up[slot]]
    spread = torch.stack(halves, 1).flatten(0, 1) if act.interleaved and act.gated else torch.cat(halves)
    return first * spread, second * spread_scales(scales.down[slot], (hidden, inter), scales.block)


def spread_scales(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """One scale per weight: scale [ceil(n / rows), ceil(k / columns)] as [n, k] for block (rows, columns)."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scale.float()[rows.to(scale.device)][:, columns.to(scale.device)]


def _widened(bias: Tensor | None, slot: int) -> Tensor | None:
    return None if bias is None else bias[slot].float()


def combine_reference(y: Tensor, topk_weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """out[t] = Σ_k topk_weights[t, k] · y[t, k], k ascending, in fp32, rounded once to `dtype` (None: that of y).

    y: [T, K, H]; topk_weights: [T, K], any float dtype. Returns [T, H].
    """
    if y.shape[:2] != topk_weights.shape:
        raise ValueError(f"topk_weights has shape {tuple(topk_weights.shape)}, y needs {tuple(y.shape[:2])}")
    out = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
    for k in range(y.shape[1]):
        out = out + topk_weights[:, k, None].float() * y[:, k].float()
    return out.to(dtype or y.dtype)


def check_expert_input(x: Tensor, slot_ids: Tensor, weights: ExpertWeights) -> None:
    """Raises ValueError when shapes or dtypes do not fit together (slot numbers are checked where they are read)."""
    if x.ndim != 2 or slot_ids.ndim != 2 or len(x) != len(slot_ids):
        raise ValueError(f"x {tuple(x.shape)} and slot_ids {tuple(slot_ids.shape)} must be [T, H] and [T, K] of one T")
    if x.shape[1] != weights.gate_up.shape[2]:
        raise ValueError(f"x has hidden size {x.shape[1]}, the experts have {weights.gate_up.shape[2]}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; expert kernels take float32, bfloat16 or float16")
    if slot_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot_ids is {slot_ids.dtype}; it must be int32 or int64")


def check_expert_weights(weights: ExpertWeights) -> None:
    """Raises ValueError when the tensors of `weights` do not describe one set of experts."""
    slots, n, hidden = weights.gate_up.shape
    activation = weights.activation
    intermediate = n // 2 if activation.gated else n
    is_low_bit = weights.gate_up.dtype in LOW_BIT_DTYPES
    expected = {
        "gate_up": (slots, 2 * intermediate if activation.gated else n, hidden),
        "down": (slots, hidden, intermediate),
        "gate_up_bias": (slots, n),
        "down_bias": (slots, hidden),
    }
    for name, shape in expected.items():
        tensor: Tensor | None = getattr(weights, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with gate_up {(slots, n, hidden)} it must be {shape}"
            )
        is_free = name.endswith("_bias") and is_low_bit and tensor.dtype not in LOW_BIT_DTYPES
        if (tensor.dtype != weights.gate_up.dtype and not is_free) or tensor.device != weights.gate_up.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; gate_up is {weights.gate_up.dtype}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last stride {tensor.stride(-1)}; expert rows must be contiguous")
    if activation.kind == "gpt_oss" and not activation.gated:
        raise ValueError("activation 'gpt_oss' exists only in its gated form; set gated=True")
    if is_low_bit != (weights.scales is not None):
        what = "need scales" if is_low_bit else "must not have any"
        raise ValueError(f"experts stored as {weights.gate_up.dtype} {what}; only float8_e4m3fn and int8 have scales")
    if weights.scales is not None:
        _check_scales(weights.scales, weights.down, 2 if activation.gated else 1)


def _check_scales(scales: Scales, down: Tensor, num_halves: int) -> None:
    slots, hidden, inter = down.shape
    rows, columns = scales.block
    if min(rows, columns) < 1:
        raise ValueError(f"scales have blocks of {rows} x {columns}; both must be at least 1")
    expected = {
        "gate_up": (slots, num_halves, -(-inter // rows), -(-hidden // columns)),
        "down": (slots, -(-hidden // rows), -(-inter // columns)),
    }
    for name, shape in expected.items():
        tensor: Tensor = getattr(scales, name)
        if tuple(tensor.shape) != shape or tensor.dtype not in _SCALE_DTYPES or tensor.device != down.device:
            raise ValueError(
                f"scales of {name} are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; blocks of {rows} x "
                f"{columns} need float32 (or bfloat16, float16) {shape} on {down.device}"
            )
        if len(tensor) and not tensor[0].is_contiguous():
            raise ValueError(f"scales of {name} have strides {tensor.stride()}; one slot's must be contiguous")
