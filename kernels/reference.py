"""The specification of expert compute, in plain torch: every expert kernel is compared with this file.

Rounding points, the same for every kernel (`d` is the dtype of x, fp32 here means: no rounding there):

    gate_up = round_d(x · W1ᵀ + b1)        fp32 products and sums, storage widened exactly
    h       = round_d(act(gate) * up)      the whole activation in fp32, one rounding
    y       = round_d(h · W2ᵀ + b2)        so that a result travels between ranks in d and loses nothing
    out     = round_d(Σ_k w_k · y_k)       k = 0 … K-1 in this order, product and sum rounded to fp32 each

Weights stored as codes are first decoded in fp32 (`dequantized`); nothing else changes.
These roundings are where transformers' eager experts round too. They also round act(gate), w·y and every partial sum;
those only add error, so that a result here lies nearer to exact arithmetic than theirs (a test measures it).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.formats import CODE_DTYPES, SCALE_DTYPES, Coding, bytes_per_row, decode
from moe.kernels.nested import PLANES, plane_bytes
from moe.kernels.weights import Activation, ExpertWeights

LEFT = -2  # the slot id of a pair that was computed before


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


def experts_reference(x: Tensor, slot_ids: Tensor, weights: ExpertWeights, out_y: Tensor | None = None) -> Tensor:
    """y[t, k] = expert(slot_ids[t, k])(x[t]), the rows of slot_ids == -1 being 0, those of LEFT as out_y has them.

    x: [T, H] fp32, bf16 or fp16; slot_ids: int [T, K], -1 = no expert; T may be 0. Returns y [T, K, H] in fp32, of
    values that x's dtype holds, `out_y` if given. Loops over the slots in use; costs one host sync.
    """
    if out_y is not None:
        return put_beside_left(experts_reference(x, slot_ids.clamp(min=-1), weights), slot_ids, out_y)
    check_expert_input(x, slot_ids, weights)
    num_tokens, top_k = slot_ids.shape
    y = torch.zeros(num_tokens, top_k, weights.down.shape[1], dtype=torch.float32, device=x.device)
    used: list[int] = torch.unique(slot_ids).tolist()  # host sync
    for slot in used:
        if slot == -1:
            continue
        if not 0 <= slot < len(weights.gate_up):
            raise ValueError(bad_slot(slot, len(weights.gate_up)))
        token, k = torch.where(slot_ids == slot)
        y[token, k] = one_expert_reference(x[token], slot, weights)
    return y


def put_beside_left(y: Tensor, slot_ids: Tensor, out_y: Tensor) -> Tensor:
    """y [T, K, H] goes into `out_y`, but for the pairs whose slot id is LEFT; returns it."""
    return out_y.copy_(torch.where((slot_ids == LEFT)[..., None], out_y, y))


def bad_slot(slot: int, num_slots: int) -> str:
    return f"slot id {slot} must be -1 or lie in [0, {num_slots}), the slots of the slab"


def one_expert_reference(x: Tensor, slot: int, weights: ExpertWeights) -> Tensor:
    """One expert on the rows x [R, H]. Returns [R, H] in fp32, of values that x's dtype holds."""
    first, second = dequantized(weights, slot)
    gate_up = F.linear(x.float(), first, _widened(weights.gate_up_bias, slot)).to(x.dtype)
    h = activation_reference(gate_up, weights.activation).to(x.dtype)
    return F.linear(h.float(), second, _widened(weights.down_bias, slot)).to(x.dtype).float()


def dequantized(weights: ExpertWeights, slot: int) -> tuple[Tensor, Tensor]:
    """gate_up [N, H] and down [H, I] of one slot in fp32, decoded where they are stored as codes."""
    first, second, act = weights.gate_up[slot], weights.down[slot], weights.activation
    if weights.gate_up_coding is not None:
        interleaved = act.gated and act.interleaved
        first = decode(first, weights.gate_up_coding, weights.hidden_size, slot, interleaved=interleaved)
    if weights.down_coding is not None:
        second = decode(second, weights.down_coding, weights.intermediate_size, slot)
    return first.float(), second.float()


def _widened(bias: Tensor | None, slot: int) -> Tensor | None:
    return None if bias is None else bias[slot].float()


def combine_reference(y: Tensor, topk_weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """out[t] = Σ_k topk_weights[t, k] · y[t, k], k ascending, in fp32, rounded once to `dtype` (None: that of y).

    y: [T, K, H]; topk_weights: [T, K], any float dtype. Returns [T, H].
    """
    if y.shape[:2] != topk_weights.shape:
        raise ValueError(f"topk_weights has shape {tuple(topk_weights.shape)}, y needs {tuple(y.shape[:2])}")
    out = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
    for weight, one in zip(topk_weights.float()[:, :, None].unbind(1), y.unbind(1)):
        out += weight * one.float()
    return out.to(dtype or y.dtype)


def check_expert_input(x: Tensor, slot_ids: Tensor, weights: ExpertWeights) -> None:
    """Raises ValueError when shapes or dtypes do not fit together (slot numbers are checked where they are read)."""
    if x.ndim != 2 or slot_ids.ndim != 2 or len(x) != len(slot_ids):
        raise ValueError(f"x {tuple(x.shape)} and slot_ids {tuple(slot_ids.shape)} must be [T, H] and [T, K] of one T")
    if x.shape[1] != weights.hidden_size:
        raise ValueError(f"x has hidden size {x.shape[1]}, the experts have {weights.hidden_size}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; expert kernels take float32, bfloat16 or float16")
    if slot_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot_ids is {slot_ids.dtype}; it must be int32 or int64")


def check_expert_weights(weights: ExpertWeights) -> None:
    """Raises ValueError when the tensors of `weights` do not describe one set of experts."""
    activation, slots, n = weights.activation, *weights.gate_up.shape[:2]
    hidden = weights.gate_up.shape[2] if weights.gate_up_coding is None else weights.hidden_size
    inter = weights.intermediate_size
    rows = 2 * inter if activation.gated else n
    _check_matrix("gate_up", weights.gate_up, weights.gate_up_coding, (slots, rows, hidden))
    _check_matrix("down", weights.down, weights.down_coding, (slots, hidden, inter))
    is_coded = weights.gate_up_coding is not None
    for name, bias, length in (("gate_up_bias", weights.gate_up_bias, n), ("down_bias", weights.down_bias, hidden)):
        if bias is None:
            continue
        _check_tensor(name, bias, (slots, length), weights.gate_up)
        if bias.dtype not in _FLOATS if is_coded else bias.dtype != weights.gate_up.dtype:
            raise ValueError(f"{name} is {bias.dtype}; gate_up is {weights.gate_up.dtype}")
    if not is_coded and weights.down_coding is None and weights.down.dtype != weights.gate_up.dtype:
        raise ValueError(f"down is {weights.down.dtype}; gate_up is {weights.gate_up.dtype}")
    if activation.kind == "gpt_oss" and not activation.gated:
        raise ValueError("activation 'gpt_oss' exists only in its gated form; set gated=True")
    for name, coding, parts, shape in (
        ("gate_up", weights.gate_up_coding, 2 if activation.gated else 1, (inter, hidden)),
        ("down", weights.down_coding, 1, (hidden, inter)),
    ):
        if coding is not None:
            _check_coding(name, coding, (slots, parts), shape, weights.down.device)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_coded_matrix(name: str, codes: Tensor, coding: Coding, shape: tuple[int, int, int]) -> None:
    """Raises ValueError when codes and coding do not describe matrices of one part. shape: slots, rows, columns."""
    _check_matrix(name, codes, coding, shape)
    _check_coding(name, coding, (shape[0], 1), shape[1:], codes.device)


def _check_matrix(name: str, stored: Tensor, coding: Coding | None, shape: tuple[int, int, int]) -> None:
    """`stored` as float weights or codes of logical `shape`."""
    if coding is None:
        if stored.dtype not in _FLOATS:
            raise ValueError(f"experts stored as {stored.dtype} need a coding; {name} has none")
        _check_tensor(name, stored, shape, stored)
        return
    if stored.dtype != CODE_DTYPES[coding.code]:
        raise ValueError(f"{name} is {stored.dtype}; codes of {coding.code} are {CODE_DTYPES[coding.code]}")
    _check_tensor(name, stored, (*shape[:2], bytes_per_row(coding.code, shape[2])), stored)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; gate_up is {like.dtype} on {like.device}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has last stride {tensor.stride(-1)}; expert rows must be contiguous")


def _check_coding(name: str, coding: Coding, slots: tuple[int, int], shape: tuple[int, int], device: object) -> None:
    """slots: S and the number of parts; shape: of one part."""
    rows, columns = coding.block
    if min(rows, columns) < 1:
        raise ValueError(f"scales have blocks of {rows} x {columns}; both must be at least 1")
    is_free = coding.group_of is not None or coding.code == "bf12"
    groups = coding.scale.shape[-1] if is_free else -(-shape[1] // columns)
    grid = (*slots, -(-shape[0] // rows), groups)
    takes_zeros, is_table = coding.code in ("int8", "int4"), coding.code == "lut4"
    if (coding.residual is not None) != (coding.code == "nested"):
        raise ValueError(f"{name} is coded as {coding.code}; nested, and nothing else, has residual planes")
    is_table |= coding.code == "bf12" and coding.table is not None  # it may have one
    if (coding.zero is not None and not takes_zeros) or (coding.table is not None) != is_table:
        raise ValueError(f"{name} is coded as {coding.code}; zeros go with int8 and int4 only, a table with lut4 only")
    table: tuple[tuple[int, ...], torch.dtype] = (*slots, 16), torch.float32
    if coding.table is not None and coding.code == "bf12":
        table = (1, coding.table.shape[-1]), torch.int32
    for what, tensor, wanted, dtypes in (
        ("scales", coding.scale, grid, (torch.int32,) if coding.code == "bf12" else SCALE_DTYPES),
        ("zeros", coding.zero, grid, (torch.int8,)),
        ("factors", coding.factor, slots, (torch.float32,)),
        ("tables", coding.table, table[0], (table[1],)),
        ("groups", coding.group_of, (*slots, shape[1]), (torch.int32,)),
        *_residual_pieces(coding, slots, shape, grid),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{what} of {name} are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; blocks of {rows} x "
                f"{columns} need {wanted} of {', '.join(str(d)[6:] for d in dtypes)} on {device}"
            )
        if len(tensor) and not tensor[0].is_contiguous():
            raise ValueError(f"{what} of {name} have strides {tensor.stride()}; one slot's must be contiguous")


_Checked = tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]


def _residual_pieces(
    coding: Coding, slots: tuple[int, int], shape: tuple[int, int], grid: tuple[int, ...]
) -> list[_Checked]:
    """What of nested precision must have which shape and dtype; nothing of other codes."""
    if coding.residual is None:
        return []
    rows, columns = coding.block
    if rows != 1 or (columns % 16 and columns < shape[1]) or coding.scale.dtype != torch.float16:
        raise ValueError(
            f"nested precision has float16 scales of 1 x 16, 32, ... weights, not {coding.scale.dtype} of {rows} x "
            f"{columns}"
        )
    bits, *planes = coding.residual
    found: list[_Checked] = [("bits", bits, (slots[0], 1), (torch.int32,))]
    for level, codes, scale in zip((3, 4, 8), planes[::2], planes[1::2]):
        rows_of_codes = slots[0], slots[1] * shape[0], plane_bytes(PLANES[level], shape[1])
        found.append((f"codes of {level} bits", codes, rows_of_codes, (torch.uint8,)))
        found.append((f"scales of {level} bits", scale, grid, (torch.float16 if level == 8 else torch.uint8,)))
    return found
