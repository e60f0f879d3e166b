"""Runs a model on the chunks of one step: all packed into one row, or one request after another."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from moe.engine.requests import Chunk, keep_last_rows, rows_wanted, step_of
from moe.layer.routing import RoutingSeam, Span, StepContext
from moe.models.attention import StepLayout
from moe.models.kv import CACHE_NAME, BlockPool, PagedKV
from moe.models.layer_plan import LayerPlan, plan_layers
from moe.models.neighbours import recomputed_beyond

log = logging.getLogger(__name__)


class Runner(Protocol):
    def forward(self, chunks: Seq[Chunk]) -> Tensor:
        """Logits of the last token of every chunk, fp32 [len(chunks), V]."""

    def num_forwards(self, chunks: Seq[Chunk]) -> int:
        """How often `forward` runs the model for these chunks."""


Decoding = Callable[[Tensor, Tensor, Any], Tensor]  # tokens, positions: int64 [1, S]; pages -> logits [S, V]


class PackedRunner:
    """One forward for all chunks over the paged KV cache: by `plan` where there is one, else by the model's modules.

    routing: told whose tokens a forward has. decoding: computes steps of one token of each sequence, by block tables.
    replays: gives the logits of steps that it has as graphs, None of others.
    """

    def __init__(self, model: Any, kv: PagedKV, routing: RoutingSeam, plan: LayerPlan | None = None) -> None:
        self.model, self.kv, self.routing, self.plan = model, kv, routing, plan
        self.decoding: Decoding | None = None
        self.replays: Callable[[Seq[Chunk]], Tensor | None] = lambda chunks: None

    def over(self, kv: PagedKV) -> "PackedRunner":
        """The same over another cache, whose pools are there."""
        plan = None if self.plan is None else LayerPlan(self.model, self.plan.layers, kv)
        return PackedRunner(self.model, kv, self.routing, plan)

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk]) -> Tensor:
        self.routing.begin(step_of(chunks))
        replayed = self.replays(chunks)
        if replayed is not None:
            return replayed
        return keep_last_rows(chunks, self._by_modules(chunks) if self.plan is None else self._by_plan(chunks))

    def _by_plan(self, chunks: Seq[Chunk]) -> Tensor:
        assert self.plan is not None
        tokens = [t for c in chunks for t in c.request.tokens[c.start : c.end]]
        blocks = [c.request.blocks for c in chunks]
        starts, ends = [c.start for c in chunks], [c.end for c in chunks]
        return self.plan.forward(tokens, blocks, starts, ends, rows_wanted(chunks))

    def _by_modules(self, chunks: Seq[Chunk]) -> Tensor:
        device = self.kv.device
        step = self.kv.begin([c.request.blocks for c in chunks], [c.start for c in chunks], [c.end for c in chunks])
        tokens = torch.tensor([[t for c in chunks for t in c.request.tokens[c.start : c.end]]], device=device)
        positions = torch.tensor([[p for c in chunks for p in range(c.start, c.end)]], device=device)
        wanted = rows_wanted(chunks).to(device)
        logits = self.logits(tokens, positions, step, wanted)
        rows = logits if len(logits) == len(wanted) else logits[wanted]  # some models give every place's
        return rows.float()

    def logits(self, tokens: Tensor, positions: Tensor, step: StepLayout, wanted: Tensor | int = 0) -> Tensor:
        """Of a step that the cache has taken [N, V], by `decoding` if it can. tokens, positions: [1, T]; 0: of all."""
        if self.decoding is not None and step.alone is not None and step.alone.others is None:
            return self.decoding(tokens, positions, step.alone.pages)
        called = {"input_ids": tokens, "position_ids": positions, "step": step, CACHE_NAME: self.kv.cache}
        out: Tensor = self.model(**called, use_cache=True, logits_to_keep=wanted).logits[0]
        return out

    def num_forwards(self, chunks: Seq[Chunk]) -> int:
        return 1 if chunks else 0


def planned_runner(
    model: Any, kv: PagedKV, routing: RoutingSeam, like: Seq[tuple[Tensor, Tensor]], max_context: int
) -> PackedRunner:
    """A runner by compiled blocks where the model's layers can be (moe/models/layer_plan.py), logging why not.

    like: keys and values of a token, by layer. The model is on the CPU; its experts need not be there.
    """
    layers = plan_layers(model, max_context)
    if isinstance(layers, str):
        log.info("layers run by transformers' modules: %s", layers)
        return PackedRunner(model, kv, routing)
    kv.prepare(like)
    return PackedRunner(model, kv, routing, LayerPlan(model, layers, kv))


def paged_runner(
    model: Any, kv: PagedKV, routing: RoutingSeam, like: Seq[tuple[Tensor, Tensor]], max_context: int
) -> PackedRunner:
    """A runner whose decoding tokens attend by the kernel over block tables where they can, logging why not.

    like: keys and values of a token, by layer. The model's experts need not be there. Raises ValueError without triton.
    """
    try:
        from moe.models.decode_plan import DecodePlan, plan_decoding
        from moe.models.paged import PagedDecode, paged
    except ImportError as error:
        raise ValueError(f"attention by kernel needs triton, which is not installed ({error})") from None
    kv.prepare(like)
    readings = paged(model, max_context)
    if isinstance(readings, str):
        log.info("decoding tokens attend by gathered keys: %s", readings)
        return PackedRunner(model, kv, routing)
    kv.alone, runner = PagedDecode(kv, readings), PackedRunner(model, kv, routing)
    layers = plan_decoding(model, max_context)
    if isinstance(layers, str):
        log.info("decoding steps run by transformers' modules: %s", layers)
    else:
        runner.decoding = DecodePlan(model, layers, kv)
    return runner


def why_threads_count(runner: Runner) -> str | None:
    """Why the number of threads can change a bit of what this runner computes; None where it cannot.

    Compiled kernels sum every row in one order whatever their threads; torch does not.
    """
    plan = runner.plan if isinstance(runner, PackedRunner) else None
    if plan is None:
        return "layers run by transformers' modules, whose sums depend on it"
    if plan.blocks[0].dtype == torch.float32:
        return "torch multiplies many rows of fp32, and its sums depend on it"
    if any(layer.router is None for layer in plan.layers):
        return "a layer's router or MLP is torch's, whose sums depend on it"
    return None


class _Kept(NamedTuple):
    """What a request's forward left: its first `end` tokens, as transformers keeps them."""

    end: int
    encoded: Any
    cache: Any


class SequentialRunner:
    """Each request by itself, with the cache that transformers makes for this architecture.

    For recurrent layers and encoder-decoders: exact, but experts are fetched for one request at a time. An
    encoder-decoder's prompt goes to the encoder; its output starts from the decoder's start token.
    """

    def __init__(self, model: Any, routing: RoutingSeam) -> None:
        self.model, self.routing = model, routing
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.recomputed_beyond = recomputed_beyond(model)

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk]) -> Tensor:
        return keep_last_rows(chunks, torch.cat([self._forward_one(chunk) for chunk in chunks]))

    def num_forwards(self, chunks: Seq[Chunk]) -> int:
        return len(chunks)

    def _forward_one(self, chunk: Chunk) -> Tensor:
        request, device = chunk.request, self.model.device
        new = request.tokens[chunk.start : chunk.end]
        kept: _Kept | None = request.state
        # A step that fails leaves caches half changed, and those of the requests before it ahead: then all is computed
        # again.
        request.state = None
        if kept is not None and kept.end != chunk.start:
            kept = None
        encoded = past = None
        arguments: dict[str, Any] = {}
        if self.is_encoder_decoder:
            prompt = torch.tensor([request.tokens[: request.num_prompt]], device=device)
            if kept is None:
                encoded = self.model.get_encoder()(input_ids=prompt)
                start = self.model.generation_config.decoder_start_token_id
                start = self.model.config.decoder_start_token_id if start is None else start
                new = [start, *request.tokens[request.num_prompt :]]
            else:
                encoded, past = kept.encoded, kept.cache
            arguments = {"encoder_outputs": encoded, "decoder_input_ids": torch.tensor([new], device=device)}
        else:
            first = chunk.start
            if kept is None:
                first, past, new = 0, self._declared_cache(request.num_prompt), request.tokens[: chunk.end]
            else:
                past = kept.cache
            if self.recomputed_beyond is not None and first <= self.recomputed_beyond < chunk.end:
                first, past, new = 0, None, request.tokens[: chunk.end]
            positions = torch.arange(first, chunk.end, device=device)[None]
            arguments = {"input_ids": torch.tensor([new], device=device), "position_ids": positions}
        span = Span(request.id, chunk.end - len(new), chunk.end, request.num_prompt, request.owner)
        self.routing.begin(StepContext((span,)))
        out = self.model(**arguments, **{CACHE_NAME: past}, use_cache=True)
        request.state = _Kept(chunk.end, encoded, getattr(out, CACHE_NAME))
        return out.logits[0, -chunk.num_rows :].float()  # type: ignore[no-any-return]

    def _declared_cache(self, num_prompt: int) -> DynamicCache | None:
        """A new cache, where it treats a prompt's tokens otherwise than an answer's and so must know where they end."""
        cache = DynamicCache(config=self.model.config)
        layers = [layer for layer in cache.layers if hasattr(layer, "set_prefill_length")]
        for layer in layers:
            layer.set_prefill_length(num_prompt)
        return cache if layers else None


def run_a_token(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, heads, 1, D] by layer, found by running one token through the dense weights.

    Experts must be detached.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), **{CACHE_NAME: cache})
    return [(layer.keys, layer.values) for layer in cache.layers]


def make_paged_kv(model: Any, pool: BlockPool) -> PagedKV:
    return PagedKV(model.config.get_text_config().num_hidden_layers, pool, model.device)
