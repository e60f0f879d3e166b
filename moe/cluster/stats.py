"""What a cluster counts (moe/metrics.py reads it), and what happened to it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from moe.engine.stats import State
from moe.histogram import Histogram
from moe.placement.loop import PlacementStats
from moe.placement.plan import Plan


@dataclass(slots=True)
class ClusterStats:
    """Of the controller. Gauges are set when a generation starts, or read just before they are shown."""

    generations: int = field(default=0, metadata={"help": "Generations of hosts that were started"})
    lost_hosts: int = field(default=0, metadata={"help": "Hosts that ended, hung or did not load"})
    replayed_requests: int = field(default=0, metadata={"help": "Requests given to another host after a loss"})
    settle_time: Histogram = field(
        default_factory=Histogram,
        metadata={
            "help": "From the sign that a generation must end to the start of the next",
            "unit": "seconds",
            "kind": "histogram",
        },
    )
    hosts: int = field(default=0, metadata={"help": "Hosts that serve", "kind": "gauge"})
    queued_requests: int = field(default=0, metadata={"help": "Requests that no host has yet", "kind": "gauge"})
    open_requests: int = field(default=0, metadata={"help": "Requests that are not finished", "kind": "gauge"})
    placement: PlacementStats = field(default_factory=PlacementStats)  # a record of its own for moe/metrics.py


class Noted(NamedTuple):
    """Something that happened to the cluster. at: seconds since the epoch."""

    at: float
    what: str
    hosts: tuple[int, ...]
    generation: int
    seconds: dict[str, float]

    def told(self) -> str:
        """As a sentence for people."""
        hosts = f"host{'s' * (len(self.hosts) != 1)} {', '.join(map(str, self.hosts)) or '–'}"
        return f"generation {self.generation}, {hosts}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class HostStatus:
    """One host. what: serves, waits (loaded) or loads. experts: of all layers, that the plan gives it; loaded: its
    memory when it had loaded."""

    number: int
    what: str
    rank: int | None
    node: str
    pid: int
    requests: int
    experts: int
    loaded: State | None
    free_blocks: int
    steps: int
    silent_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStatus:
    """A cluster at one moment. noted: what happened last."""

    model: str
    state: str
    generation: int
    target: int
    hosts: tuple[HostStatus, ...]
    plan: Plan | None
    counts: ClusterStats
    noted: tuple[Noted, ...]

    def engine_state(self, num_experts: int) -> State:
        """As of one engine: what all that serve have together."""
        serving = [host for host in self.hosts if host.what == "serves"]
        loaded = [host.loaded for host in serving if host.loaded is not None]
        return State(
            running=self.counts.open_requests - self.counts.queued_requests,
            waiting=self.counts.queued_requests,
            blocks=sum(one.blocks for one in loaded),
            free_blocks=sum(host.free_blocks for host in serving),
            slots=sum(one.slots for one in loaded),
            experts=num_experts,
            slot_bytes=sum(one.slot_bytes for one in loaded),
            dense_bytes=sum(one.dense_bytes for one in loaded),
            peak_rss_bytes=sum(one.peak_rss_bytes for one in loaded),
        )
