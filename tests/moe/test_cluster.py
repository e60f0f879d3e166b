"""A cluster of Ray actors says what one process says, whoever is lost in between. One cluster for all cases."""

import json
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe.batch import run_batch
from moe.config import EngineConfig
from moe.engine.requests import Request
from moe.llm import LLM
from moe.params import SamplingParams

# A token of its own, for other clusters of the machine are nobody's business; Ray reads it when it is imported.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
ray = pytest.importorskip("ray")
from moe.cluster.controller import ClusterEngine  # noqa: E402
from moe.cluster.fleet import Placing  # noqa: E402
from moe.cluster.policy import FailurePolicy  # noqa: E402

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]  # Ray warns about its own code
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "tinymoe"
NUM_REQUESTS = 15
SETTINGS = ["dtype=float32", "threads=1", "offload.budget=40", "batch.kv_tokens=4096", "batch.max_sequences=3"]
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(1, 2048) for _ in range(RNG.randrange(3, 40))] for _ in range(NUM_REQUESTS)]
PARAMS = [
    SamplingParams(max_tokens=24 + i, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i in range(NUM_REQUESTS)
]


def config_of(dispatcher: str) -> EngineConfig:
    return EngineConfig.load(None, [*SETTINGS, f"parallel.dispatcher={dispatcher}"])


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM(DEMO, config_of("all_to_all")) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    folder = f"/tmp/moe-{secrets.token_hex(3)}"  # a path of sockets must be short
    ray.init(num_cpus=8, num_gpus=4, include_dashboard=False, _temp_dir=folder, object_store_memory=100 << 20)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=["all_to_all", "coherent"])
def cluster(request, local_ray) -> Iterator[ClusterEngine]:
    policy = FailurePolicy(spares=1, silence_s=2.0)
    engine = ClusterEngine(DEMO, config_of(request.param), 2, policy=policy, placing=Placing(cpus=0.5))
    yield engine
    engine.close()


def serve(engine: ClusterEngine, at: int = -1, fault: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Answers of all requests; `fault` happens when `at` tokens have come."""
    requests: list[Request] = [engine.add_request(p, q) for p, q in zip(PROMPTS, PARAMS)]
    deadline = time.monotonic() + 120
    while engine.has_work:
        engine.step()
        assert time.monotonic() < deadline, engine.noted
        if 0 <= at <= sum(r.num_output for r in requests):
            fault()
            at = -1
    assert at == -1
    return [r.tokens[r.num_prompt :] for r in requests]


def until(engine: ClusterEngine, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        engine.step()
        assert time.monotonic() < deadline, engine.noted


def pids(engine: ClusterEngine) -> list[int]:
    return [host.info.pid for host in engine._alive]


def test_hosts_say_what_one_process_says(cluster, expected):
    assert serve(cluster) == expected
    assert cluster.why_not_whole() is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_host_costs_no_token_and_a_spare_takes_its_place(cluster, expected, which):
    until(cluster, lambda: len(cluster._spare) == 1 and len(cluster._alive) == 2)
    generation = cluster.generation
    assert serve(cluster, 60, lambda: os.kill(pids(cluster)[which], signal.SIGKILL)) == expected
    assert cluster.generation > generation
    assert len(cluster._alive) == 2


def test_a_host_that_is_silent_is_killed(cluster, expected):
    until(cluster, lambda: len(cluster._alive) == 2)
    victim = pids(cluster)[1]
    assert serve(cluster, 60, lambda: os.kill(victim, signal.SIGSTOP)) == expected
    assert victim not in pids(cluster)
    assert any("silent" in note.what for note in cluster.noted)


def test_all_hosts_at_once(cluster, expected):
    until(cluster, lambda: len(cluster._alive) == 2)

    def kill_all() -> None:
        for pid in pids(cluster):
            os.kill(pid, signal.SIGKILL)

    assert serve(cluster, 80, kill_all) == expected


def test_a_spare_that_ends_is_replaced_and_bundles_are_used_again(cluster):
    def is_whole() -> bool:
        return len(cluster._spare) == 1 and len(cluster._alive) == 2

    until(cluster, is_whole)
    number = cluster._spare[0].number
    os.kill(cluster._spare[0].info.pid, signal.SIGKILL)
    until(cluster, lambda: is_whole() and cluster._spare[0].number != number)
    fleet = cluster._fleet
    assert sum(group.bundle_count for group in fleet._groups) - len(fleet._free) == 3
    assert len(fleet._free) <= 2  # a group without a host is given back


def test_hosts_are_added_and_taken_away_in_the_middle_of_requests(cluster, expected):
    until(cluster, lambda: len(cluster._alive) == 2)
    assert serve(cluster, 60, lambda: cluster.scale(3)) == expected
    until(cluster, lambda: len(cluster._alive) == 3)
    assert serve(cluster, 60, lambda: cluster.scale(2)) == expected
    assert len(cluster._alive) == 2


def test_a_cancelled_request_is_said_no_more_of(cluster, expected):
    request = cluster.add_request(PROMPTS[0], PARAMS[0])
    until(cluster, lambda: request.num_output > 3)
    cluster.finish(request, "abort")
    said = len(request.tokens)
    assert serve(cluster) == expected
    assert (len(request.tokens), request.finish_reason) == (said, "abort")


def test_llm_and_batch_files_on_hosts_that_ask_for_gpus(local_ray, tmp_path, monkeypatch):
    """GPU bundles with declared GPUs, computed on the CPU."""
    monkeypatch.setattr("moe.cluster.controller.Placing", lambda: Placing(cpus=0.5, gpus=1.0, strategy="STRICT_PACK"))
    config = EngineConfig.load(None, [*SETTINGS, "device=cpu", "offload.store=ram"])
    with LLM(DEMO, config, hosts=2) as llm:
        run_batch(llm, ROOT / "examples" / "batch.jsonl", tmp_path / "hosts.jsonl")
        assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4), use_tqdm=False)[0].outputs[0].token_ids
    with LLM(DEMO, config) as llm:
        run_batch(llm, ROOT / "examples" / "batch.jsonl", tmp_path / "alone.jsonl")

    def answers(name: str) -> list[str]:
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return sorted(f"{r['custom_id']} {r['response']['body']['choices']}" for r in rows)

    assert answers("hosts.jsonl") == answers("alone.jsonl")


def test_more_hosts_than_there_is_room_for(local_ray):
    with pytest.raises(ValueError, match=r"Ray has no room for 3 bundles of .*GPU"):
        ClusterEngine(DEMO, config_of("all_to_all"), 3, placing=Placing(gpus=3.0), room_s=2.0)
    with pytest.raises(ValueError, match=r"hosts \(0\) must be >= 1"):
        ClusterEngine(DEMO, config_of("all_to_all"), 0)
