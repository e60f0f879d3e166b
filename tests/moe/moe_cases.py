"""Checkpoints and what transformers itself says to them, made once and compared with the engine."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.layer.routing import RoutedLayer
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.params import SamplingParams
from tests.families import ENCODER_DECODER, reference_model, tiny_checkpoint
from tests.family_configs import VOCAB_SIZE

ROOT = Path(__file__).resolve().parent.parent.parent
TINYMOE = ROOT / "examples" / "tinymoe"
# Sums of some 40 products in another order, three layers deep: 3e-6 was the largest of all families.
FP32_BOUND = 1e-5
NUM_NEW = 8


class Said(NamedTuple):
    """Greedy tokens of every prompt, and the logits [new, V] they were chosen from."""

    tokens: list[list[int]]
    logits: list[Tensor]


def random_prompts(lengths, vocab_size=VOCAB_SIZE, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_prompts((5, 1, 37, 20))


def config(budget="1.0", *, dtype="float32", kernel="auto", max_context=None, **batch) -> EngineConfig:
    batch = {"max_tokens": 16, "max_sequences": 4} | batch
    return EngineConfig(
        dtype=dtype,
        kernel=kernel,
        max_context=max_context,
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(**batch),
    )


def greedy(num_new=NUM_NEW) -> SamplingParams:
    return SamplingParams(max_tokens=num_new, ignore_eos=True)


@torch.no_grad()
def reference_says(model, prompts, num_new=NUM_NEW) -> Said:
    """One prompt at a time. The mask is given, or transformers would hide tokens that equal a family's pad token."""
    is_encoder_decoder = model.config.is_encoder_decoder
    model.generation_config.eos_token_id = None  # a random model must not stop by accident
    tokens, logits = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            generation_config=type(model.generation_config)(
                max_new_tokens=num_new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
                decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            ),
        )
        tokens.append(out.sequences[0].tolist()[1 if is_encoder_decoder else len(prompt) :])
        logits.append(torch.stack([step[0].float() for step in out.logits]))
    return Said(tokens, logits)


def engine_says(llm: LLM, prompts, params=None) -> Said:
    logits = llm.engine.keep_logits()
    first = llm.engine.next_id
    outputs = llm.generate(prompts, params or greedy())
    check_whole(llm)
    return Said(
        [o.outputs[0].token_ids for o in outputs], [torch.stack(logits[first + n]) for n in range(len(prompts))]
    )


def check_whole(llm: LLM) -> None:
    """No block and no slot was lost or is still held."""
    pool = llm.engine.scheduler.pool
    pool.check()
    assert pool.num_available == pool.num_blocks
    if llm.engine.experts is not None:
        llm.engine.experts.cache.check()


def relative_error(ours: Said, theirs: Said) -> float:
    """The largest |Δlogit| of any prompt, over the prompt's largest |logit|; infinite for NaN."""
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(ours.logits, theirs.logits, strict=True)]
    worst = torch.stack(errors)
    return float(worst.max()) if worst.isfinite().all() else float("inf")


class RoutingLog:
    """An observer that keeps all routing until it is taken."""

    def __init__(self, num_layers: int) -> None:
        self._routed: list[list[RoutedLayer]] = [[] for _ in range(num_layers)]

    def begin(self, step) -> None:
        pass

    def routed(self, x, routing, step) -> None:
        ids = routing.topk_ids.numpy(force=True).astype(np.int16)
        self._routed[routing.layer].append(RoutedLayer(ids, routing.topk_weights.float().numpy(force=True)))

    def take(self) -> list[RoutedLayer | None]:
        """Every layer's routing since the last call, of all forwards in their order; None where there was none."""
        routed, self._routed = self._routed, [[] for _ in self._routed]
        return [RoutedLayer(*map(np.concatenate, zip(*parts))) if parts else None for parts in routed]


class Case:
    """One family: its checkpoint, the packed form of it, and what transformers says."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.family, self.dtype = family, dtype
        self.original = tiny_checkpoint(family, folder / "original", dtype, max_shard_size="60KB")
        self.is_encoder_decoder = family in ENCODER_DECODER

    @cache  # noqa: B019  a case lives as long as its test module
    def folder(self, form: str) -> Path:
        if form == "original":
            return self.original
        blueprint = read_blueprint(self.original)
        return pack(blueprint.checkpoint, blueprint.index, self.original.parent / "packed")

    @cache  # noqa: B019
    def said(self) -> Said:
        return reference_says(self.reference(), PROMPTS)

    def reference(self):
        return reference_model(self.family, self.original, self.dtype)


def demo_reference(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TINYMOE, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def prefill_logits(model, prompts) -> list[Tensor]:
    """Logits of every place of every prompt, [T, V] each."""
    return [model(torch.tensor([p])).logits[0].float() for p in prompts]
