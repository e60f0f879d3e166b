"""One Ray cluster of two nodes for all tests of a session, with a token and a folder of its own; never `ray stop`.

The second node has the label of the example's workers and says that it has GPUs; hosts compute on the CPU anyway.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from moe.config import EngineConfig
from tests import ray_environment  # noqa: F401  # before Ray is imported
from tests.patience import PATIENCE_S
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "tinymoe"
EXAMPLE = yaml.safe_load((ROOT / "examples" / "launch" / "ray_cluster.yaml").read_text())
((NAME, VALUE),) = EXAMPLE["available_node_types"]["expert_host"]["labels"].items()
LABEL = f"{NAME}={VALUE}"
SETTINGS = [
    "dtype=float32", "threads=1", "offload.budget=40", "batch.kv_tokens=4096", "batch.max_sequences=3",
    "cluster.cpus_per_host=0.5", "cluster.gpus_per_host=0",
]  # fmt: skip


def config_of(*settings: str) -> EngineConfig:
    return EngineConfig.load(None, [*SETTINGS, *settings])


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Yields the cluster; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    folder = f"/tmp/moe-{secrets.token_hex(3)}"  # a path of sockets must be short
    # Where Ray writes the address of a cluster for tools, which is the machine's otherwise, and must be there.
    before, os.environ["RAY_TMPDIR"] = os.environ.get("RAY_TMPDIR"), folder
    os.makedirs(f"{folder}/ray")
    common = {"object_store_memory": 80 << 20}
    # Jobs are submitted to the dashboard, which is of `ray[default]`.
    dashboard = {"include_dashboard": find_spec("aiohttp") is not None, "dashboard_port": free_port()}
    head = {"num_cpus": 4, "temp_dir": folder, **dashboard, **common}
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        # A folder of its own, as on a machine of its own: a node deletes the working folders of jobs that it has not.
        cluster.add_node(num_cpus=4, num_gpus=4, labels={NAME: VALUE}, temp_dir=f"{folder}b", **common)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        for one in (folder, f"{folder}b"):
            shutil.rmtree(one, ignore_errors=True)


def until(engine: Any, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    """Steps until it is true."""
    deadline = time.monotonic() + limit_s
    while not condition():
        engine.step()
        assert time.monotonic() < deadline, engine.status()
