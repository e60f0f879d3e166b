"""A network that comes apart under a cluster: three hosts in network namespaces, the link to one is cut, then mended.

    10.99.0.1: this program, Ray's head, a host ─┐
    10.99.0.2: a node, a host ──────────────────── bridge ═ trunk ═ bridge ── 10.99.0.3: a node, a host

Run by `test_partition.py` in the first namespace, and in a namespace of processes that ends with it: Ray's are many.
Its arguments are the dispatcher and the names of the namespaces. Prints one JSON document.
"""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.hosts import run_ip
from moe.config import EngineConfig
from moe.llm import LLM
from moe.params import SamplingParams
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "tinymoe"
PORT = 26379
SETTINGS = [
    "dtype=float32", "threads=1", "offload.budget=0.25", "batch.kv_tokens=4096", "batch.max_sequences=3",
    "parallel.timeout_seconds=600", "cluster.cpus_per_host=0.5", "cluster.gpus_per_host=0", "cluster.silence_s=10",
    "cluster.strategy=STRICT_SPREAD", "cluster.replaces=false",
]  # fmt: skip
_RNG = random.Random(1)
PROMPTS = [[_RNG.randrange(1, 2048) for _ in range(_RNG.randrange(3, 40))] for _ in range(12)]
PARAMS = [SamplingParams(max_tokens=40 + i, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i in range(12)]


def is_there(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def cut_and_mend(ray: Any, engine: Any, trunk: str) -> dict[str, Any]:
    """Serves all requests; when 100 tokens have come, the trunk goes down, and comes up when all are answered."""
    hosts = {host.number: host.pid for host in engine.status().hosts}
    (behind,) = (node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == "10.99.0.3")
    (far,) = (host for host in engine.crew.alive if host.info.node == behind)
    requests = [engine.add_request(p, q) for p, q in zip(PROMPTS, PARAMS)]
    cut, gap, last = 0.0, 0.0, time.monotonic()
    said = 0
    while engine.has_work:
        engine.step()
        if (now := sum(r.num_output for r in requests)) > said:
            gap, said, last = max(gap, time.monotonic() - last), now, time.monotonic()
        if not cut and said >= 100:
            run_ip("link", "set", "trunk", "down", namespace=trunk)
            cut = time.time()
    ran_apart = is_there(far.info.pid)  # nobody could reach it
    serving = [host.number for host in engine.crew.alive]
    run_ip("link", "set", "trunk", "up", namespace=trunk)
    deadline = time.monotonic() + PATIENCE_S
    while is_there(far.info.pid) and time.monotonic() < deadline:
        engine.step()
    again = [engine.add_request(p, q) for p, q in zip(PROMPTS, PARAMS)]
    while engine.has_work:
        engine.step()
    given_up = [n.at for n in engine.noted if n.what.startswith("silent")]
    return {
        "tokens": [r.tokens[r.num_prompt :] for r in requests],
        "again": [r.tokens[r.num_prompt :] for r in again],
        "hosts": hosts,
        "far": far.number,
        "serving": serving,
        "serving afterwards": [host.number for host in engine.crew.alive],
        "ran apart": ran_apart,
        "ended when the link was back": not is_there(far.info.pid),
        "given up after": given_up[0] - cut if given_up else None,
        "gap": gap,
        "noted": [[n.at - cut, n.what, list(n.hosts)] for n in engine.noted],
    }


def _answers() -> bool:
    try:
        socket.create_connection(("10.99.0.1", PORT), timeout=1).close()
    except OSError:
        return False
    return True


def _wait_for(condition: Callable[[], bool], nodes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert all(node.poll() is None for node in nodes), "a node of Ray has ended"
        assert time.monotonic() < deadline, "Ray's nodes do not come"
        time.sleep(0.3)


def main() -> None:
    dispatcher, *names = sys.argv[1:]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "RAY_worker_niceness": "0"}
    import ray

    folder = f"/tmp/moe-{secrets.token_hex(3)}"  # a path of sockets must be short
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    start += ["--object-store-memory", str(80 << 20), "--disable-usage-stats", "--node-ip-address"]
    head = ["10.99.0.1", "--head", "--port", str(PORT), "--include-dashboard", "false", "--temp-dir", folder]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        nodes = [subprocess.Popen([*start, *head], stdout=subprocess.DEVNULL)]
        _wait_for(_answers, nodes)
        ray.init(address=f"10.99.0.1:{PORT}", _node_ip_address="10.99.0.1", log_to_driver=False)
        stack.callback(ray.shutdown)
        for number, name in enumerate(names[1:3], 2):
            inside = ["ip", "netns", "exec", name, *start, f"10.99.0.{number}", "--address", f"10.99.0.1:{PORT}"]
            nodes.append(subprocess.Popen(inside, stdout=subprocess.DEVNULL))
            # One after the other: they share a folder, and two at once choose the same names of sockets.
            _wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == len(nodes), nodes)
        config = EngineConfig.load(None, [*SETTINGS, f"parallel.dispatcher={dispatcher}"])
        with LLM(DEMO, config, hosts=3) as llm:
            found = cut_and_mend(ray, llm.engine, names[0].removesuffix("h0") + "n1")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
