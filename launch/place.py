"""`moe place` and `moe simulate`: from a routing trace to a plan and to what it will cost."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe.launch.turn import run_turn
from moe.offload.budget import format_bytes
from moe.placement.deadline import Deadline
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.migrate import plan_migration, relabel
from moe.placement.plan import Plan, check_capacity
from moe.placement.simulate import Simulation, Workload, simulate
from moe.placement.solve.anneal import VISITS, Price
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.copies_bound import copies_bound
from moe.placement.solve.program import Program, Weights
from moe.placement.solve.swaps import CopyOptions
from moe.placement.solve.transitions import exflow_program, solve_transitions
from moe.placement.stats.affinity import expert_load, transition_counts
from moe.placement.stats.report import (
    Picture,
    bars_svg,
    cell_text,
    grid_svg,
    heatmap_svg,
    save_png,
    table_html,
    write_page,
)
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace, read_npz
from moe.placement.wire_format import ModelSizes, WireFormat


def run_place(args: argparse.Namespace) -> int:
    """Solve on the fitted part, judge on the rest beside baselines, write the plan."""
    trace, topology = stated(read_trace(args.trace), args.sizes, args.trace), read_topology(args.topology)
    if args.window is not None:
        return run_turn(trace, WireFormat.needs(trace.sizes, str(args.trace)), topology, args)
    if args.objective == "bytes" or args.present:
        WireFormat.needs(trace.sizes, str(args.trace))
    if args.objective == "auto":
        known = "copies" if trace.sizes is None else "bytes"
        args.objective = "coherent" if args.dispatcher == "coherent" else known
    if trace.sizes is None:
        print(
            f"note: {args.trace} does not say the model's sizes: placed by {args.objective}, and neither bytes, times "
            "nor memory are judged; state them with --sizes HIDDEN,DTYPE,EXPERT_BYTES",
            file=sys.stderr,
        )
    fit, held = trace.split(args.fit, args.seed) if trace.num_sequences > 1 else (trace, trace)
    slots = slots_per_rank(trace.num_experts, topology, args.replicas, trace.num_layers, trace.sizes)
    present = Plan.load(args.present) if args.present else None
    if args.objective in _TRANSITIONS:
        plan = _place_transitions(fit, topology, slots, present, args)
    else:
        plan = _place_copies(fit, topology, slots, args)
    if args.objective == "coherent" and args.dispatcher != "coherent":
        print(f"note: placed for coherent decode but judged with --dispatcher {args.dispatcher}", file=sys.stderr)
    if present is not None:
        layers_apart = args.objective in ("bytes", "copies") and topology.num_nodes == 1
        plan = _no_worse(
            present, relabel(present, plan, nodes=topology.node_of_rank, per_layer=layers_apart), fit, topology, args
        )
    shape = (trace.num_layers, trace.num_experts, topology.num_ranks)
    plans = {
        "contiguous": Plan.contiguous(*shape),
        "eplb greedy": eplb_greedy(expert_load(fit), topology.num_ranks, slots),
        "this plan": plan,
    }
    if present is not None:
        plans["present"] = present
    judged = held if held.sizes is not None else replace(held, sizes=_ANY_SIZES)
    results = {name: simulate(judged, p, topology, _workload(args)) for name, p in plans.items()}
    rows = [_row(name, result, knows_sizes=held.sizes is not None) for name, result in results.items()]
    show(f"held-out {held.num_sequences} sequences, {held.num_tokens} tokens", _HEADER, rows)
    proof = "no bound for this objective"
    if plan.bound is not None and plan.gap is not None:
        proof = f"bound {plan.bound:.4f}, gap {plan.gap:.2%}, by {plan.solver}"
    value = "not known" if plan.value is None else f"{plan.value:.4f}"
    sent = f"{results['this plan'].copies:.3f} copies" if trace.sizes is None else f"{rows[2][1]} bytes"
    print(f"{sent} per token and layer; {plan.objective} {value}, {proof}")
    plan = plan.with_result(sizes=trace.sizes)
    plan.save(args.out)
    if present is not None:
        _report_migration(present, plan, topology, args, results, _sizes(trace).expert_bytes)
    _write_pictures(plans, fit, table_html(rows, _HEADER), results, args)
    return 0


def _write_pictures(
    plans: dict[str, Plan],
    fit: RoutingTrace,
    table: str,
    results: dict[str, Simulation],
    args: argparse.Namespace,
) -> None:
    """Where --html and --png ask for them. plans: those judged; fit: the part that was placed by."""
    plan, load = plans["this plan"], expert_load(fit)
    if args.html:
        parts = [
            table,
            _TOLD,
            grid_svg(plans.get("present", plans["contiguous"]), title="Experts by rank, before", load=load),
            grid_svg(plan, title="Experts by rank, after", load=load),
            bars_svg(
                {n: r.layer_copies for n, r in results.items()},
                title="Copies of a token that leave its rank, on held-out text",
                unit="copies per token",
            ),
        ]
        write_page(args.html, f"Placement of {fit.model}", parts)
    if args.png:
        save_png(args.png, {n: Picture(_rank_of_expert(p), "layer", "expert", "rank") for n, p in plans.items()})


def run_simulate(args: argparse.Namespace) -> int:
    """Replay a trace on a plan and on the contiguous one."""
    trace, plan, topology = read_trace(args.trace), Plan.load(args.plan), read_topology(args.topology)
    trace = stated(trace, args.sizes, args.trace, plan.sizes)
    WireFormat.needs(trace.sizes, str(args.trace))
    result = simulate(trace, plan, topology, _workload(args))
    base = simulate(
        trace, Plan.contiguous(plan.num_layers, plan.num_experts, plan.num_ranks), topology, _workload(args)
    )
    rows = [_row("contiguous", base), _row(args.plan.name, result)]
    show(f"{trace.num_tokens} tokens in {result.num_steps} steps", _HEADER, rows)
    names = [f"rank {g}" for g in range(plan.num_ranks)]
    links = [(name, *(int(b) for b in row)) for name, row in zip(names, result.link_bytes, strict=True)]
    show("bytes by link, from row to column", ("", *names), links)
    pictures = {
        "Bytes by link": Picture(result.link_bytes, "sending rank", "receiving rank", "bytes"),
        "Load": Picture(result.load, "layer", "rank", "tokens"),
    }
    if args.html:
        parts = [
            table_html(rows, _HEADER),
            _TOLD,
            grid_svg(plan, title="Experts by rank", load=expert_load(trace)),
            *(heatmap_svg(one, title=name, cell=24) for name, one in pictures.items()),
        ]
        write_page(args.html, f"Simulation of {trace.model}", parts)
    if args.png:
        save_png(args.png, pictures)
    return 0


def read_trace(path: Path) -> RoutingTrace:
    """A trace of our own format, or an array copy of ESFT's logs."""
    if path.suffix == ".npz" and path.is_file() and "gate_weights_e4" in read_npz(path):
        return from_deepseek_esft_npz(path)
    return RoutingTrace.load(path)


def stated(trace: RoutingTrace, told: str | None, path: Path, otherwise: ModelSizes | None = None) -> RoutingTrace:
    """The trace with its sizes: its own, those of the plan, or `told` where neither says; maybe none at all."""
    own = trace.sizes or otherwise
    given = None if told is None else ModelSizes.parse(told)
    if own is not None and given is not None and own != given:
        raise ValueError(f"--sizes says {given}, {path} says {own}; leave --sizes out")
    return replace(trace, sizes=own or given)


def _sizes(trace: RoutingTrace) -> ModelSizes:
    return WireFormat.needs(trace.sizes, trace.model)


def read_topology(name: str) -> Topology:
    """A JSON file, or a preset's name."""
    return Topology.load(name) if name.endswith(".json") else Topology.preset(name)


def slots_per_rank(
    num_experts: int, topology: Topology, replicas: float, num_layers: int, sizes: ModelSizes | None
) -> int | None:
    """Copies per rank and layer; None without replicas. Raises ValueError for more than ranks have room for, and where
    sizes are known if fast plus host memory cannot hold them."""
    expert_bytes = 0 if sizes is None else sizes.expert_bytes
    slots = None
    if replicas > topology.num_ranks - 1:
        raise ValueError(
            f"--replicas ({replicas:g}) is a share of the {num_experts} experts, and {topology.num_ranks - 1} puts all "
            f"of them on each of {topology.num_ranks} ranks; give {1 / num_experts:g} for each spare slot"
        )
    if replicas:
        slots = int(num_experts * (1 + replicas)) // topology.num_ranks
        check_capacity(num_experts, topology.num_ranks, slots, expert_bytes)
    if topology.fast_bytes is not None and topology.host_bytes is not None:
        need = num_layers * (num_experts if slots is None else slots * topology.num_ranks) * expert_bytes
        have = sum(topology.fast_bytes) + sum(topology.host_bytes)
        if need > have:
            raise ValueError(
                f"the experts need {need} bytes, fast and host memory hold {have}: {need - have} bytes are missing"
            )
    return slots


def _place_transitions(
    fit: RoutingTrace, topology: Topology, slots: int | None, present: Plan | None, args: argparse.Namespace
) -> Plan:
    deadline = Deadline(args.seconds)
    with _bar() as progress:
        plan = solve_transitions(
            _program(fit, topology, args), seconds=deadline, rounds=args.rounds, seed=args.seed, slots=slots,
            present=present, progress=progress,
        )  # fmt: skip
    _tell_limit(deadline, args)
    return plan.with_result(objective=_TRANSITIONS[args.objective], model=fit.model)


def _place_copies(fit: RoutingTrace, topology: Topology, slots: int | None, args: argparse.Namespace) -> Plan:
    is_coherent = args.objective == "coherent"
    has_bound = not is_coherent and slots is None and not topology.node_weight
    deadline = Deadline(args.seconds)
    options = CopyOptions(
        seconds=deadline.at(0.6) if has_bound else deadline,
        rounds=args.rounds,
        seed=args.seed,
        coherent=is_coherent,
        nodes=topology.node_of_rank,
        node_weight=topology.node_weight,
    )
    with _bar() as progress:
        plan = solve_copies(
            fit,
            topology.num_ranks,
            slots_per_rank=slots,
            options=options,
            price=Price.of(_workload(args).wire, _sizes(fit), fit.top_k) if args.objective == "bytes" else VISITS,
            progress=progress,
        )
    _tell_limit(deadline, args)
    if has_bound:
        bound = copies_bound(fit, topology.num_ranks, seconds=deadline, hint=plan.hosted, iterations=args.rounds)
        plan = plan.with_result(bound=min(float(bound.mean()), plan.value or 0.0))
    return plan


@contextmanager
def _bar() -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal's stderr; called with the share that is done."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("placing", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _tell_limit(deadline: Deadline, args: argparse.Namespace) -> None:
    if deadline.has_cut:
        print(
            f"note: the limit of {args.seconds:.0f} s shortened the search; more seconds may better it, and only a "
            "search that ends by its rounds gives the same plan again",
            file=sys.stderr,
        )


def _no_worse(present: Plan, plan: Plan, fit: RoutingTrace, topology: Topology, args: argparse.Namespace) -> Plan:
    """The new plan if it costs less than the present one on the fitted part, else the present one."""
    if args.objective in _TRANSITIONS:
        program = _program(fit, topology, args)
        old, new, unit = program.cost(present), program.cost(plan), "of the program"
    else:
        old, new = (simulate(fit, p, topology, _workload(args)).bytes for p in (present, plan))
        unit = "bytes per token and layer"
    if new < old:
        return plan
    print(f"the present plan is kept: {old:.4g} {unit}, and nothing better than {new:.4g} was found")
    return present.with_result(objective=plan.objective, value=None, bound=None, seconds=plan.seconds)


def _program(fit: RoutingTrace, topology: Topology, args: argparse.Namespace) -> Program:
    if fit.num_layers < 2:
        raise ValueError(f"--objective {args.objective} needs two layers at least; use --objective bytes or copies")
    if args.objective == "exflow":
        if args.load_weight:
            raise ValueError("ExFlow's program has no load in it; leave --load-weight out or use transitions")
        return exflow_program(fit, topology.num_ranks)
    return Program.even(
        transition_counts(fit, pairs="home"), topology.num_ranks, load=expert_load(fit), link_cost=topology.link_cost(),
        weights=Weights(load=args.load_weight),
    )  # fmt: skip


def _report_migration(
    present: Plan,
    plan: Plan,
    topology: Topology,
    args: argparse.Namespace,
    results: dict[str, Simulation],
    expert_bytes: int,
) -> None:
    times = (results["present"].step_seconds, results["this plan"].step_seconds)
    move = plan_migration(
        present,
        plan,
        topology,
        expert_bytes=expert_bytes,
        bytes_per_step=args.bytes_per_step,
        seconds_per_step=times,
    )
    print(
        f"migration: {format_bytes(move.num_bytes)} in {len(move.steps)} steps, {move.seconds:.3g} s; "
        f"saves {move.saving * 1e3:.3f} ms per step, pays back after {move.steps_to_pay:.0f} steps"
    )


def _rank_of_expert(plan: Plan) -> Any:
    return plan.hosted.argmax(axis=2)


_TRANSITIONS = {"transitions": "program", "exflow": "rank changes / step of top-1 paths"}  # objectives of plans
_HEADER = (
    "plan",
    "bytes/token/layer",
    "across nodes",
    "copies",
    "node copies",
    "max/mean",
    "in step",
    "miss rate",
    "a2a s",
    "step ms",
)
_TOLD = (
    "<p>Per token and layer: bytes that go to other ranks and back, of them between nodes, copies of the token that "
    "leave its rank, of them between nodes. max/mean: the busiest rank's load over the mean rank's, of all tokens, and "
    "as it is in a step. miss rate: of experts that are not in a slot. a2a s: seconds of exchange, all steps together. "
    "step ms: what a step takes by the topology.</p>"
)

_ANY_SIZES = ModelSizes(hidden_size=1, dtype="float32", expert_bytes=1)  # copies and load do not depend on them


def _row(name: str, r: Simulation, knows_sizes: bool = True) -> tuple[Any, ...]:
    sent = (round(r.bytes), round(r.node_bytes)) if knows_sizes else ("?", "?")
    times = (r.all_to_all_seconds, r.step_seconds * 1e3) if knows_sizes else ("?", "?")
    return (name, *sent, r.copies, r.node_copies, r.imbalance, r.step_imbalance, r.miss_rate, *times)


def show(title: str, header: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    """Print a table; numbers stand right."""
    table = Table(title=title, title_justify="left")
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell_text(value) for value in row))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def _workload(args: argparse.Namespace) -> Workload:
    return Workload(
        batch=args.batch,
        steps=args.steps,
        wire=WireFormat(dispatcher=args.dispatcher, combine=args.combine),
        fast_slots=args.fast_slots,
    )
