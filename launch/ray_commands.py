"""`moe ray status|scale|stop`: the controller of a service on a Ray cluster, found by its name."""

import argparse
import dataclasses
import json
import time
from typing import TYPE_CHECKING

from rich.table import Table

from moe.config import ClusterConfig
from moe.launch.console import err, out

if TYPE_CHECKING:
    from moe.cluster.resident import Controllers

_LOOK_S = 0.5
_ANSWER_S = 2 * ClusterConfig().answer_s  # for the controller to answer; what it waits for itself has half of it


def run(args: argparse.Namespace) -> int:
    return {"status": show_status, "scale": scale, "stop": stop}[args.verb](args)


def show_status(args: argparse.Namespace) -> int:
    """Hosts, generation, plan and load; args.json: as one document."""
    controllers = _controllers(args)
    status, _ = controllers.answer(controllers.find().status.remote(), _ANSWER_S)
    if args.json:
        plan = status.plan and {"solver": status.plan.solver, "hosted": status.plan.hosted.astype(int).tolist()}
        print(json.dumps(dataclasses.asdict(dataclasses.replace(status, plan=None)) | {"plan": plan}, default=str))
        return 0
    counts = status.counts
    replicated = 0 if status.plan is None else int((status.plan.replicas > 1).sum())
    placed = "none" if status.plan is None else status.plan.solver
    replicas = f", {replicated} experts on several hosts" if replicated else ""
    out.print(
        f"{status.model}: {status.state}, generation {status.generation}, placement {placed}{replicas}; "
        f"{counts.open_requests} requests open, {counts.queued_requests} of them queued; "
        f"{counts.lost_hosts} hosts lost, {counts.replayed_requests} requests replayed",
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in (
        "host",
        "rank",
        "",
        "node",
        "pid",
        "requests",
        "experts",
        "slots",
        "free KV blocks",
        "steps",
        "silent",
    ):
        table.add_column(name, justify="left" if name in ("", "node") else "right")
    for host in status.hosts:
        loaded = host.loaded
        slots, blocks = ("", "") if loaded is None else (loaded.slots, f"{host.free_blocks} of {loaded.blocks}")
        rank = "" if host.rank is None else host.rank
        who = (host.number, rank, host.what, host.node[:8], host.pid or "")
        does = (host.requests, host.experts, slots, blocks, host.steps, f"{host.silent_s:.1f} s")
        table.add_row(*map(str, (*who, *does)))
    out.print(table)
    for note in status.noted[-8:]:
        when = time.strftime("%H:%M:%S", time.localtime(note.at))
        out.print(f"{when} {note.told()}", markup=False)
    return 0


def scale(args: argparse.Namespace) -> int:
    """Returns when args.num_hosts serve, or at once with args.no_wait.

    Raises ValueError when Ray has no room for them after `cluster.room_s`, or one did not load and may not be replaced:
    then those that were there serve on.
    """
    controllers = _controllers(args)
    controller, answer = controllers.find(), controllers.answer
    before, _ = answer(controller.status.remote(), _ANSWER_S)
    asked = max((note.at for note in before.noted), default=0.0)  # by the controller's clock
    answer(controller.scale.remote(args.num_hosts), _ANSWER_S)
    while not args.no_wait:
        status, _ = answer(controller.status.remote(), _ANSWER_S)
        if status.target != args.num_hosts:
            notes = [note.what for note in status.noted if note.at > asked]
            whys = [what for what in notes if "no room" in what or "did not load" in what]
            why = whys[-1] if whys else "another number was asked for meanwhile"
            raise ValueError(f"{args.num_hosts} hosts do not serve, {status.target} do or will: {why}")
        if sum(host.what == "serves" for host in status.hosts) == args.num_hosts:
            break
        time.sleep(_LOOK_S)
    err.print(f"{args.num_hosts} hosts {'are asked for' if args.no_wait else 'serve'}", markup=False)
    return 0


def stop(args: argparse.Namespace) -> int:
    controllers = _controllers(args)
    controllers.find()
    controllers.stop(_ANSWER_S)
    return 0


def _controllers(args: argparse.Namespace) -> "Controllers":
    """Raises ValueError if no cluster answers."""
    try:
        from moe.cluster.resident import Controllers
    except ImportError as error:
        raise ValueError(f"this needs Ray, which is not installed ({error}); pip install 'moeflow[ray]'") from None
    return Controllers(args.controller, args.address or "auto")
