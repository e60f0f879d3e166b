"""A cluster of Ray actors says what one process says, whoever is lost in between. One cluster for all cases."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest

from moe.batch import run_batch
from moe.engine.requests import Request
from moe.launch.live import live_state
from moe.launch.ray_data import Answers
from moe.llm import LLM
from moe.metrics import exposition
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.moe import chaos_cluster, ray_matrix
from tests.moe.ray_session import DEMO, LABEL, ROOT, SETTINGS, config_of, two_nodes, until
from tests.patience import PATIENCE_S

ray = pytest.importorskip("ray")
from moe.cluster.address import noted_address, ray_address  # noqa: E402
from moe.cluster.controller import ClusterEngine  # noqa: E402
from moe.cluster.host import bundles_here  # noqa: E402
from moe.cluster.policy import ClusterError  # noqa: E402
from tests.moe.service_on_hosts import check_service  # noqa: E402

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]  # Ray warns about its own code
NUM_REQUESTS = 15
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(1, 2048) for _ in range(RNG.randrange(3, 40))] for _ in range(NUM_REQUESTS)]
PARAMS = [
    SamplingParams(max_tokens=24 + i, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i in range(NUM_REQUESTS)
]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM(DEMO, config_of()) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["all_to_all", "coherent"])
def llm(request, nodes) -> Iterator[LLM]:
    """Two hosts on two nodes, and a spare."""
    settings = ["cluster.spares=1", "cluster.silence_s=4", "cluster.strategy=SPREAD"]
    with LLM(DEMO, config_of(f"parallel.dispatcher={request.param}", *settings), hosts=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def cluster(llm) -> ClusterEngine:
    return llm.engine


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> tuple[Any, int, dict[str, Any]]:
    """A folder with in.jsonl, the tokens of its answers, and the answers of one process."""
    folder = tmp_path_factory.mktemp("lines")
    total = chaos_cluster.write_lines(folder / "in.jsonl", 40)
    with LLM(DEMO, config_of()) as llm:
        run_batch(llm, folder / "in.jsonl", folder / "right.jsonl")
    return folder, total, chaos_cluster.answers(folder / "right.jsonl")


def serve(engine: ClusterEngine, at: int = -1, fault: Callable[[], Any] = lambda: None) -> list[list[int]]:
    """Answers of all requests; `fault` happens when `at` tokens have come."""
    requests: list[Request] = [engine.add_request(p, q) for p, q in zip(PROMPTS, PARAMS)]
    deadline = time.monotonic() + PATIENCE_S
    while engine.has_work:
        engine.step()
        assert time.monotonic() < deadline, engine.crew.noted
        if 0 <= at <= sum(r.num_output for r in requests):
            fault()
            at = -1
    assert at == -1
    return [r.tokens[r.num_prompt :] for r in requests]


def pids(engine: ClusterEngine) -> list[int]:
    return [host.info.pid for host in engine.crew.alive]


def test_hosts_say_what_one_process_says(cluster, expected):
    assert serve(cluster) == expected
    assert cluster.why_not_whole() is None


def test_hosts_know_who_loads_beside_them(nodes):
    """Three bundles spread over two nodes: two of them lie side by side."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Asked:
        def beside(self) -> int:
            return bundles_here()

    group = placement_group([{"CPU": 0.1}] * 3, strategy="SPREAD")
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(3)]
    actors = [ray.remote(num_cpus=0.1)(Asked).options(scheduling_strategy=place).remote() for place in places]
    assert sorted(ray.get([actor.beside.remote() for actor in actors], timeout=PATIENCE_S)) == [1, 2, 2]
    ray.util.remove_placement_group(group)


def test_hosts_are_spread_and_node_by_node(cluster):
    until(cluster, lambda: len(cluster.crew.alive) == 2)
    status = cluster.status()
    serving = [host for host in status.hosts if host.what == "serves"]
    assert [host.rank for host in serving] == [0, 1]
    assert len({host.node for host in serving}) == 2
    assert sum(host.experts for host in serving) == cluster.blueprint.num_experts
    assert cluster.state().slots == 80
    until(cluster, lambda: cluster.state().free_blocks == cluster.state().blocks)  # a beat later


@pytest.mark.parametrize(("which", "at"), [(0, 60), (1, 0)], ids=["decode", "prefill"])
def test_a_killed_host_costs_no_token_and_a_spare_takes_its_place(cluster, expected, which, at):
    until(cluster, lambda: is_whole(cluster))
    generation = cluster.crew.generation
    assert serve(cluster, at, lambda: os.kill(pids(cluster)[which], signal.SIGKILL)) == expected
    assert cluster.crew.generation > generation
    until(cluster, lambda: len(cluster.crew.alive) == 2)


@contextmanager
def head_that_stops(nodes) -> Iterator[Callable[[], None]]:
    """Yields what stops Ray's head; it is stopped still at the end: what needs it waits, those that live do not."""
    head = psutil.Process(nodes.head_node.all_processes["gcs_server"][0].process.pid)
    too_late = threading.Timer(50, head.resume)  # a node of Ray's ends without it after 60 s

    def stop() -> None:
        head.suspend()
        too_late.start()

    try:
        yield stop
        assert head.status() == psutil.STATUS_STOPPED
    finally:
        too_late.cancel()
        head.resume()


def is_whole(engine: ClusterEngine) -> bool:
    return len(engine.crew.spare) == 1 and len(engine.crew.alive) == 2


def test_a_host_is_lost_while_rays_head_does_not_answer(cluster, nodes, expected):
    until(cluster, lambda: is_whole(cluster))
    cluster.crew.fleet._keepers.clear()  # as at the first loss
    with head_that_stops(nodes) as stop:
        assert serve(cluster, 60, lambda: (stop(), os.kill(pids(cluster)[1], signal.SIGKILL))) == expected
        assert len(cluster.crew.alive) == 2


@pytest.mark.parametrize("place", range(3))
def test_chaos(llm, lines, place):
    """A sample; the table of 30 seeds is in bench/results/chaos.md."""
    folder, total, right = lines
    is_coherent = llm.engine.config.parallel.dispatcher == "coherent"
    seed = ((14, 15, 17) if is_coherent else (4, 7, 8))[place]
    seen = chaos_cluster.one_seed(llm, seed, folder, right, total)
    # Whom it blames is reported, not asserted: a machine may be too busy for three seconds.
    assert (seen.wrong, seen.missing) == (0, 0), (seen.blamed, seen.notes)


def test_a_spare_that_ends_is_replaced_and_bundles_are_used_again(cluster):
    until(cluster, lambda: is_whole(cluster))
    number = cluster.crew.spare[0].number
    os.kill(cluster.crew.spare[0].info.pid, signal.SIGKILL)
    until(cluster, lambda: is_whole(cluster) and cluster.crew.spare[0].number != number)
    fleet = cluster.crew.fleet
    assert sum(bundles.count for bundles in fleet._groups) - len(fleet._free) == 3
    assert len(fleet._free) <= 2  # a group without a host is given back


def test_hosts_are_added_and_taken_away_in_the_middle_of_requests(cluster, nodes, expected):
    """Added while Ray's head does not answer: the spare comes, and another when the head goes on."""
    until(cluster, lambda: is_whole(cluster))
    cluster.crew.fleet._free.clear()  # as where no host has ended: Ray is asked for more room
    with head_that_stops(nodes) as stop:
        assert serve(cluster, 60, lambda: (stop(), cluster.scale(3))) == expected
        assert len(cluster.crew.alive) == 3
    until(cluster, lambda: len(cluster.crew.spare) == 1)
    assert serve(cluster, 60, lambda: cluster.scale(2)) == expected
    until(cluster, lambda: len(cluster.crew.alive) == 2)


def test_a_cancelled_request_is_said_no_more_of(cluster, expected):
    request = cluster.add_request(PROMPTS[0], PARAMS[0])
    until(cluster, lambda: request.num_output > 3)
    cluster.finish(request, "abort")
    said = len(request.tokens)
    assert serve(cluster) == expected
    assert (len(request.tokens), request.finish_reason) == (said, "abort")


def test_experts_move_while_hosts_serve_and_a_loss_starts_from_where_they_are(nodes, expected, tmp_path):
    """All of the experts that these prompts use most on one host; they move, then the other host is killed."""
    with LLM(DEMO, config_of()) as alone:
        recorder = alone.engine.record()
        alone.generate(PROMPTS, PARAMS, use_tqdm=False)
        ids = recorder.trace().expert_ids
    order = [np.argsort(-np.bincount(layer.ravel(), minlength=16), kind="stable") for layer in ids.swapaxes(0, 1)]
    assignment = np.stack([np.argsort(one) // 8 for one in order])
    Plan.from_assignment(assignment, 2).save(tmp_path / "uneven.json")
    settings = ["placement.online=true", "placement.window=64", "placement.imbalance=1.3", "placement.most_moved=0.5"]
    settings += ["placement.share=1", "cluster.spares=1", f"parallel.plan={tmp_path / 'uneven.json'}"]
    with LLM(DEMO, config_of(*settings), hosts=2) as llm:
        engine = llm.engine
        deadline = time.monotonic() + PATIENCE_S
        # A window may fall so that moves would not pay; the loop looks again while the load stays uneven.
        while not any("placement: moves" in note.what for note in engine.noted):
            assert serve(engine) == expected
            assert time.monotonic() < deadline, engine.noted
        until(engine, lambda: engine.plan is not None and engine.plan.solver == "moved")
        until(engine, lambda: len(engine.crew.spare) == 1)
        assert (engine.plan.assignment != assignment).any()
        moved = (engine.plan.assignment != assignment).sum()  # a second turn may have moved some of them back
        assert engine.crew.counted().placement.moved_experts >= moved
        formed: list[Any] = []

        def kill_one() -> None:
            os.kill(pids(engine)[1], signal.SIGKILL)
            generation = engine.crew.generation
            until(engine, lambda: formed.append(engine.plan) or engine.crew.generation > generation)

        assert serve(engine, 60, kill_one) == expected
        after = formed[-1]
        before = next(plan for plan in reversed(formed) if plan.solver != "kept")  # they may move until a loss is seen
        assert after.solver == "kept"
        assert (after.hosted == before.hosted).all(), "who was left kept what it had, the spare took the rest"
        assert live_state(llm)["plan"] == (engine.plan.log2phy[:, :, 0] // engine.plan.physical_per_rank).tolist()
        assert any("placement: moves" in event["what"] for event in live_state(llm)["events"])
        moved = re.search(r"^moe_moved_experts_total (\d+)", exposition(engine.metric_sources()), re.M)
        assert int(moved[1]) >= (before.assignment != assignment).sum()
        assert [host.experts for host in engine.status().hosts if host.what == "serves"] == [48, 48]


def test_a_driver_that_is_killed_is_followed_by_another(llm, lines, nodes, tmp_path):
    if llm.engine.config.parallel.dispatcher == "coherent":
        pytest.skip("once is enough")
    folder, _, right = lines
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.launch.ends_itself", 5, 0, "moe.launch.ray_cluster"]
    command += [DEMO, folder / "in.jsonl", target, "--hosts", "1"]
    command += [f"--set={one}" for one in (*SETTINGS, "batch.max_sequences=2")]
    driver = subprocess.run(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    assert f"uses the Ray cluster at {nodes.address}, which was found" in driver.stderr
    progress = run_batch(llm, folder / "in.jsonl", target)
    assert 5 <= progress.resumed < 40
    assert chaos_cluster.answers(target).keys() == right.keys()
    assert {name: one[1] for name, one in chaos_cluster.answers(target).items()} == {n: r[1] for n, r in right.items()}


def test_a_job_that_is_submitted(nodes, lines, tmp_path):
    """By Ray's own command to the job server, which runs it in a folder of its own on the cluster."""
    pytest.importorskip("aiohttp", reason="the job server is of ray[default]")
    folder, _, right = lines
    (tmp_path / "job").mkdir()
    shutil.copyfile(folder / "in.jsonl", tmp_path / "job" / "in.jsonl")
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", tmp_path / "job", "--"]
    command += [sys.executable, "-m", "moe.launch.ray_cluster", DEMO, "in.jsonl", target, "--hosts", "1"]
    command += [f"--set={one}" for one in SETTINGS]
    environment = os.environ | {"RAY_ADDRESS": f"http://{nodes.webui_url}", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    assert "40 of 40 lines are in" in said.stdout
    assert chaos_cluster.answers(target) == right


@pytest.mark.parametrize("case", ray_matrix.SAMPLE, ids="-".join)
def test_four_three_and_two_hosts_say_what_one_process_says(nodes, case, tmp_path):
    """A sample; the table of all is in bench/results/hosts_matrix.md."""
    seen = list(ray_matrix.run_case(case, ray_matrix.folder_of(case.model, tmp_path)))
    assert [(one.hosts, one.equal) for one in seen] == [(count, seen[0].answers) for count in ray_matrix.HOSTS]
    assert seen[0].nodes == 2


def test_gpus_labels_and_too_little_memory_left(nodes, lines, tmp_path):
    """Declared GPUs, computed on the CPU, on the one node with the label; then a host is lost and not replaced."""
    folder, _, right = lines
    settings = ["device=cpu", "offload.store=ram", "offload.budget=1.0", "cluster.gpus_per_host=1"]
    settings += [f"cluster.labels={LABEL}", "cluster.replaces=false", "cluster.least_in_memory=0.6"]
    target = tmp_path / "out.jsonl"
    with LLM(DEMO, config_of(*settings), hosts=2) as llm:
        (node,) = {host.node for host in llm.engine.status().hosts}
        assert {n["NodeID"]: n for n in ray.nodes()}[node]["Resources"]["GPU"] == 4
        assert ray.available_resources()["GPU"] == 2
        assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4), use_tqdm=False)[0].outputs[0].token_ids

        victims = pids(llm.engine)[1:]

        def kill_at_ten(progress: Any) -> None:
            if progress.finished >= 10 and victims:
                os.kill(victims.pop(), signal.SIGKILL)

        with (
            chaos_cluster.told_after_every_step(llm),
            pytest.raises(ClusterError, match=r"1 of 2 hosts are left, with slots for \d+ of \d+ experts, and none"),
        ):
            run_batch(llm, folder / "in.jsonl", target, kill_at_ten)
        assert llm.engine.status().state == "closed"
        with pytest.raises(Exception, match="finished work is kept"):
            llm.generate([[5, 6, 7]], use_tqdm=False)
    kept = chaos_cluster.answers(target)
    assert len(kept) >= 10
    assert all(right[name] == answer for name, answer in kept.items())


def test_rays_own_note_of_where_it_is(nodes):
    assert noted_address() == nodes.address
    assert [ray_address(one) for one in (None, "auto")] == [None, "auto"]  # there is one: Ray finds it itself


def test_a_cluster_that_asks_for_a_token_says_so_at_once(nodes):
    command = [sys.executable, "-m", "moe", "ray", "status", "--address", nodes.address]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    said = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    why = f"the Ray cluster at {nodes.address} refuses this process: .*token is missing or incorrect; if it asks for a"
    assert (said.returncode, bool(re.search(why, " ".join(said.stderr.split())))) == (2, True), said.stderr


def test_more_hosts_than_there_is_room_for(nodes):
    config = config_of("cluster.gpus_per_host=3", "cluster.room_s=2", f"cluster.labels={LABEL}")
    with pytest.raises(ValueError, match=r"Ray has no room for 3 bundles of .*GPU.* on nodes labelled"):
        ClusterEngine(DEMO, config, 3)
    with pytest.raises(ValueError, match=r"hosts \(0\) must be >= 1"):
        ClusterEngine(DEMO, config_of(), 0)


def test_growth_without_room_ends_and_the_hosts_serve_on(nodes, expected):
    """Those that Ray cannot place are given up after `room_s`, with the numbers; then a number that fits is reached."""
    with LLM(DEMO, config_of("cluster.room_s=2", "cluster.cpus_per_host=1"), hosts=2) as llm:
        engine = llm.engine
        engine.scale(16)
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
        until(engine, lambda: engine.crew.target == 2)
        (why,) = {note.what for note in engine.crew.noted if "no room" in note.what}
        assert re.search(
            r"no room for 14 bundles of {'CPU': 1.0}: after 2 s the cluster has {'CPU': 8.0}, of which", why
        )
        assert (len(engine.crew.alive), len(engine.crew.loading), engine.crew.counts.lost_hosts) == (2, 0, 0)
        engine.scale(3)
        until(engine, lambda: len(engine.crew.alive) == 3)
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected


def test_a_service_on_hosts(nodes, tmp_path, capsys):
    check_service(tmp_path, capsys)


def test_ray_data(nodes):
    pytest.importorskip("pyarrow")
    prompts = [*PROMPTS[:6], [1] * 5000]
    with LLM(DEMO, config_of()) as alone:
        params = SamplingParams(max_tokens=6, temperature=0)
        right = [o.outputs[0].token_ids for o in alone.generate(prompts[:6], params, use_tqdm=False)]
    rows = ray.data.from_items([{"number": n, "prompt": p} for n, p in enumerate(prompts)])
    stage = {"fn_constructor_args": (str(DEMO), tuple(SETTINGS)), "fn_constructor_kwargs": {"max_tokens": 6}}
    found = rows.map_batches(Answers, batch_size=4, concurrency=1, num_cpus=0.5, **stage).take_all()
    by_number = {row["number"]: row for row in found}
    assert [list(by_number[n]["answer_tokens"]) for n in range(6)] == right
    assert all(by_number[n]["error"] is None for n in range(6))
    assert "5000" in by_number[6]["error"]


def test_a_lost_node(nodes, expected):
    """The raylet of the second node is killed, and with it its actor; the host on the first node goes on."""
    settings = ["cluster.strategy=STRICT_SPREAD", "cluster.replaces=false"]
    with LLM(DEMO, config_of(*settings), hosts=2) as llm:
        (second,) = nodes.worker_nodes
        assert serve(llm.engine, 60, partial(nodes.remove_node, second, allow_graceful=False)) == expected
        assert len(llm.engine.crew.alive) == 1
