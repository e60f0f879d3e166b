"""`moe place --window`: one turn of the loop (`placement.online`) by hand, on the newest tokens of a trace."""

import argparse

import numpy as np

from moe.offload.budget import format_bytes
from moe.placement.loop_options import LoopOptions
from moe.placement.plan import Plan
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.turn import Machine, Question, Turn, Window, take_turn
from moe.placement.wire_format import ModelSizes, WireFormat


def run_turn(trace: RoutingTrace, sizes: ModelSizes, topology: Topology, args: argparse.Namespace) -> int:
    """Prints what the turn decided and why, and writes the plan that serves next: few moves from the present, or it."""
    if args.present is None:
        raise ValueError("--window takes a turn near a running plan; name it with --present PLAN")
    if args.objective != "auto" or args.replicas:
        raise ValueError(
            f"--window moves copies of the present plan (replicas as it has them) by the time predicted; leave out "
            f"--objective ({args.objective}) and --replicas ({args.replicas:g})"
        )
    present = Plan.load(args.present)
    turn = turn_of(trace, sizes, present, topology, args)
    print(f"on the newer half of {min(args.window, trace.num_tokens)} tokens: {turn.before}")
    if turn.migration is None:
        print(f"the present plan stays: {turn.reason}")
    else:
        share = turn.num_moved / int(present.hosted.sum())
        print(
            f"moves found on the older half take it to: {turn.after}\n{turn.num_moved} copies move ({share:.1%}), "
            f"{format_bytes(turn.migration.num_bytes)} in {len(turn.migration.steps)} steps, "
            f"{turn.migration.seconds:.3g} s"
        )
    plan = present if turn.migration is None else turn.migration.target
    plan.with_result(sizes=sizes).save(args.out)
    return 0


def turn_of(
    trace: RoutingTrace, sizes: ModelSizes, present: Plan, topology: Topology, args: argparse.Namespace
) -> Turn:
    """The turn on the trace's last tokens, at home on the ranks that their sequences were dealt to."""
    rows = slice(max(0, trace.num_tokens - args.window), None)
    home = np.repeat(np.arange(trace.num_sequences) % present.num_ranks, trace.sequence_lengths)
    machine = Machine(
        sizes=sizes,
        wire=WireFormat(dispatcher=args.dispatcher, combine=args.combine),
        topology=topology,
        fast_slots=args.fast_slots,
    )
    options = LoopOptions(window=args.window, bytes_per_step=args.bytes_per_step)
    return take_turn(Question(present, Window(trace.expert_ids[rows], home[rows]), machine, options))
