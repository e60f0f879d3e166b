"""What a cluster counts (moe/metrics.py reads it), and what happened to it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from moe.histogram import Histogram


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


class Noted(NamedTuple):
    """Something that happened to the cluster. at: seconds since the epoch."""

    at: float
    what: str
    hosts: tuple[int, ...]
    generation: int
    seconds: dict[str, float]
