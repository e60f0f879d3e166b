"""Four hosts on one machine: network namespaces, two nodes of two, and one link between the nodes that can be shaped.

    host 0 ─┐             ┌─ host 2
            ├─ node 0 ═══ node 1          ═══ shaped, bytes counted here
    host 1 ─┘             └─ host 3

A rate alone is kept by the kernel's token bucket. For a delay the link is a pair of tap devices with a small program
between them (delay_line.c), since many kernels lack the netem queue. `python -m bench.hosts` makes hosts and prints
what their link really gives. Needs root, iproute2, and for delays /dev/net/tun and a C compiler; `why_not` says so.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NUM_HOSTS, HOSTS_PER_NODE = 4, 2
MTU = 9000
PORT = 29509


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the link between the nodes. mbit: None leaves it as fast as it is; delay_ms: each way, half a round trip."""

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
    if shape.delay_ms and not (Path("/dev/net/tun").exists() and shutil.which("cc")):
        return "a link with a delay needs /dev/net/tun and a C compiler"
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
            if shape.delay_ms:  # fewer frames for the delay line to carry
                run_ip("link", "set", "eth0", "mtu", str(MTU), namespace=name)
                run_ip("link", "set", f"h{i}", "mtu", str(MTU), namespace=node)
        with _delay_line(nodes, shape) if shape.delay_ms else nullcontext():
            if not shape.delay_ms:
                peer = ["peer", "name", "trunk", "netns", nodes[1]]
                run_ip("link", "add", "trunk", "netns", nodes[0], "type", "veth", *peer)
            for node in nodes:
                mtu = ["mtu", str(MTU)] if shape.delay_ms else []
                run_ip("link", "set", "trunk", "master", "switch", *mtu, "up", namespace=node)
                if shape.mbit is not None and not shape.delay_ms:
                    bucket = ["tbf", "rate", f"{shape.mbit}mbit", "burst", "256kb", "latency", "400ms"]
                    run_ip("qdisc", "add", "dev", "trunk", "root", *bucket, namespace=node, tool="tc")
            yield names
    finally:
        existing = run_ip("netns", "list").split()
        for name in [*names, *nodes]:
            if name in existing:
                run_ip("netns", "del", name)


@contextmanager
def _delay_line(nodes: Sequence[str], shape: Shape) -> Iterator[None]:
    """The interface `trunk` in both nodes, with the program between them that delays every frame."""
    rate, delay = (shape.mbit or 0) * 10**6, int(shape.delay_ms * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/delay_line"
        built = subprocess.run(
            ["cc", "-O2", "-o", program, ROOT / "bench" / "delay_line.c"], capture_output=True, text=True, check=False
        )
        if built.returncode:
            raise OSError(f"delay_line.c does not compile: {built.stderr[-500:]}")
        pipe = subprocess.PIPE
        command = [program, *nodes, "trunk", str(rate), str(delay)]
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as line:
            assert line.stdout is not None
            assert line.stderr is not None
            try:
                if line.stdout.readline() != "ready\n":
                    raise OSError(f"the delay line does not start: {line.stderr.read()}")
                yield
            finally:
                line.kill()
                said = line.stderr.read()
        if said:
            raise OSError(f"the delay line did not do its work: {said[:500]}")


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


class Measured(NamedTuple):
    """What the link between the nodes gives one TCP connection. round_trip_ms: median of 50; mbit: of 10 MB one way."""

    round_trip_ms: float
    mbit: float


def measure(names: Sequence[str]) -> Measured:
    """Between host 0 and host 2."""
    found: list[float] = json.loads(run_ranks(names, ["-m", "bench.hosts", "--probe"], 120)[2])
    return Measured(*found)


def _probe() -> None:
    """Rank 0 answers, rank 2 measures."""
    rank, bulk = int(os.environ["RANK"]), 10_000_000
    if rank == 0:
        with socket.create_server(("", PORT)) as server:
            connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(50):
                connection.sendall(connection.recv(1))
            _receive(connection, bulk)
            connection.sendall(b"x")
    elif rank == 2:
        connection = _connect()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = []
            for _ in range(50):
                start = time.perf_counter()
                connection.sendall(b"x")
                connection.recv(1)
                trips.append(time.perf_counter() - start)
            trip, start = statistics.median(trips), time.perf_counter()
            connection.sendall(bytes(bulk))
            connection.recv(1)
            print(json.dumps([trip * 1e3, bulk * 8 / (time.perf_counter() - start - min(trips)) / 1e6]))


def _connect() -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("10.99.0.1", PORT), timeout=30)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _receive(connection: socket.socket, size: int) -> None:
    while size:
        size -= len(connection.recv(min(size, 1 << 20)))


def main() -> int:
    if "--probe" in sys.argv:
        _probe()
        return 0
    for shape in (Shape(), Shape(1000), Shape(100), Shape(1000, 1.0), Shape(100, 5.0)):
        reason = why_not(shape)
        if reason is None:
            with hosts(shape) as names:
                print(f"{shape}: {measure(names)}")
        else:
            print(f"{shape}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
