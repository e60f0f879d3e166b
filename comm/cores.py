"""Processor cores of its own for each rank of a node.

Ranks wait for each other in every layer, so they must run at the same time. A kernel that is left to itself may keep
two of them on one core for many seconds while another core idles: on virtual machines a core that sleeps can look
taken. Then they take turns (bench/results/cluster.md: 2.2 x the time).
"""

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache

log = logging.getLogger(__name__)

Cores = frozenset[int]


@cache
def allowed_cores() -> Cores:
    """What this process may run on, as its first call found it; empty where the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def share_of(allowed: Sequence[Cores], index: int) -> Cores:
    """The cores of one of several processes, given what each may use.

    Those that may use the same divide it evenly, neighbours together. All of it where cores are fewer than processes.
    """
    own = allowed[index]
    sharers = [i for i, cores in enumerate(allowed) if cores == own]
    place, count, cores = sharers.index(index), len(sharers), sorted(own)
    if len(cores) < count:
        return own
    return frozenset(cores[len(cores) * place // count : len(cores) * (place + 1) // count])


def beside(shares: Sequence[Cores], threads: int) -> Cores:
    """Where other work of the node runs, given the cores of its ranks and how many threads each computes with: where
    a rank has more cores than threads; all that they have if none does."""
    spare = [cores for cores in shares if len(cores) > threads]
    return frozenset().union(*(spare or shares))


def run_on(cores: Collection[int]) -> None:
    """Moves every thread of this process; those that it starts later go with them. No effect without cores; where the
    system does not let it, threads stay where they are, and a line of the log says so."""
    try:
        for thread in os.listdir("/proc/self/task") if cores else ():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cores)
    except OSError as error:
        log.warning(
            "threads stay on the processor cores that they have, not on %s: %s", to_text(frozenset(cores)), error
        )


def to_text(cores: Cores) -> str:
    return ",".join(map(str, sorted(cores)))


def from_text(text: str) -> Cores:
    return frozenset(int(one) for one in text.split(",") if one)
