"""Four hosts on one machine: network namespaces, two nodes of two, and one link between the nodes that can be shaped.

    host 0 ─┐             ┌─ host 2
            ├─ node 0 ═══ node 1          ═══ shaped with a token bucket, bytes counted here
    host 1 ─┘             └─ host 3

Needs root and iproute2. A kernel without the netem queue cannot add latency: `why_not` says so.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_HOSTS, HOSTS_PER_NODE = 4, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the link between the nodes, each way. mbit: None leaves it as fast as it is; delay_ms needs netem."""

    mbit: int | None = None
    delay_ms: float = 0.0


def run_ip(*arguments: str, namespace: str | None = None, tool: str = "ip") -> str:
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    done = subprocess.run([*inside, tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{tool} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not(shape: Shape = Shape()) -> str | None:
    """The reason why hosts with such a link cannot be made here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "ip and tc are not installed (package iproute2)"
    try:
        with hosts(shape):
            return None
    except OSError as error:
        return str(error)


@contextmanager
def hosts(shape: Shape = Shape()) -> Iterator[list[str]]:
    """Yields the four hosts' namespaces; 10.99.0.1 to 10.99.0.4 inside. Removes everything at the end."""
    prefix = f"moe{os.getpid()}"
    names = [f"{prefix}h{i}" for i in range(NUM_HOSTS)]
    nodes = [f"{prefix}n{i}" for i in range(NUM_HOSTS // HOSTS_PER_NODE)]
    try:
        for node in nodes:
            run_ip("netns", "add", node)
            run_ip("link", "add", "switch", "type", "bridge", namespace=node)
            run_ip("link", "set", "switch", "up", namespace=node)
        for i, name in enumerate(names):
            run_ip("netns", "add", name)
            node = nodes[i // HOSTS_PER_NODE]
            run_ip("link", "add", f"h{i}", "netns", node, "type", "veth", "peer", "name", "eth0", "netns", name)
            run_ip("link", "set", f"h{i}", "master", "switch", "up", namespace=node)
            run_ip("addr", "add", f"10.99.0.{i + 1}/24", "dev", "eth0", namespace=name)
            run_ip("link", "set", "eth0", "up", namespace=name)
            run_ip("link", "set", "lo", "up", namespace=name)
        run_ip("link", "add", "trunk", "netns", nodes[0], "type", "veth", "peer", "name", "trunk", "netns", nodes[1])
        for node in nodes:
            run_ip("link", "set", "trunk", "master", "switch", "up", namespace=node)
            _shape(node, shape)
        yield names
    finally:
        existing = run_ip("netns", "list")
        for name in [*names, *nodes]:
            if name in existing:
                run_ip("netns", "del", name)


def _shape(node: str, shape: Shape) -> None:
    """A token bucket keeps the rate; netem, if asked for, holds every packet for the delay."""
    parent = ["root", "handle", "1:"]
    if shape.delay_ms:
        delay = f"{shape.delay_ms}ms"
        run_ip("qdisc", "add", "dev", "trunk", *parent, "netem", "delay", delay, namespace=node, tool="tc")
        parent = ["parent", "1:", "handle", "2:"]
    if shape.mbit is not None:
        bucket = ["tbf", "rate", f"{shape.mbit}mbit", "burst", "256kb", "latency", "400ms"]
        run_ip("qdisc", "add", "dev", "trunk", *parent, *bucket, namespace=node, tool="tc")


def trunk_bytes(names: Sequence[str]) -> int:
    """Bytes that crossed between the nodes so far, both ways."""
    node = names[0].removesuffix("h0") + "n0"
    (link,) = json.loads(run_ip("-j", "-s", "link", "show", "trunk", namespace=node))
    return int(link["stats64"]["rx"]["bytes"] + link["stats64"]["tx"]["bytes"])


def run_ranks(names: Sequence[str], command: Sequence[str], timeout_s: float, port: int = 29511) -> list[str]:
    """One process of `python command` per host, as torchrun would set it up. Returns what each printed.

    Raises OSError with the output of the first that failed.
    """
    processes = []
    for rank, name in enumerate(names):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(names)),
            "LOCAL_RANK": str(rank % HOSTS_PER_NODE),
            "LOCAL_WORLD_SIZE": str(HOSTS_PER_NODE),
            "MASTER_ADDR": "10.99.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        full = ["ip", "netns", "exec", name, sys.executable, *command]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(full, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        printed = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(processes, printed)):
        if process.returncode:
            raise OSError(f"rank {rank} ended with status {process.returncode}: {errors[-2000:]}")
    return [output for output, _ in printed]
