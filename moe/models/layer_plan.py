"""Runs a whole model by compiled blocks on the CPU: one call per layer before its experts, instead of forty operators.

For models whose layers are what most are: norm, attention with rotary positions, residual, norm, router and experts. A
plan is made from transformers' own modules: their weights, what their attention hands over (scale, mask rule, sinks;
watched for one token), and their routers (compared on random rows). It is used only if every block then says what its
layer says to some tokens of two sequences. Everything else stays with transformers' modules, which are its twin.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.kernels.cpu_block import Block, CpuBlock, Linear, Step, why_not
from moe.kernels.cpu_layers import CpuLayers
from moe.models.dense_cpu import rounds_once
from moe.models.dense_packed import PackedLinear
from moe.models.kv import PagedKV
from moe.models.watch import by_modules, small_cache, stand_in_experts, watch_attention, window_of

_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "sinks"}
_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
FEW_TOKENS = 64  # of a step whose layers may be one call: what Python costs counts, and nobody waits to interrupt it
# Relative error of a layer's result, all elements together, to the largest of what it adds up. fp32: sums of another
# order. bf16: roundings of 2^-9.
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Unplanned(Exception):
    """Why a model has no plan."""


class Attention(NamedTuple):
    """What a layer's attention was called with. window: keys that a query sees, itself included; 0: all."""

    scale: float
    window: int
    sinks: Tensor | None


class PlannedLayer(NamedTuple):
    block: Block
    mlp: Any
    gate: str  # where mlp has the router that the block computes; empty: mlp is called as it is
    router: Any  # that router; another in its place is called instead

    @property
    def is_routed(self) -> bool:
        """Whether the block's routing is the router's: nobody has put another in its place."""
        return bool(self.gate) and getattr(self.mlp, self.gate) is self.router

    @property
    def compute(self) -> Any:
        """What takes the routing of a layer whose routing is the block's."""
        return self.mlp.experts.compute

    def after(self, x: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor:
        """What the layer adds to x [T, H], by the block's routing where that is the router's."""
        if self.is_routed:
            return self.compute(x, ids, weights, False)  # type: ignore[no-any-return]
        out = self.mlp(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]  # type: ignore[no-any-return]


class Said(NamedTuple):
    """What a decoder layer was given and gave, [T, H] each. x: what its `mlp` was given."""

    given: Tensor
    x: Tensor
    mlp: Tensor
    gave: Tensor


class LayerPlan:
    """All layers of a model, ready to run over one paged cache; the pools must be there (`PagedKV.prepare`)."""

    def __init__(self, model: Any, layers: Sequence[PlannedLayer], kv: PagedKV) -> None:
        self.model, self.base, self.kv = model, model.base_model, kv
        self.layers = list(layers)
        self.blocks = [CpuBlock(one.block, cache.keys, cache.values) for one, cache in zip(layers, kv.layers)]
        self._in_one_call: Callable[[Sequence[CpuBlock]], CpuLayers | None] = lambda blocks: None
        self._computes: list[Any] = []

    def use(self, in_one_call: Callable[[Sequence[CpuBlock]], CpuLayers | None]) -> None:
        """Forwards of few tokens ask it for what computes all layers, blocks and experts, of the next forward; for as
        long as the experts' modules compute by what they have now.
        """
        self._in_one_call = in_one_call
        self._computes = [layer.compute if layer.is_routed else None for layer in self.layers]

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int],
        blocks: Sequence[Sequence[int]],
        starts: Sequence[int],
        ends: Sequence[int],
        rows: Tensor,
    ) -> Tensor:
        """Computes the tokens [start, end) of each sequence with these blocks of the cache; starts < ends.

        tokens: of all sequences, one after another. Returns the logits of those that `rows` [N] names, fp32 [N, V].
        """
        h = self.base.embed_tokens(torch.tensor(tokens))  # [T, H]
        step = self.step(blocks, starts, ends)
        work = self.work(len(h))
        add: Tensor | None = None
        if (whole := self._whole(len(h))) is not None:
            add = whole(h, step, work)
        else:
            for layer, block in zip(self.layers, self.blocks):
                x, ids, weights = block(h, add, step, work)
                add = layer.after(x, ids, weights)
        assert add is not None
        logits: Tensor = self.model.lm_head(self.base.norm(h[rows] + add[rows]))
        return logits.float()

    def _whole(self, tokens: int) -> CpuLayers | None:
        if tokens > FEW_TOKENS or not self._computes:
            return None
        if not all(of.is_routed and of.compute is own for of, own in zip(self.layers, self._computes)):
            return None
        return self._in_one_call(self.blocks)

    @torch.inference_mode()
    def check(
        self,
        said: Sequence[Said],
        tokens: Tensor,
        logits: Tensor,
        blocks: Sequence[Sequence[int]],
        starts: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Raises Unplanned unless every block gives what its layer gave in this step, and so do both ends."""
        step = self.step(blocks, starts, ends)
        work = self.work(len(tokens))
        last = self.base.norm(said[-1].gave[step.first[1:] - 1])
        compare_blocks(self.model, said, tokens, lambda n, h: self.blocks[n](h, None, step, work).x, (last, logits))

    def work(self, tokens: int) -> Tensor:
        """Scratch memory for the blocks of a step of so many tokens."""
        return torch.empty(max(block.work_bytes(tokens) for block in self.blocks), dtype=torch.uint8)

    def step(self, blocks: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int]) -> Step:
        """What all layers' blocks must know of the tokens [start, end) of each sequence."""
        size = self.kv.pool.block_size
        counts = [-(-end // size) for end in ends]
        tables = np.zeros((len(ends), max(counts)), np.int32)
        for row, own, count in zip(tables, blocks, counts):
            row[:count] = own[:count]
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])
        cos, sin = turns_at(self.base, torch.from_numpy(positions)[None])
        first = torch.tensor([0, *accumulate(end - start for start, end in zip(starts, ends))])
        return Step(cos, sin, first, torch.tensor(ends), torch.from_numpy(tables), size)


def plan_layers(model: Any, max_context: int) -> list[PlannedLayer] | str:
    """The model's layers as blocks, or the reason why they stay with transformers' modules.

    The model runs with paged attention and on the CPU; its experts need not be there. Costs some forwards of a few
    tokens through the dense weights.
    """
    return tried(model, max_context, _compare)


def tried(
    model: Any, max_context: int, compare: Callable[[Any, Sequence[PlannedLayer]], None]
) -> list[PlannedLayer] | str:
    """The model's layers, described, if `compare` does not raise Unplanned; else why not."""
    try:
        with stand_in_experts(model) as experts:
            modules = _layers_of(model)
            seen = _watch_attention(model, max_context)
            rotary = _rotary_width(model)
            each = zip(modules, seen, strict=True)
            layers = [_planned(layer, one, experts, rotary) for layer, one in each]
            compare(model, layers)
    except Unplanned as reason:
        return str(reason)
    except Exception as error:  # of any kind: modules of every architecture are tried, and may be called otherwise
        return f"its layers cannot be tried: {type(error).__name__}: {error}"[:300]
    return layers


def _layers_of(model: Any) -> list[Any]:
    base = model.base_model
    if set(dict(base.named_children())) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise Unplanned(f"{type(base).__name__} is made of {', '.join(sorted(dict(base.named_children())))}")
    if (
        not isinstance(getattr(model, "lm_head", None), nn.Linear | PackedLinear)
        or type(base.embed_tokens) is not nn.Embedding
    ):
        raise Unplanned("its embedding or its head is no plain layer")
    return list(base.layers)


def _planned(layer: Any, seen: Attention, experts: set[int], rotary: int) -> PlannedLayer:
    attention = layer.self_attn
    parts = {name.partition(".")[0] for name, _ in attention.named_parameters()}
    if set(dict(layer.named_children())) != _LAYER_PARTS or not parts <= _ATTENTION_PARTS:
        raise Unplanned(f"{type(layer).__name__} has parts of its own")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = [n for n in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if n is not None]
    rounding = {rounds_once(norm) for norm in (*norms, *head_norms)}
    if None in rounding or len(rounding) > 1 or len(head_norms) == 1:
        raise Unplanned(f"{type(layer).__name__} has norms of another kind")
    if len({norm.variance_epsilon for norm in norms}) > 1 or len({n.variance_epsilon for n in head_norms}) > 1:
        raise Unplanned(f"{type(layer).__name__} has norms of several eps")
    heads = {name: _linear(getattr(attention, f"{name}_proj", None)) for name in "qkvo"}
    dim = attention.head_dim
    router, routing = None, (0, False, False)
    gate, *others = set(dict(layer.mlp.named_children())) - {"experts"} or [""]
    if gate in ("gate", "router") and not others and id(getattr(layer.mlp, "experts", None)) in experts:
        router, routing = plain_router(getattr(layer.mlp, gate))
    block = Block(
        **heads,
        norm=norms[0].weight.detach(),
        next_norm=norms[1].weight.detach(),
        q_norm=head_norms[0].weight.detach() if head_norms else None,
        k_norm=head_norms[1].weight.detach() if head_norms else None,
        sinks=seen.sinks,
        router=router,
        heads=len(heads["q"].weight) // dim,
        kv_heads=len(heads["k"].weight) // dim,
        dim=dim,
        rotary=rotary,
        window=seen.window,
        top_k=routing[0],
        normalize=routing[1],
        round_weights=routing[2],
        eps=norms[0].variance_epsilon,
        head_eps=head_norms[0].variance_epsilon if head_norms else 0.0,
        scale=seen.scale,
        round_once=True in rounding,
    )
    if router is None:
        return PlannedLayer(block, layer.mlp, "", None)
    return PlannedLayer(block, layer.mlp, gate, getattr(layer.mlp, gate))


def turns_at(base: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin: [T, elements of a head that turn], contiguous, at int64 positions [1, T].

    Some models (GPT-OSS) hand over one of both halves, which are the same.
    """
    both = base.rotary_emb(base.embed_tokens.weight[:1, None], positions)
    if not isinstance(both, tuple) or both[0].dtype != base.embed_tokens.weight.dtype:
        raise Unplanned("its positions are no cosines and sines")
    frequencies = getattr(base.rotary_emb, "inv_freq", None)
    is_half = frequencies is not None and both[0].shape[-1] == len(frequencies)
    cos, sin = (torch.cat([of[0], of[0]], dim=-1) if is_half else of[0].contiguous() for of in both)
    return cos, sin


def _rotary_width(model: Any) -> int:
    at = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    return int(turns_at(model.base_model, at)[0].shape[-1])


def _linear(module: Any) -> Linear:
    if isinstance(module, PackedLinear):
        return module.described
    if not isinstance(module, nn.Linear):
        raise Unplanned(f"a projection is {type(module).__name__}")
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


@torch.inference_mode()
def plain_router(gate: Any) -> tuple[Linear | None, tuple[int, bool, bool]]:
    """The router and its (top-k, normalize, round_weights), found by trying; None where it does something else."""
    parameters = dict(gate.named_parameters())
    top_k = getattr(gate, "top_k", None)
    if not set(parameters) <= {"weight", "bias"} or not isinstance(top_k, int) or list(gate.buffers()):
        return None, (0, False, False)
    weight, bias = parameters["weight"].detach(), parameters.get("bias")
    x = torch.randn(32, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    said = gate(x)
    if not isinstance(said, tuple) or len(said) != 3:
        return None, (0, False, False)
    _, scores, ids = said
    chosen, mine = nn.functional.linear(x, weight, bias).float().softmax(-1).topk(top_k)
    for normalize, is_rounded in product((True, False), (weight.dtype != torch.float32, False)):
        right = chosen / chosen.sum(-1, keepdim=True) if normalize else chosen
        right = right.to(weight.dtype) if is_rounded else right
        if scores.dtype == right.dtype and torch.equal(ids, mine) and torch.allclose(scores, right, rtol=1e-6, atol=0):
            return Linear(weight, None if bias is None else bias.detach()), (top_k, normalize, is_rounded)
    return None, (0, False, False)


def _watch_attention(model: Any, max_context: int) -> list[Attention]:
    """What each layer's attention is called with, from one token's forward."""
    calls: list[Attention | str] = []

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, rule: Any, options: dict[str, Any]) -> None:
        calls.append(_seen(query, rule, options, max_context))

    watch_attention(model, small_cache(model), look)
    for call in calls:
        if isinstance(call, str):
            raise Unplanned(call)
    return [call for call in calls if isinstance(call, Attention)]


def _seen(query: Tensor, rule: Any, options: dict[str, Any], max_context: int) -> Attention | str:
    sinks = options.get("s_aux")
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        return "its attention caps or biases scores"
    window = window_of(rule, max_context)
    if window is None:
        return "its attention masks by something else than distance"
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Attention(scale, window, None if sinks is None else sinks.detach().float().contiguous())


@torch.inference_mode()
def compare_blocks(
    model: Any,
    said: Sequence[Said],
    tokens: Tensor,
    run: Callable[[int, Tensor], Tensor],
    head: tuple[Tensor, Tensor],
) -> None:
    """Raises Unplanned unless `run(layer, h)` gives the layer's x and adds attention to h, and both ends agree.

    tokens: of a step; head: what the head was given for some of them, and its logits.
    """
    bound = _BOUND[said[0].given.dtype]

    def agree(what: str, ours: Tensor, theirs: Tensor, *terms: Tensor) -> None:
        size = max(float(of.float().norm()) for of in (theirs, *terms))  # the terms of a sum may cancel
        error = float((ours.float() - theirs.float()).norm()) / max(size, 1e-30)
        if not error <= bound:
            raise Unplanned(f"{what} differs from transformers' by {error:.1e}")

    agree("the embedding", model.base_model.embed_tokens(tokens), said[0].given)
    for number, one in enumerate(said):
        h = one.given.clone()
        agree(f"layer {number} before its experts", run(number, h), one.x)
        agree(f"layer {number}", h + one.mlp, one.gave, one.given, one.mlp)
        if number + 1 < len(said):
            agree(f"what layer {number + 1} is given", one.gave, said[number + 1].given)
    agree("the head", model.lm_head(head[0]), head[1])


@contextmanager
def listening(layers: Sequence[Any]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, every forward of `layers` leaves its tensors in the dictionaries that this yields."""
    heard: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []
    for layer, to in zip(layers, heard):

        def given(_: Any, args: Any, kwargs: Any, to: dict[str, Tensor] = to) -> None:
            to["given"] = (args[0] if args else kwargs["hidden_states"])[0].clone()

        def passed(_: Any, args: Any, out: Any, to: dict[str, Tensor] = to) -> None:
            to["x"], to["mlp"] = args[0][0].clone(), (out[0] if isinstance(out, tuple) else out)[0].clone()

        def gave(_: Any, args: Any, out: Any, to: dict[str, Tensor] = to) -> None:
            to["gave"] = (out[0] if isinstance(out, tuple) else out)[0].clone()

        handles += [
            layer.register_forward_pre_hook(given, with_kwargs=True),
            layer.mlp.register_forward_hook(passed),
            layer.register_forward_hook(gave),
        ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _compare(model: Any, layers: Sequence[PlannedLayer]) -> None:
    """Raises Unplanned unless each block, given what its layer is given, says what the layer says."""
    theirs, ours = small_cache(model), small_cache(model)
    by_modules(model, theirs, [0], [[0]], [0], [1])
    ours.prepare([(c.keys[None, :1].transpose(1, 2), c.values[None, :1].transpose(1, 2)) for c in theirs.layers])
    for cache, layer in zip(ours.layers, layers):
        if reason := why_not(layer.block, cache.keys, cache.values):
            raise Unplanned(reason)
    plan = LayerPlan(model, layers, ours)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    for cut in ([(0, 0, 7)], [(0, 7, 8), (1, 0, 1)], [(1, 1, 10), (0, 8, 9)], [(0, 9, 10), (1, 10, 11)]):
        own = [((5, 2, 7), (1, 6, 0))[s] for s, _, _ in cut]
        starts, ends = [a for _, a, _ in cut], [b for _, _, b in cut]
        row = [int(t) for s, a, b in cut for t in tokens[s, a:b]]
        with listening(list(model.base_model.layers)) as heard:
            logits = by_modules(model, theirs, row, own, starts, ends)
        plan.check([Said(**one) for one in heard], torch.tensor(row), logits, own, starts, ends)
