"""What the hosts of a crew do, for `moe ray status`, the service's page and the metrics."""

from dataclasses import replace

from moe.cluster.crew import Crew
from moe.cluster.fleet import Host
from moe.cluster.stats import ClusterStatus, HostStatus


def status_of(crew: Crew, model: str) -> ClusterStatus:
    """From any thread: what it shows may be a step old."""
    rows, plan = [], crew.plan
    for what, hosts in (("serves", crew.alive), ("waits", crew.spare), ("loads", list(crew.loading.values()))):
        for place, host in enumerate(hosts):
            rank = place if what == "serves" else None
            experts = 0 if plan is None or rank is None else int(plan.hosted[:, :, rank].sum())
            rows.append(_row(crew, host, what, rank, experts))
    return ClusterStatus(
        model=model,
        state=crew.state.name.lower(),
        generation=crew.generation,
        target=crew.target,
        hosts=tuple(rows),
        plan=plan,
        counts=replace(crew.counted()),
        noted=tuple(crew.noted[-20:]),
    )


def _row(crew: Crew, host: Host, what: str, rank: int | None, experts: int) -> HostStatus:
    info, line = host.info, crew.lines.get(host.number)
    silent, _ = (0.0, 0.0) if line is None else crew.lines.since(line)
    return HostStatus(
        number=host.number,
        what=what,
        rank=rank,
        node="" if info is None else info.node,
        pid=0 if info is None else info.pid,
        requests=crew.ledger.load(host.number),
        experts=experts,
        loaded=None if info is None else info.state,
        free_blocks=0 if line is None else line.free_blocks,
        steps=0 if line is None else line.steps,
        silent_s=silent,
    )
