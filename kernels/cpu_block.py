"""All of a layer before its experts on CPUs, in one compiled call: norms, q k v, positions, paged attention, router.

A decoding step of a small model spends most of its time between operators: some forty calls of torch a layer, each
microseconds. This is one. It also attends for all sequences of a step at once, without gathering their keys, and gives
every token the same bits whatever it is batched with and however its prompt was cut (cpu_block.c says in which order it
sums). `block_reference` is the slow twin; moe/models/layer_plan.py decides for which models it stands in.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_struct import BLOCK, MATRIX, STEP, pack_matrix
from moe.kernels.formats import Coding, decode

KINDS = {torch.float32: 0, torch.bfloat16: 1}
MAX_DIM = 256  # elements of a head
MAX_TOP_K = 64


class Linear(NamedTuple):
    """weight: [N, K], contiguous; bias: [N] or None. coding: weight is codes [N, bytes] of K = `columns`."""

    weight: Tensor
    bias: Tensor | None
    coding: Coding | None = None
    columns: int = 0

    @property
    def width(self) -> int:
        return self.weight.shape[1] if self.coding is None else self.columns

    def reference(self, x: Tensor) -> Tensor:
        """What it computes, in plain torch. Codes are decoded in float32."""
        if self.coding is None:
            return F.linear(x, self.weight, self.bias)
        weight, bias = decode(self.weight, self.coding, self.columns, 0), self.bias
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


class Block(NamedTuple):
    """One layer's weights before its experts, and what its attention and its router do.

    norm, next_norm: [H]; q_norm, k_norm: [dim], or over all heads, or None. window: keys that a query sees, itself
    included, 0: all. sinks: fp32 [heads], logits that take part in the softmax and have no value. router: None for a
    layer without experts; its weights are divided by their sum if `normalize`, rounded to x's dtype if `round_weights`.
    round_once: norms round after their weight alone, not before it too.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm: Tensor
    next_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks: Tensor | None
    router: Linear | None
    heads: int
    kv_heads: int
    dim: int
    rotary: int
    window: int
    top_k: int
    normalize: bool
    round_weights: bool
    eps: float
    head_eps: float
    scale: float
    round_once: bool = False


class Step(NamedTuple):
    """A step of T tokens of S sequences, a sequence's tokens side by side.

    cos, sin: [T, rotary] in h's dtype; first: int64 [S + 1], where each sequence's tokens begin; lengths: int64 [S],
    all keys of each, the new ones included; blocks: int32 [S, max_blocks], where in the pool they are.
    """

    cos: Tensor
    sin: Tensor
    first: Tensor
    lengths: Tensor
    blocks: Tensor
    block_size: int

    def only(self, which: Tensor) -> "Step":
        """Of a step of one token a sequence, these sequences: int64 [N]."""
        first = torch.arange(len(which) + 1)
        of_each = self.cos[which], self.sin[which], first, self.lengths[which], self.blocks[which]
        return Step(*of_each, self.block_size)


class BlockResult(NamedTuple):
    """x: [T, H] for the experts; ids: int64 [T, K] and weights [T, K] of the router, None where there is none."""

    x: Tensor
    ids: Tensor | None
    weights: Tensor | None


class CpuBlock:
    """One layer's block over its part of the paged cache, ready to be called. Addresses are looked up once.

    keys, values: the pool, [rows, kv_heads, dim], contiguous, of the dtype of all weights (fp32 or bf16). Holds all
    tensors; their addresses may not change. `isa`: index into `instruction_sets()`. Raises ValueError, with the reason,
    for what the helper cannot compute.
    """

    def __init__(self, block: Block, keys: Tensor, values: Tensor, *, isa: int = 0) -> None:
        if reason := why_not(block, keys, values):
            raise ValueError(f"no compiled block: {reason}")
        helper = load_helper()
        assert helper is not None
        self.block, self._held = block, (keys, values)
        self.dtype, self.hidden, self.kind = block.norm.dtype, len(block.norm), KINDS[block.norm.dtype]
        self._weights_dtype = self.dtype if block.round_weights else torch.float32
        self._isa, self._run = isa, helper.moe_cpu_block
        b, router = block, block.router
        pointers = (b.norm, b.next_norm, b.q_norm, b.k_norm, keys, values, b.sinks)
        self.packed = BLOCK.pack(  # struct block
            b"".join(bytes(MATRIX.size) if one is None else _matrix(one) for one in (b.q, b.k, b.v, b.o, router)),
            *(0 if t is None else t.data_ptr() for t in pointers),
            *(b.heads, b.kv_heads, b.dim, b.rotary, b.dim if b.q_norm is None else len(b.q_norm), b.window, self.kind),
            *(0 if router is None else b.top_k, b.normalize, b.round_weights, b.round_once, b.eps, b.head_eps, b.scale),
        )
        self._work_of = helper.moe_cpu_block_work

    def work_bytes(self, tokens: int) -> int:
        """Scratch memory for a step of so many tokens."""
        return int(self._work_of(self.packed, tokens, self.hidden))

    def __call__(self, h: Tensor, add: Tensor | None, step: Step, work: Tensor) -> BlockResult:
        """h: [T, H], contiguous, changed in place: first `add` [T, H] is added, then what attention gives.

        work: uint8, at least `work_bytes`. New keys and values go to the pool. The result is new memory.
        """
        ids = weights = None
        if self.block.router is not None:
            ids = torch.empty(len(h), self.block.top_k, dtype=torch.int64)
            weights = torch.empty(len(h), self.block.top_k, dtype=self._weights_dtype)
        result = BlockResult(torch.empty_like(h), ids, weights)
        if self._run(self.packed, self.pack_step(h, add, step, work, result)):
            raise MemoryError(f"no scratch memory, or no thread, for {len(h)} rows")
        return result

    def pack_step(self, h: Tensor, add: Tensor | None, step: Step, work: Tensor, to: BlockResult) -> bytes:
        """struct step: what is computed of these, and where it goes."""
        x, ids, weights = to
        return STEP.pack(
            *(h.data_ptr(), x.data_ptr(), 0 if add is None else add.data_ptr(), step.cos.data_ptr()),
            *(step.sin.data_ptr(), step.first.data_ptr(), step.lengths.data_ptr(), step.blocks.data_ptr()),
            *(0 if ids is None else ids.data_ptr(), 0 if weights is None else weights.data_ptr(), work.data_ptr()),
            *(len(h), len(step.lengths), step.blocks.shape[1], step.block_size, self.hidden),
            *(torch.get_num_threads(), self._isa),
        )


def why_not(block: Block, keys: Tensor, values: Tensor) -> str | None:
    """The reason why the helper cannot compute this block; None if it can."""
    if load_helper() is None:
        return "the compiled helper is not there"
    linears = [one for one in (block.q, block.k, block.v, block.o, block.router) if one is not None]
    tensors = [t for one in linears if one.coding is None for t in (one.weight, one.bias) if t is not None]
    tensors += [t for t in (block.norm, block.next_norm, block.q_norm, block.k_norm, keys, values) if t is not None]
    dtype = block.norm.dtype
    if dtype not in KINDS or any(t.dtype != dtype or not t.is_cpu or not t.is_contiguous() for t in tensors):
        return f"weights and cache must all be float32 or all bfloat16, contiguous, on cpu (a norm is {dtype})"
    coded = [t for one in linears if one.coding is not None for t in (one.weight, one.bias) if t is not None]
    if any(not t.is_cpu or not t.is_contiguous() for t in coded):
        return "codes must be contiguous and on cpu"
    if block.dim > MAX_DIM or block.rotary > block.dim or block.rotary % 2:
        return f"heads have {block.dim} elements, of which {block.rotary} turn; at most {MAX_DIM} are taken"
    if block.router is not None and not 0 < block.top_k <= min(MAX_TOP_K, len(block.router.weight)):
        return f"the router chooses {block.top_k} of {len(block.router.weight)}; at most {MAX_TOP_K} are taken"
    if keys.shape != values.shape or keys.shape[1:] != (block.kv_heads, block.dim):
        return f"keys are {tuple(keys.shape)}, values {tuple(values.shape)}; both must be [rows, kv_heads, dim]"
    if block.sinks is not None and (block.sinks.dtype != torch.float32 or block.sinks.shape != (block.heads,)):
        return f"sinks are {block.sinks.dtype} {tuple(block.sinks.shape)}; they must be float32 [{block.heads}]"
    return None


def _matrix(linear: Linear) -> bytes:
    bias = None if linear.bias is None else linear.bias[None]
    return pack_matrix(linear.weight[None], bias, linear.coding, linear.width)


def block_reference(
    block: Block, keys: Tensor, values: Tensor, h: Tensor, add: Tensor | None, step: Step
) -> tuple[Tensor, BlockResult]:
    """What `CpuBlock` computes, in plain torch: h after attention, and the result. Changes the pool, not h."""
    h = h if add is None else h + add
    x = norm_reference(h, block.norm, block.eps, block.round_once)
    q, k, v = (one.reference(x) for one in (block.q, block.k, block.v))
    eps, once = block.head_eps, block.round_once
    q, k = (head_norm_reference(t, w, block.dim, eps, once) for t, w in ((q, block.q_norm), (k, block.k_norm)))
    q, k, v = (t.view(len(h), -1, block.dim) for t in (q, k, v))
    q, k = (rotated_reference(t, step.cos, step.sin, block.rotary) for t in (q, k))
    out = torch.empty(len(h), block.heads, block.dim, dtype=h.dtype)
    for s, length in enumerate(step.lengths.tolist()):
        new = range(*step.first[s : s + 2].tolist())
        rows = (step.blocks[s].long()[:, None] * step.block_size + torch.arange(step.block_size)).flatten()[:length]
        keys[rows[length - len(new) :]], values[rows[length - len(new) :]] = k[new], v[new]
        for i, token in enumerate(new):
            end = length - len(new) + i + 1
            seen = rows[max(0, end - block.window) if block.window else 0 : end]
            out[token] = _attend(block, q[token].float(), keys[seen].float(), values[seen].float()).to(h.dtype)
    h = h + block.o.reference(out.flatten(1))
    x = norm_reference(h, block.next_norm, block.eps, block.round_once)
    if block.router is None:
        return h, BlockResult(x, None, None)
    chosen, ids = block.router.reference(x).float().softmax(-1).topk(block.top_k)
    if block.normalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return h, BlockResult(x, ids, chosen.to(h.dtype) if block.round_weights else chosen)


def _attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [heads, dim]; k, v: [n, kv_heads, dim]; all fp32. Returns [heads, dim]."""
    k, v = (t.repeat_interleave(block.heads // block.kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("hd,nhd->hn", q, k) * block.scale
    if block.sinks is not None:
        scores = torch.cat([scores, block.sinks[:, None]], dim=1)
    return torch.einsum("hn,nhd->hd", scores.softmax(-1)[:, : len(k)], v)


def norm_reference(x: Tensor, weight: Tensor, eps: float, round_once: bool = False) -> Tensor:
    """RMS norm, rounded to x's dtype before the weight, as most of transformers' are; or only after it."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype) if round_once else weight * normed.to(x.dtype)


def head_norm_reference(x: Tensor, weight: Tensor | None, dim: int, eps: float, round_once: bool = False) -> Tensor:
    """Of every head, or of all together, by the weight's width. x: [T, heads * dim]."""
    if weight is None:
        return x
    width = x.shape[-1] if len(weight) != dim else dim
    return norm_reference(x.reshape(len(x), -1, width), weight, eps, round_once).view(x.shape)


def rotated_reference(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    """The first `rotary` elements of every head turned by its position. x: [T, heads, dim]; cos, sin: [T, rotary]."""
    turning, rest = x[..., :rotary], x[..., rotary:]
    a, b = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]
    return torch.cat([turned, rest], dim=-1)
