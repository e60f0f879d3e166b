"""What a service does at the moment: as data, and in a terminal (`moe top URL`)."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from moe.launch.console import out
from moe.metrics import shown

if TYPE_CHECKING:
    from moe.llm import LLM
    from moe.placement.plan import Plan
    from moe.service import Service


def live_state(llm: "LLM", service: "Service | None" = None) -> dict[str, Any]:
    """Totals since the start; whoever shows rates takes differences. service: None for a run without one.

    heat: per layer, per expert, whether in a slot; events: what happened to hosts; plan: per layer, per expert, the
    rank of its first copy, None without hosts.
    """
    engine = llm.engine
    state, layers = engine.state(), engine.layer_stats()
    cache = engine.experts.cache if engine.experts is not None else None
    return {
        "model": llm.name,
        "time": time.time(),
        "ill": None if service is None else service.why_ill,
        "open": state.running + state.waiting if service is None else service.stats.open,
        "running": state.running,
        "waiting": state.waiting,
        "tokens": engine.stats.prefill_tokens + engine.stats.decode_tokens,
        "free_blocks": state.free_blocks,
        "blocks": state.blocks,
        "slots": state.slots,
        "experts": state.experts,
        "hits": sum(s.hits for s in layers),
        "misses": sum(s.misses for s in layers),
        "bytes_read": sum(s.bytes_read for s in layers),
        "stall_seconds": sum(s.stall_seconds for s in layers),
        "first_token_p50": engine.stats.time_to_first_token.quantile(0.5),
        "token_p99": None if service is None else service.stats.time_between_tokens.quantile(0.99),
        "layers": [[s.hits, s.misses] for s in layers],
        "events": [{"time": one.at, "what": one.told()} for one in getattr(engine, "noted", ())],
        "plan": _ranks_of(getattr(engine, "plan", None)),
        "heat": [] if cache is None else [(cache.resident_slots(n) >= 0).tolist() for n in range(len(layers))],
    }


def _ranks_of(plan: "Plan | None") -> list[list[int]] | None:
    return None if plan is None else (plan.log2phy[:, :, 0] // plan.physical_per_rank).tolist()


def top(args: argparse.Namespace) -> int:
    """A table that follows the service at args.url until Ctrl-C. args.once: print it once."""
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise ValueError(f"moe top needs httpx ({error}): pip install 'moeflow[serve]'") from None
    from rich.live import Live

    from moe.client import server_address

    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    before: dict[str, Any] | None = None
    with httpx.Client(base_url=server_address(args.url), headers=headers, timeout=10) as client:

        def fetch() -> dict[str, Any]:
            try:
                found: dict[str, Any] = client.get("/live").raise_for_status().json()
                _table(found, None)
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"{args.url} does not answer as a moe service: {why}") from None
            return found

        now = fetch()
        if args.once:
            out.print(_table(now, None))
            return 0
        with Live(_table(now, before), console=out, refresh_per_second=2) as live:
            while True:
                time.sleep(1)
                try:
                    before, now = now, fetch()
                    live.update(_table(now, before))
                except ValueError as error:  # it may be started again
                    live.update(str(error))


def _table(now: dict[str, Any], before: dict[str, Any] | None) -> Any:
    from rich.table import Table

    if before is not None and before["tokens"] > now["tokens"]:  # it was started again
        before = None
    earlier = before or {"time": now["time"] - 1, "tokens": now["tokens"], "bytes_read": now["bytes_read"]}
    seconds = max(1e-9, now["time"] - earlier["time"])
    table = Table(title=now["model"] if now["ill"] is None else f"{now['model']}: {now['ill']}", show_header=False)
    table.add_row("tokens/s", f"{(now['tokens'] - earlier['tokens']) / seconds:.1f}")
    table.add_row("requests", f"{now['open']} open, {now['running']} running, {now['waiting']} waiting for a place")
    table.add_row("KV blocks", f"{now['blocks'] - now['free_blocks']} of {now['blocks']} in use")
    slots, experts = now["slots"], now["experts"]
    # Replicas, and hosts whose share has become smaller, have more slots than the model has experts.
    held = f"{slots} of {experts} in slots" if slots <= experts else f"{slots} slots for {experts} experts"
    if uses := now["hits"] + now["misses"]:  # hosts keep theirs
        table.add_row("experts", f"{held}, {now['hits'] / uses:.1%} hits")
        read = shown((now["bytes_read"] - earlier["bytes_read"]) / seconds, "bytes")
        table.add_row("read", f"{read}/s, waited {now['stall_seconds']:.1f} s in all")
    else:
        table.add_row("experts", held)
    table.add_row("time to first token", _at_most(now["first_token_p50"], "median"))
    table.add_row("between tokens", _at_most(now["token_p99"], "99 %"))
    return table


def _at_most(seconds: float, which: str) -> str:
    return f"at most {seconds * 1000:.0f} ms ({which})" if seconds else "–"
