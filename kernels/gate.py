"""Router logits to chosen experts and their weights, in one launch, for every router family.

| family | score | groups | renormalize | bias |
|---|---|---|---|---|
| Switch, OLMoE, DeepSeek-V2-Lite | softmax | 1 | no | no |
| Mixtral, Qwen3-MoE | softmax | 1 | yes | no |
| GPT-OSS, Granite (softmax over the chosen logits) | softmax_topk | 1 | no | no |
| DeepSeek-V2 | softmax | best one per group | no | no |
| Ernie 4.5, LongCat | softmax | 1 | yes / no | for choosing |
| DeepSeek-V3, GLM-4.5, Kimi-K2, dots.llm1 | sigmoid | sum of the best two per group | yes | for choosing |
| Llama 4 (top-1) | sigmoid | 1 | no | no |
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import check_device, is_interpreted, launch_options


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """How a router chooses and weighs.

    score: of all experts, in float32; "softmax_topk" chooses by logits and takes the softmax of the chosen ones.
    A bias, when given, is added for choosing only. num_groups > 1: the experts form equal groups, the best
    `topk_groups` by `group_score` stay, the rest cannot be chosen. renormalize: weights are divided by their sum + eps.
    scale: multiplies the weights last.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_topk"] = "softmax"
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"topk_groups ({self.topk_groups}) must lie in [1, num_groups = {self.num_groups}]")


class Gated(NamedTuple):
    """topk_ids: int32 [T, K], heaviest first by the score that chose them; topk_weights: float32 [T, K]."""

    topk_ids: Tensor
    topk_weights: Tensor


def gate(logits: Tensor, config: GateConfig, bias: Tensor | None = None) -> Gated:
    """Choose `top_k` experts per token; of equal scores the lower number wins.

    logits: [T, E] any float dtype; bias: [E] added to the scores that choose, never to the weights. T may be 0.
    """
    check_device(logits)
    _check(logits, config, bias)
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, config.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, config.top_k, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return Gated(ids, weights)
    group = num_experts // config.num_groups
    groups_p, group_p = triton.next_power_of_2(config.num_groups), triton.next_power_of_2(group)
    block_t = 64 if is_interpreted() else max(1, min(8, 1024 // (groups_p * group_p)))
    _gate_kernel[(triton.cdiv(num_tokens, block_t),)](
        logits.contiguous(),
        bias,
        ids,
        weights,
        num_tokens,
        config.eps,
        config.scale,
        E=num_experts,
        TOP_K=config.top_k,
        TOP_K_P=triton.next_power_of_2(config.top_k),
        SCORE=config.score,
        GROUPS=config.num_groups,
        TOPK_GROUPS=config.topk_groups,
        GROUP_SCORE=config.group_score,
        RENORMALIZE=config.renormalize,
        HAS_BIAS=bias is not None,
        BLOCK_T=block_t,
        GROUPS_P=groups_p,
        GROUP=group,
        GROUP_P=group_p,
        **launch_options(4, 1),
    )
    return Gated(ids, weights)


def gate_reference(logits: Tensor, config: GateConfig, bias: Tensor | None = None) -> Gated:
    """`gate` in plain torch."""
    _check(logits, config, bias)
    logits = logits.float()
    scores = logits
    if config.score == "softmax":
        scores = torch.softmax(logits, -1)
    elif config.score == "sigmoid":
        scores = torch.sigmoid(logits)
    choice = scores if bias is None else scores + bias.float()
    if config.num_groups > 1:
        grouped = choice.unflatten(1, (config.num_groups, -1))
        best = grouped.topk(2 if config.group_score == "top2" else 1, dim=-1).values.sum(-1)
        groups = torch.sort(best, dim=-1, descending=True, stable=True).indices[:, : config.topk_groups]
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
        choice = grouped.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    weights = scores.gather(1, ids)
    if config.score == "softmax_topk":
        weights = torch.softmax(weights, -1)
    if config.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + config.eps)
    return Gated(ids.to(torch.int32), weights * config.scale)


def _check(logits: Tensor, config: GateConfig, bias: Tensor | None) -> None:
    num_experts = logits.shape[-1]
    if logits.dim() != 2 or (bias is not None and bias.shape != (num_experts,)):
        raise ValueError(f"logits {tuple(logits.shape)} must be [T, E] and the bias, if any, [E]")
    if num_experts % config.num_groups:
        raise ValueError(f"{num_experts} experts do not form {config.num_groups} equal groups")
    group = num_experts // config.num_groups
    if not 1 <= config.top_k <= group * config.topk_groups:
        raise ValueError(f"top_k ({config.top_k}) must lie in [1, {group * config.topk_groups}], the eligible experts")
    if config.num_groups > 1 and config.group_score == "top2" and group < 2:
        raise ValueError(f"group_score 'top2' needs groups of at least 2 experts, not {group}")


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    eps,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_P: tl.constexpr,
    SCORE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS_P: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    # Experts lie as [groups, experts of a group], both padded to powers of two; their order by number is kept.
    WIDTH: tl.constexpr = GROUPS_P * GROUP_P
    lane = tl.arange(0, WIDTH)
    expert = (lane // GROUP_P) * GROUP + lane % GROUP_P
    exists = (lane % GROUP_P < GROUP) & (lane // GROUP_P < GROUPS)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < num_tokens
    offsets = token.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(logits_ptr + offsets, mask=ok[:, None] & exists[None, :], other=-float("inf")).to(tl.float32)
    logits = tl.where(ok[:, None], logits, 0.0)
    if SCORE == "softmax":
        exponent = tl.exp(logits - tl.max(logits, 1)[:, None])
        exponent = tl.where(exists[None, :], exponent, 0.0)
        scores = exponent / tl.sum(exponent, 1)[:, None]
    elif SCORE == "sigmoid":
        scores = tl.sigmoid(logits)
    else:
        scores = tl.where(exists[None, :], logits, 0.0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(exists[None, :], choice, -float("inf"))
    if GROUPS > 1:
        grouped = tl.reshape(choice, (BLOCK_T, GROUPS_P, GROUP_P))
        best = tl.max(grouped, 2)
        if GROUP_SCORE == "top2":
            member = tl.arange(0, GROUP_P)
            first = tl.argmax(grouped, 2, tie_break_left=True)
            rest = tl.where(member[None, None, :] == first[:, :, None], -float("inf"), grouped)
            best += tl.max(rest, 2)
        group = tl.arange(0, GROUPS_P)
        best = tl.where((group < GROUPS)[None, :], best, -float("inf"))
        allowed = tl.zeros((BLOCK_T, GROUPS_P), tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            picked = group[None, :] == tl.argmax(best, 1, tie_break_left=True)[:, None]
            allowed = tl.where(picked, 1, allowed)
            best = tl.where(picked, -float("inf"), best)
        grouped = tl.where(allowed[:, :, None] > 0, grouped, -float("inf"))
        choice = tl.reshape(grouped, (BLOCK_T, WIDTH))
    place = tl.arange(0, TOP_K_P)
    ids = tl.zeros((BLOCK_T, TOP_K_P), tl.int32)
    weights = tl.zeros((BLOCK_T, TOP_K_P), tl.float32)
    for k in tl.static_range(TOP_K):
        picked = lane[None, :] == tl.argmax(choice, 1, tie_break_left=True)[:, None]
        here = (place == k)[None, :]
        ids = tl.where(here, tl.sum(tl.where(picked, expert[None, :], 0), 1)[:, None], ids)
        weights = tl.where(here, tl.sum(tl.where(picked, scores, 0.0), 1)[:, None], weights)
        choice = tl.where(picked, -float("inf"), choice)
    if SCORE == "softmax_topk":
        weights = tl.where((place < TOP_K)[None, :], weights, -float("inf"))
        weights = tl.exp(weights - tl.max(weights, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 1) + eps)[:, None]
    out = token[:, None] * TOP_K + place[None, :]
    mask = ok[:, None] & (place < TOP_K)[None, :]
    tl.store(ids_ptr + out, ids, mask=mask)
    tl.store(weights_ptr + out, weights * scale, mask=mask)
