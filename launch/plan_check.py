"""What the plan says of a run that has been, beside what it did: printed after a run, kept in its recording."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.engine.choices import probed
from moe.engine.engine import Engine
from moe.launch.plan_inputs import sizes_of
from moe.placement.cost import Use, Visits, decode_step
from moe.placement.machine import Machine, disk_of

_VISITS = 100


class Checked(NamedTuple):
    """Tokens a second of decoding. binds: the plan's largest term."""

    planned: float
    measured: float
    binds: str

    def __str__(self) -> str:
        return f"{self.planned:.1f} tokens/s ({self.binds} binds), {self.planned / self.measured - 1:+.0%} off"


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
    return Checked(sequences / step.total, stats.decode_rate, step.binds)


def checked_state(engine: Any) -> dict[str, Any]:
    """For a recording; nothing of a run that has no engine here."""
    found = checked(engine) if isinstance(engine, Engine) else None
    if found is None:
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
