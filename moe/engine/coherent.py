"""Coherent decode (ExFlow, arXiv 2401.08383): a token stays at the rank of its heaviest expert, attention included.

All ranks know all requests and plan the same steps, so that any of them can run attention for any request; the KV
cache is replicated. Prompts are computed by the rank that was asked (its owner), with the ordinary all-to-all, and
their keys and values go to all ranks. A step of single tokens moves them instead:

    embed where it was sampled ─▶ per layer: attention here ─▶ tokens to their experts, the token itself to the rank
                                      │                        of its heaviest ─▶ results come there ─▶ next layer
                                      └─▶ its K/V to all ranks, behind everything: the next step waits for it
    ─▶ logits and sampling where it ended ─▶ the new tokens to all ranks

What travels is the residual stream: norms and shared experts run where it arrives. Where layers run by compiled blocks
(moe/models/layer_plan.py) they do so here, with the same bits for a token as in any other run, so that it chooses the
experts that a trace has. Exact for any top-k. It pays where
`2·d_kv·(G - 1) < d·p`, or where a saved round costs more than those bytes (`why_coherent`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function

from moe.comm.coherent import CoherentDispatcher
from moe.comm.errors import Task
from moe.comm.gather import BackgroundGather, Gathering
from moe.comm.wire import Traffic, Wire
from moe.engine.coherent_choice import SHARED_EXPERTS
from moe.engine.requests import Chunk, step_of
from moe.engine.runner import PackedRunner
from moe.engine.sampling import Choice, Logprobs, choose
from moe.kernels.cpu_block import BlockResult, Step
from moe.layer.experts import SlotExperts
from moe.layer.routing import Routing, StepContext
from moe.models.attention import MaskRule, StepLayout
from moe.models.kv import CACHE_NAME


def _no_shared(mlp: Any, x: Tensor) -> Tensor | None:
    return None


def _shared(mlp: Any, x: Tensor) -> Tensor | None:
    return mlp.shared_experts(x)  # type: ignore[no-any-return]


def _gated_shared(mlp: Any, x: Tensor) -> Tensor | None:
    return F.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)  # type: ignore[no-any-return]


_SHARED_PART: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "none": _no_shared,
    "added": _shared,
    "gated": _gated_shared,
}


class CoherentRunner:
    """Runs the chunks of all ranks; `forward` returns the logits of the sampling ones that ended on this rank.

    packed: runs whole forwards here; sites: the names of the experts modules, in order. Every call is a
    collective.
    """

    def __init__(self, packed: PackedRunner, experts: SlotExperts, sites: Sequence[str]) -> None:
        assert experts.parallel is not None
        self.model, self.kv, self.packed, self.experts = packed.model, packed.kv, packed, experts
        self.parallel = experts.parallel
        self.groups = self.parallel.groups
        rank_of = torch.from_numpy(self.parallel.plan.rank_of_physical())
        self.dispatcher = CoherentDispatcher(
            self.groups, rank_of, combine=self.parallel.combine, broadcast_tokens=self.parallel.broadcast_tokens
        )
        self.gather = BackgroundGather(self.groups)
        self._wire = Wire(self.groups, self.groups.world, self.groups.world_ranks, self.gather.traffic)
        self._base = self.model.base_model
        site_of = {id(self.model.get_submodule(name)): site for site, name in enumerate(sites)}
        self._sites = [site_of.get(id(getattr(layer.mlp, "experts", None))) for layer in self._base.layers]
        self._shared_part = _SHARED_PART[SHARED_EXPERTS[self.model.config.model_type]]
        self._coming: list[Gathering | None] = [None] * len(self.kv.layers)
        self._here: list[int] = []  # of the step's chunks, those whose logits are on this rank
        self._counts: list[int] = []  # how many such chunks every rank has

    @property
    def traffic(self) -> list[Traffic]:
        """What was sent: by moving tokens, and by gathering keys and values."""
        return [self.dispatcher.traffic, self.gather.traffic]

    def num_forwards(self, chunks: Sequence[Chunk]) -> int:
        return 1 if chunks else 0

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """fp32 [chunks that sample and ended here, V]."""
        if all(c.end - c.start == 1 and not c.tells_prompt for c in chunks):
            return self._decode(chunks)
        return self._at_owners(chunks)

    def choose(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Choice]:
        """The next token of every sampling chunk on all ranks, each sampled where its logits are."""
        size = self.groups.world_size
        num_top = max((c.request.params.logprobs or 0 for c in chunks), default=0)
        rows = torch.zeros(len(self._here), 4 + 2 * num_top, dtype=torch.float64)
        asking = [(chunks[index].request.sampler, chunks[index].request.tokens) for index in self._here]
        for row, index, choice in zip(rows, self._here, choose(logits, asking) if asking else []):
            row[:2] = torch.tensor([index, choice.token])  # token -1: there is none
            if choice.logprobs is not None:
                top = choice.logprobs.top
                row[2:4] = torch.tensor([choice.logprobs.chosen, choice.logprobs.rank], dtype=torch.float64)
                row[4 : 4 + len(top)] = torch.tensor(list(top), dtype=torch.float64)
                row[4 + num_top : 4 + num_top + len(top)] = torch.tensor(list(top.values()), dtype=torch.float64)
        everywhere = rows.repeat(size, 1).to(self.groups.device)
        all_rows = self._wire.exchange(everywhere, [len(rows)] * size, self._counts, Task("the new tokens")).tolist()
        choices: dict[int, Choice] = {}
        owners = [r for r, count in enumerate(self._counts) for _ in range(count)]
        vocabulary = self.model.config.vocab_size
        for place, (index, token, chosen, order, *top) in zip(owners, all_rows):
            request = chunks[int(index)].request
            request.place = place
            wanted = request.params.logprobs
            logprobs = None
            if wanted is not None:
                wanted = min(wanted, vocabulary)
                ids = (int(t) for t in top[:wanted])
                logprobs = Logprobs(chosen, dict(zip(ids, top[num_top : num_top + wanted])), int(order))
            error = f"no token could be chosen on rank {place}" if token < 0 else None
            choices[int(index)] = Choice(int(token), logprobs, error)
        return [choices[i] for i, c in enumerate(chunks) if c.samples]

    def _at_owners(self, chunks: Sequence[Chunk]) -> Tensor:
        """Each chunk where its request came in, by the ordinary dispatcher; its keys and values then go everywhere."""
        for layer in range(len(self._coming)):
            self._arrive(layer)
        rank, size = self.groups.rank, self.groups.world_size
        own = [i for i, c in enumerate(chunks) if c.request.owner == rank]
        tokens, self._counts = [0] * size, [0] * size
        for c in chunks:
            tokens[c.request.owner] += c.end - c.start
            self._counts[c.request.owner] += c.samples
        self.parallel.tokens = tuple(tokens)
        if own:
            logits = self.packed.forward([chunks[i] for i in own])
            logits = logits[[chunks[i].samples for i in own]]
        else:
            shapes = [(1, self._top_k)] * len(self.experts.kernels)
            self.experts.join(self._base.embed_tokens.weight.shape[1], self.model.dtype, shapes)
            logits = torch.empty(0, self.model.config.vocab_size)
        at = self._rows([self.kv.rows(c.request.blocks, c.end)[c.start :] for c in (chunks[i] for i in own)])
        self._here = [i for i in own if chunks[i].samples]
        rows = [part for layer in self.kv.layers for part in (layer.keys[at], layer.values[at])]
        got = self.gather.rows([at.to(torch.int32), *rows], tokens, Task("keys and values of prompts")).wait()
        for layer, keys, values in zip(self.kv.layers, got[1::2], got[2::2]):
            layer.keys[got[0].long()], layer.values[got[0].long()] = keys, values
        return logits

    @property
    def _top_k(self) -> int:
        return int(self.model.config.num_experts_per_tok)

    def _decode(self, chunks: Sequence[Chunk]) -> Tensor:
        """One token of every request, each going where its experts are."""
        device, places = self.kv.device, [c.request.place for c in chunks]
        starts = [c.start for c in chunks]
        rows = [self.kv.rows(c.request.blocks, c.end) for c in chunks]
        whole = self._step_of_blocks(chunks)
        positions = torch.tensor([starts], device=device)
        rotary = self._base.rotary_emb(self._base.embed_tokens.weight[:1, None], positions)
        here = [i for i, place in enumerate(places) if place == self.groups.rank]
        counts: Sequence[int] = [places.count(r) for r in range(self.groups.world_size)]
        step = step_of(chunks)
        self.experts.routing.begin(step.only(here))
        h = self._base.embed_tokens(
            torch.tensor([chunks[i].request.tokens[starts[i]] for i in here], dtype=torch.int64, device=device)
        )
        for index, layer in enumerate(self._base.layers):
            self._arrive(index)
            columns, done = torch.tensor(here, dtype=torch.int64, device=device), None
            if here and whole is not None:
                h, done = self._by_block(index, h, whole.only(columns))
            elif here:
                layout = self.kv.layout([rows[i] for i in here], [starts[i] for i in here])
                h = self._attend(index, layer, h, columns, layout, positions, rotary)
            self._spread(index, self._rows([rows[i][starts[i] :] for i in here]), counts)
            if self._sites[index] is not None:
                h, here, counts = self._move(index, layer, h, done, step.only(here), here, counts)
            elif here:
                h = h + layer.mlp(layer.post_attention_layernorm(h))
        self._here, self._counts = here, list(counts)
        logits: Tensor = self.model.lm_head(self._base.norm(h)).float()
        return logits

    def _step_of_blocks(self, chunks: Sequence[Chunk]) -> Step | None:
        """What compiled blocks must know of the step; None where layers run by modules."""
        if self.packed.plan is None:
            return None
        starts, ends = [c.start for c in chunks], [c.end for c in chunks]
        return self.packed.plan.step([c.request.blocks for c in chunks], starts, ends)

    def _by_block(self, index: int, h: Tensor, step: Step) -> tuple[Tensor, BlockResult]:
        """h: [T, H] after attention, and what goes to the layer's mlp; routed, if the block's router is the layer's."""
        plan = self.packed.plan
        assert plan is not None
        done = plan.blocks[index](h, None, step, plan.work(len(h)))
        return h, done if plan.layers[index].is_routed else done._replace(ids=None, weights=None)

    def _attend(
        self, index: int, layer: Any, h: Tensor, here: Tensor, layout: StepLayout, positions: Tensor, rotary: Any
    ) -> Tensor:
        """h: [T, H]; here: which columns of positions and rotary [1, N, ...] these tokens are."""
        self.kv.layers[index].step = layout
        of_these = tuple(r[:, here] for r in rotary) if isinstance(rotary, tuple) else rotary[:, here]
        x, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h)[None],
            position_embeddings=of_these,
            attention_mask=MaskRule(causal_mask_function),
            position_ids=positions[:, here],
            use_cache=True,
            step=layout,
            **{CACHE_NAME: self.kv.cache},
        )
        attended: Tensor = h + x[0]
        return attended

    def _spread(self, index: int, at: Tensor, counts: Sequence[int]) -> None:
        """This layer's new keys and values, in the rows `at`, set out for all ranks; the next step waits for them."""
        kv = self.kv.layers[index]
        new = [at.to(torch.int32), kv.keys[at], kv.values[at]]
        self._coming[index] = self.gather.rows(new, counts, Task("keys and values", index))

    def _rows(self, of_each: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """Rows of the pool of all sequences, int64 on the device; of none there are none."""
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *of_each])).to(self.kv.device)

    def _arrive(self, index: int) -> None:
        """What the last step spread is in this rank's pool from here on."""
        gathering, self._coming[index] = self._coming[index], None
        if gathering is not None:
            at, keys, values = gathering.wait()
            kv = self.kv.layers[index]
            kv.keys[at.long()], kv.values[at.long()] = keys, values

    def _move(
        self,
        index: int,
        layer: Any,
        h: Tensor,
        done: BlockResult | None,
        step: StepContext,
        here: list[int],
        counts: Sequence[int],
    ) -> tuple[Tensor, list[int], Sequence[int]]:
        """The layer's mlp: h [T, H] of step's tokens, which are `here`, in; of those that live here afterwards out.

        done: what a compiled block has computed of it, normed rows and, maybe, their routing.
        """
        site, norm, device = self._sites[index], layer.post_attention_layernorm, h.device
        assert site is not None
        x, weights = h, torch.zeros(0, self._top_k, device=device)
        ids = weights.long()
        if here:
            x = norm(h) if done is None else done.x
            if done is not None and done.ids is not None and done.weights is not None:
                ids, weights = done.ids, done.weights
            else:
                _, weights, ids = layer.mlp.gate(x)
        _, ids, weights, _ = self.experts.routing.through(x, Routing(site, ids, weights), step)
        physical = self.parallel.physical(site, ids.long())
        who = torch.tensor(here, dtype=torch.int32, device=device)[:, None]
        sent = self.dispatcher.dispatch(
            h, physical, weights.float(), payload=who, layer=site, tokens_per_rank=tuple(counts)
        )
        y = self.experts.pairs(site, norm(sent.rows), self.parallel.logical_here(site, sent.local_ids))
        moved = self.dispatcher.combine(y, sent.handle)
        out, x = moved.out, moved.x
        if len(x) and (extra := self._shared_part(layer.mlp, norm(x))) is not None:
            out = out + extra
        h = x + out
        return h, moved.payload[:, 0].tolist(), moved.tokens_per_rank
