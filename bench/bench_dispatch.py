"""Latency and bytes of one layer's dispatch and combine, per dispatcher, against per-pair all-to-all as the baseline.

    torchrun --nproc-per-node 4 bench/bench_dispatch.py --ranks-per-node 2

The limit for a few tokens is the number of all-to-all rounds, for many the bytes: both are measured in the same run (a
round of 8 bytes, and a large one) and combined into `limit` = rounds x round + bytes / rate; the steps of the
hierarchical one have fewer members than the round that was measured, so that they can beat it. Experts are left out: y
is ready before the clock starts. Every candidate's output is checked first. Rounds of all candidates are interleaved.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.coherent import CoherentDispatcher
from moe.comm.dispatcher import contiguous_ranks, weighted_sum
from moe.comm.groups import Groups
from moe.comm.membership import process_groups
from moe.comm.wire import Traffic


class Candidate(NamedTuple):
    """layer() runs dispatch and combine once; check() raises if its output is wrong."""

    name: str
    layer: Callable[[], object]
    check: Callable[[], None]
    traffic: Traffic


def values_of(rows: Tensor, local_ids: Tensor) -> Tensor:
    """Identity experts: y [R, K, H] in float32."""
    return torch.where(local_ids.unsqueeze(-1) >= 0, rows.float().unsqueeze(1), 0.0)


def candidates(groups: Groups, tokens: int, args: argparse.Namespace) -> list[Candidate]:
    generator = torch.Generator().manual_seed(1000 * tokens + groups.rank)
    dtype = getattr(torch, args.dtype)
    x = torch.randn(tokens, args.hidden, generator=generator).to(dtype).to(groups.device)
    ids = torch.rand(tokens, args.experts, generator=generator).argsort(1)[:, : args.top_k].to(groups.device)
    weights = torch.rand(tokens, args.top_k, generator=generator)
    weights = (weights / weights.sum(1, keepdim=True)).to(groups.device)
    rank_of = contiguous_ranks(args.experts, groups.world_size)
    everyone = (tokens,) * groups.world_size
    expected = weighted_sum(x.float().unsqueeze(1).expand(-1, args.top_k, -1), weights, dtype)
    found = [_per_pair(groups, rank_of, x, ids, weights, expected)]

    def routed(name: str, kind: type[AllToAllDispatcher], mode: str, limit: int) -> Candidate:
        dispatcher = kind(groups, rank_of, combine=mode, broadcast_tokens=limit)  # type: ignore[arg-type]
        sent = dispatcher.dispatch(x, ids, weights, tokens_per_rank=everyone)
        y = values_of(sent.rows, sent.local_ids)

        def layer() -> Tensor:
            handle = dispatcher.dispatch(x, ids, weights, tokens_per_rank=everyone).handle
            return dispatcher.combine(y, handle)

        def check() -> None:
            _must_equal(name, layer(), expected, exact=mode == "exact")

        return Candidate(name, layer, check, dispatcher.traffic)

    def coherent(name: str, limit: int) -> Candidate:
        dispatcher = CoherentDispatcher(groups, rank_of, broadcast_tokens=limit)
        payload = torch.arange(tokens, device=groups.device)[:, None]
        sent = dispatcher.dispatch(x, ids, weights, payload=payload, tokens_per_rank=everyone)
        y = values_of(sent.rows, sent.local_ids)

        def layer() -> tuple[Tensor, Tensor]:
            handle = dispatcher.dispatch(x, ids, weights, payload=payload, tokens_per_rank=everyone).handle
            moved = dispatcher.combine(y, handle)
            return moved.out, moved.x

        def check() -> None:
            out, moved_x = layer()  # the weights of a moved token are elsewhere, but identity experts give x back
            _must_equal(name, out, moved_x, exact=False)

        return Candidate(name, layer, check, dispatcher.traffic)

    found += [
        routed("all-to-all exact", AllToAllDispatcher, "exact", 0),
        routed("all-to-all partial", AllToAllDispatcher, "partial", 0),
        routed("hierarchical exact", HierarchicalDispatcher, "exact", 0),
        routed("hierarchical partial", HierarchicalDispatcher, "partial", 0),
        coherent("coherent", 0),
    ]
    if tokens <= args.broadcast:
        found += [
            routed("all-to-all exact, broadcast", AllToAllDispatcher, "exact", tokens),
            routed("hierarchical exact, broadcast", HierarchicalDispatcher, "exact", tokens),
            coherent("coherent, broadcast", tokens),
        ]
    return found


def _per_pair(groups: Groups, rank_of: Tensor, x: Tensor, ids: Tensor, weights: Tensor, expected: Tensor) -> Candidate:
    """The baseline: a row for every (token, k) pair, there and back, as systems without de-duplication do."""
    dispatcher = AllToAllDispatcher(groups, rank_of)
    top_k = ids.shape[1]
    ones = torch.ones(ids.numel(), 1, device=x.device)
    flat = ids.reshape(-1, 1)
    sent = dispatcher.dispatch(x.repeat_interleave(top_k, 0), flat, ones)
    y = values_of(sent.rows, sent.local_ids)

    def layer() -> Tensor:
        handle = dispatcher.dispatch(x.repeat_interleave(top_k, 0), flat, ones).handle
        pairs = dispatcher.combine(y, handle).view(len(x), top_k, x.shape[1])
        return weighted_sum(pairs, weights, x.dtype)

    name = "per pair"
    return Candidate(name, layer, lambda: _must_equal(name, layer(), expected, exact=True), dispatcher.traffic)


def _must_equal(name: str, out: Tensor, expected: Tensor, *, exact: bool) -> None:
    limit = 0.0 if exact else None  # None: what fits the dtype
    torch.testing.assert_close(out, expected, rtol=limit, atol=limit, msg=lambda m: f"{name} is wrong: {m}")


def median_and_spread(groups: Groups, run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, all ranks starting together; the slowest rank counts."""
    times = []
    for _ in range(repeats):
        dist.barrier(group=groups.world)
        started = time.perf_counter()
        run()
        if groups.device.type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor([time.perf_counter() - started], device=groups.device)
        dist.all_reduce(took, dist.ReduceOp.MAX, group=groups.world)
        times.append(float(took))
    return times


def round_and_rate(groups: Groups) -> tuple[float, float]:
    """Seconds of an all-to-all of 8 bytes per peer, and off-rank bytes per second and rank of a large one."""
    size = groups.world_size

    def exchange(rows: int) -> Callable[[], object]:
        data = torch.zeros(size * rows, 1024, dtype=torch.int64, device=groups.device)
        small = torch.zeros(size, dtype=torch.int64, device=groups.device)
        sent = data if rows else small
        return lambda: dist.all_to_all_single(torch.empty_like(sent), sent, group=groups.world)

    empty, large = exchange(0), exchange(128)
    median_and_spread(groups, empty, 5)
    seconds = statistics.median(median_and_spread(groups, empty, 50))
    large_seconds = statistics.median(median_and_spread(groups, large, 10))
    return seconds, (size - 1) * 128 * 1024 * 8 / max(large_seconds - seconds, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512], help="T per rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--broadcast", type=int, default=8, help="largest T that is also tried without counts")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--ranks-per-node", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("this compares ranks; start it with torchrun --nproc-per-node 2 or more")
    with process_groups(ranks_per_node=args.ranks_per_node, timeout_s=120, device=args.device) as groups:
        report = run(groups, args)
    if groups.rank == 0:
        print(json.dumps(report))


def run(groups: Groups, args: argparse.Namespace) -> dict[str, object]:
    seconds, rate = round_and_rate(groups)
    say = print if groups.rank == 0 else (lambda *_: None)
    say(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {groups.device}")
    width = len(groups.local_ranks)
    say("command: torchrun ... " + " ".join(sys.argv))
    say(f"{groups.num_nodes} nodes x {width} ranks; H {args.hidden}, E {args.experts}, K {args.top_k}")
    say(f"one empty round {seconds * 1e6:.0f} us; large round {rate / 1e6:.0f} MB/s per rank; MB/layer is of rank 0")
    rows: list[dict[str, object]] = []
    for tokens in args.tokens:
        tried = candidates(groups, tokens, args)
        for candidate in tried:
            candidate.check()
            candidate.traffic.reset()
        times: dict[str, list[float]] = {candidate.name: [] for candidate in tried}
        for _ in range(args.repeats):
            for candidate in tried:  # interleaved: noise of the machine meets all of them
                times[candidate.name] += median_and_spread(groups, candidate.layer, 1)
        baseline = statistics.median(times[tried[0].name])
        say(f"\nT = {tokens} per rank")
        heads = f"{'ms':>9}{'quartiles':>18}{'x base':>8}{'rounds':>8}{'MB':>9}{'cross MB':>10}{'% limit':>9}"
        say(f"{'dispatcher':<32}{heads}")
        for candidate in tried:
            low, middle, high = statistics.quantiles(times[candidate.name], n=4)
            traffic, n = candidate.traffic, args.repeats
            sent = (sum(traffic.bytes_to) + sum(traffic.control_bytes_to)) / n
            rounds = traffic.collectives / n
            limit = rounds * seconds + sent / rate
            say(
                f"{candidate.name:<32}{middle * 1e3:9.2f}{f'{low * 1e3:.2f} - {high * 1e3:.2f}':>18}"
                f"{baseline / middle:8.2f}{rounds:8.1f}{sent / 1e6:9.3f}{traffic.cross_node_bytes / n / 1e6:10.3f}"
                f"{100 * limit / middle:9.0f}"
            )
            rows.append(
                {
                    "tokens": tokens, "dispatcher": candidate.name, "ms": middle * 1e3,
                    "ms_quartiles": [low * 1e3, high * 1e3],
                    "x_baseline": baseline / middle, "rounds": rounds, "bytes": sent,
                    "cross_node_bytes": traffic.cross_node_bytes / n, "limit_ms": limit * 1e3,
                }
            )  # fmt: skip
    return {
        "bench": "dispatch", "world_size": groups.world_size, "ranks_per_node": len(groups.local_ranks),
        "hidden": args.hidden, "experts": args.experts, "top_k": args.top_k, "dtype": args.dtype,
        "round_us": seconds * 1e6, "rate_mb_s": rate / 1e6, "torch": torch.__version__, "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    main()
