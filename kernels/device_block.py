"""All of a layer before its experts, for one new token of each sequence, by a dozen launches (block_kernels.py).

What `CpuBlock` is on the CPU, of the same `Block`; `block_reference` (cpu_block.py) is the twin of both.
"""

from torch import Tensor
from torch.nn import functional as F

from moe.kernels import paged_attention as attention
from moe.kernels.block_kernels import MAX_WIDTH, Turn, add_norm, turned
from moe.kernels.cpu_block import Block, BlockResult
from moe.kernels.gate import GateConfig, gate
from moe.kernels.paged_attention import Pages, Scores


class DeviceBlock:
    """One layer's block over its part of the paged cache. keys, values: the pool, [rows, kv_heads, dim], contiguous.

    Raises ValueError, with the reason, for what the kernels cannot compute.
    """

    def __init__(self, block: Block, keys: Tensor, values: Tensor) -> None:
        if reason := why_not(block, keys, values):
            raise ValueError(f"no block of kernels: {reason}")
        self.block, self.pool = block, (keys, values)
        of_heads = (block.heads, block.kv_heads, block.dim, block.rotary, block.q_norm, block.k_norm, block.head_eps)
        self._turn = Turn(*of_heads, block.round_once)
        self._scores = Scores(block.scale, block.window, 0.0, block.sinks)
        self._gate = GateConfig(top_k=max(1, block.top_k), renormalize=block.normalize)

    def __call__(self, h: Tensor, add: Tensor | None, cos: Tensor, sin: Tensor, pages: Pages) -> BlockResult:
        """h: [S, H], contiguous, changed in place: first `add` [S, H] is added, then what attention gives.

        cos, sin: [S, rotary]. New keys and values go to the pool. No sync.
        """
        block = self.block
        x = add_norm(h, add, block.norm, block.eps, round_once=block.round_once)
        q, k, v = (F.linear(x, one.weight, one.bias) for one in (block.q, block.k, block.v))
        q, k = turned(q, k, cos, sin, self._turn)
        out = attention.paged_attention(q, (k, v.view(k.shape)), self.pool, pages, self._scores)
        attended = F.linear(out.flatten(1), block.o.weight, block.o.bias)
        x = add_norm(h, attended, block.next_norm, block.eps, round_once=block.round_once)
        if block.router is None:
            return BlockResult(x, None, None)
        ids, weights = gate(F.linear(x, block.router.weight, block.router.bias), self._gate)
        return BlockResult(x, ids.long(), weights.to(h.dtype) if block.round_weights else weights)


def why_not(block: Block, keys: Tensor, values: Tensor) -> str | None:
    """The reason why the kernels cannot compute this block; None if they can."""
    tensors = [t for t in (block.norm, block.next_norm, block.q_norm, block.k_norm, keys, values) if t is not None]
    dtype = block.norm.dtype
    if any(t.dtype != dtype or not t.is_contiguous() for t in tensors):
        return f"norms and cache must have one dtype and be contiguous (a norm is {dtype})"
    if max(len(block.norm), block.heads * block.dim) > MAX_WIDTH or block.rotary > block.dim or block.rotary % 2:
        return f"{block.heads} heads of {block.dim}, of which {block.rotary} turn, or rows of {len(block.norm)}"
    if keys.shape[1:] != (block.kv_heads, block.dim):
        return f"keys are {tuple(keys.shape)}, not [rows, {block.kv_heads}, {block.dim}]"
    return attention.why_not(dtype, block.heads, keys.shape, values.shape)
