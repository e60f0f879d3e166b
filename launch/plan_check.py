"""What the plan says of a run that has been, beside what it did: printed after a run, kept in its recording."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.engine.engine import Engine
from moe.engine.known import probed
from moe.launch.plan_inputs import sizes_of
from moe.placement.cost import Use, Visits, decode_step
from moe.placement.machine import Machine, disk_of

_VISITS = 100
_LEAST_STEPS = 16  # of decoding, for a mean that says something


class Checked(NamedTuple):
    """Tokens a second of decoding. binds: the plan's largest term; cold: why this run is none that a plan is of."""

    planned: float
    measured: float
    binds: str
    cold: str | None

    def __str__(self) -> str:
        off = f"{self.planned / self.measured - 1:+.0%} off" if self.cold is None else f"not compared: {self.cold}"
        return f"{self.planned:.1f} tokens/s ({self.binds} binds), {off}"


def checked(engine: Engine) -> Checked | None:
    """By the figures of `moe probe` and the run's own mean batch and share of hits; None where one of them is missing.

    Of one process on the CPU, and a model whose layers of experts are alike and of a measured format.
    """
    stats = engine.stats
    requests = stats.time_to_first_token.number
    machine = probed(engine.config)
    is_local = engine.experts is not None and engine.parallel is None and engine.model.device.type == "cpu"
    if machine is None or not is_local or not stats.pure_decode_tokens or not requests:
        return None
    sequences = stats.pure_decode_tokens / max(1, stats.pure_decode_steps)
    context = round((stats.prefill_tokens + stats.shared_tokens + stats.decode_tokens / 2) / requests)
    try:
        step = decode_step(*_asked(engine, machine, sequences, context))
    except ValueError:  # a model or a format that no figure is of
        return None
    return Checked(sequences / step.total, stats.decode_rate, step.binds, _why_cold(engine))


def _why_cold(engine: Engine) -> str | None:
    """A plan is of a run that goes on: the first read of an expert waits for a disk whose pages nobody has read, and
    for its checksum, and the first steps for what a process does once. None if little of the run was that."""
    steps, layers = engine.stats.pure_decode_steps, engine.layer_stats()
    if steps < _LEAST_STEPS:
        return f"{steps} steps of decoding are fewer than {_LEAST_STEPS}"
    hits, misses = (sum(getattr(s, name) for s in layers) for name in ("hits", "misses"))
    if 0.01 * (hits + misses) < misses < 2 * engine.blueprint.num_experts:
        return f"of {misses} reads most may be the first of one of {engine.blueprint.num_experts} experts"
    return None


def checked_state(engine: Any) -> dict[str, Any]:
    """For a recording; nothing of a run that has no engine here, or that no plan is of."""
    found = checked(engine) if isinstance(engine, Engine) else None
    if found is None or found.cold is not None:
        return {}
    return {"decode_rate": found.measured, "planned_rate": found.planned, "planned_binds": found.binds}


def _asked(engine: Engine, machine: Machine, sequences: float, context: int) -> tuple[Any, Machine, Use, Visits]:
    """Raises ValueError for a model that cannot be planned."""
    assert engine.experts is not None
    cache, layers = engine.experts.cache, engine.layer_stats()
    dtype = engine.model.dtype
    found = sizes_of(engine.blueprint)
    kv = found.kv_bytes * dtype.itemsize // engine.blueprint.dtype.itemsize
    sizes = replace(found, dtype=str(dtype).removeprefix("torch."), kv_bytes=kv)
    direct = bool(getattr(cache.store, "direct", False))
    ahead = engine.experts.lookahead is not None and not engine.experts.lookahead.prefetcher.is_stopped
    chosen = {choice.setting: choice.value for choice in engine.choices}
    readers = chosen.get("offload.readers", engine.config.offload.readers)
    use = Use(
        sequences=max(1, round(sequences)),
        context=context,
        slots=cache.num_slots,
        threads=torch.get_num_threads(),
        readers=max(1, readers or 1),
        how="direct" if direct else "cached",
        disk=disk_of(engine.blueprint.folder),
        ahead=float(ahead),
    )
    asked, missed = (sum(getattr(s, name) for s in layers) for name in ("hits", "misses"))
    share = missed / max(1, asked + missed)
    distinct = sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** use.sequences)
    misses = np.diff(np.floor(np.arange(_VISITS + 1) * share * distinct))[None]  # whole ones, of that mean
    one = np.ones_like(misses)
    return sizes, machine, use, Visits(one * distinct, misses, one * use.sequences * sizes.top_k, 0 * one)
