"""What a cluster is made of, without Ray: who keeps which expert, whose words count, when a host is given up."""

import os
import re
import shlex
import signal
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.cluster.desk import Desk
from moe.cluster.ledger import Ledger
from moe.cluster.lines import Lifeline, Line, Lines
from moe.cluster.messages import Beat, Dealt, Placed, Said
from moe.cluster.plans import Placements, first_plan, plan_for
from moe.cluster.policy import FailurePolicy
from moe.config import ClusterConfig, EngineConfig
from moe.engine.requests import Request
from moe.engine.sampling import Logprobs
from moe.launch import ray_cluster
from moe.launch.cli import _parser
from moe.launch.options import engine_config
from moe.launch.ray_data import Answers
from moe.params import SamplingParams
from moe.placement.loop import PlacementStats
from moe.placement.plan import Plan
from moe.placement.trace import RoutingTrace
from tests.distributed import MULTIPROCESSING
from tests.moe.moe_cases import ROOT, TINYMOE


@given(st.integers(1, 6), st.integers(1, 17), st.data())
@settings(deadline=None, max_examples=60)
def test_everyone_keeps_what_it_has_and_nothing_is_lost(num_ranks, num_experts, data):
    shape = 2, num_experts
    held = [
        data.draw(st.one_of(st.none(), st.just(np.array(data.draw(st.lists(
            st.lists(st.booleans(), min_size=num_experts, max_size=num_experts), min_size=2, max_size=2))))))
        for _ in range(num_ranks)
    ]  # fmt: skip
    plan = plan_for(held, shape)
    assert (plan.num_layers, plan.num_experts, plan.num_ranks) == (*shape, num_ranks)
    load = plan.hosted.sum(axis=1)  # [L, G]
    assert (load.max(axis=1) - load.min(axis=1) <= 1).all()
    for rank, own in enumerate(held):
        if own is not None:  # a rank gives away only what is beyond its part, and never takes instead
            gone, come = own & ~plan.hosted[:, :, rank], plan.hosted[:, :, rank] & ~own
            assert not (gone.any(axis=1) & come.any(axis=1)).any()


def test_a_lost_ranks_experts_go_to_those_that_are_left():
    before = plan_for([None, None, None], (2, 9))
    after = plan_for([before.hosted[:, :, 0], before.hosted[:, :, 2]], (2, 9))
    for old, new in ((0, 0), (2, 1)):
        assert (after.hosted[:, :, new] | ~before.hosted[:, :, old]).all()


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_the_successor_of_a_controller_begins_with_the_plan_as_it_was(hosts):
    hosted = Plan.contiguous(2, 6, 3).hosted.copy()
    hosted[:, 0, 0], hosted[:, 0, 2] = False, True
    hosted[:, 5, 2], hosted[:, 5, 0] = False, True  # moved while it served
    served = Plan.from_hosted(hosted)
    plan = Placements(None, served).form(list(range(hosts)), (2, 6), ["a"] * hosts)
    assert plan.num_ranks == hosts
    assert plan.hosted.any(axis=2).all()
    if hosts == 3:
        assert (plan.hosted == served.hosted).all()
    if hosts == 2:
        assert (plan.hosted[:, :, :2] >= served.hosted[:, :, :2]).all(), "each keeps what its rank had"
    if hosts == 4:
        assert (plan.hosted[:, :, :3] <= served.hosted).all(), "the newcomer takes from the others"
    assert (Placements(None).form([0, 1, 2], (2, 6), ["a"] * 3).hosted != served.hosted).any()


def test_what_moved_is_what_the_next_generation_starts_from():
    """Three hosts, a plan that moves; host 8 is lost in the middle of the last move, when only some had taken it on."""
    places, shape = Placements(None), (2, 6)
    start = places.form([7, 8, 9], shape, ["a", "a", "b"])
    states = []
    hosted = start.hosted.copy()
    for expert, rank, to in ((0, 0, 2), (5, 2, 0)):
        hosted[:, expert, rank], hosted[:, expert, to] = False, True
        states.append(Plan.from_hosted(hosted))
    told = Placed(1, 1, states[0], PlacementStats(placement_turns=1, moved_experts=2), ("moves 2",))
    assert list(places.moved(told)) == ["moves 2"]
    assert (places.plan.hosted == states[0].hosted).all()
    again = replace(told, number=2, plan=states[1], notes=("moves 2", "moves 4"), stats=PlacementStats(2, 4))
    assert list(places.moved(again)) == ["moves 4"]
    places.left(7, 0, states[1])
    places.left(9, 2, states[0])
    after = places.form([7, 9], shape, ["a", "b"]).hosted
    assert after[:, 5, 0].all(), "host 7 had taken expert 5 on"
    assert after[:, 0, 1].all(), "host 9 has expert 0 since the first move"
    assert not after[:, 0, 0].any(), "which the plan of the start gave host 7"
    assert places.stats == again.stats
    places.moved(Placed(2, 3, Plan.from_hosted(after), PlacementStats(1, 1, placement_load=1.5), ("moves 1",)))
    assert places.stats == PlacementStats(3, 5, placement_load=1.5)
    places.left(7, 0, None)  # it never began: what it has is what the plan gave it
    assert (places.form([7], shape, ["a"]).hosted[:, :, 0]).all()


def test_a_trace_is_solved_for_the_nodes_that_came(tmp_path):
    """Tokens use experts {0, 2, 4, 6} or {1, 3, 5, 7} together: each lot belongs on one node."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(4)[:2] * 2 + n % 2 for n in range(400)])[:, None].repeat(2, 1).astype(np.int16)
    trace = RoutingTrace(expert_ids=ids, sequence_lengths=np.full(40, 10, np.int32), num_experts=8, model="m")
    trace.save(tmp_path / "trace.npz")
    nodes = ("a", "a", "b", "b")
    plan = first_plan(str(tmp_path / "trace.npz"), (2, 8), nodes)
    of_node = plan.hosted.reshape(2, 8, 2, 2).any(axis=3)  # [L, E, node]
    for layer in of_node:
        assert {tuple(layer[e]) for e in (0, 2, 4, 6)} | {tuple(layer[e]) for e in (1, 3, 5, 7)} == {
            (True, False),
            (False, True),
        }
        assert len({tuple(layer[e]) for e in (0, 2, 4, 6)}) == 1
    with pytest.raises(ValueError, match=r"this run has 3 of 8 on 4"):
        first_plan(str(tmp_path / "trace.npz"), (3, 8), nodes)
    assert (first_plan(None, (2, 8), nodes).hosted == Plan.contiguous(2, 8, 4).hosted).all()


def request_of(number: int) -> Request:
    return Request(number, [1, 2, 3], SamplingParams(seed=0), 3)


def drain(ledger: Ledger) -> list[tuple[int, int]]:
    said = []
    while ledger.has_news:
        said += [(request.id, request.tokens[-1]) for request in ledger.hand_out()]
    return said


def test_one_token_at_a_time_is_handed_out():
    ledger, request = Ledger(), request_of(0)
    ledger.add(request)
    (dealt,) = ledger.deal([7], 4)[7]
    assert (dealt.tokens, dealt.num_prompt) == ([1, 2, 3], 3)
    ledger.hear(7, [Said(0, 10), Said(0, 11), Said(0, 12, "length")])
    for token in (10, 11):
        assert [r.tokens[-1] for r in ledger.hand_out()] == [token]
        assert request.finish_reason is None
    assert ledger.hand_out() == [request]
    assert (request.tokens, request.finish_reason, len(ledger)) == ([1, 2, 3, 10, 11, 12], "length", 0)


def test_a_lost_hosts_requests_go_on_elsewhere_and_its_late_words_count_for_nothing():
    ledger = Ledger()
    for number in range(3):
        ledger.add(request_of(number))
    assert [d.id for d in ledger.deal([1], 2)[1]] == [0, 1]
    ledger.hear(1, [Said(0, 10), Said(1, 20), Said(0, 11)])
    assert ledger.take_back([2]) == 2
    ledger.hear(1, [Said(0, 99)])
    dealt = ledger.deal([2], 9)[2]
    assert [(d.id, d.tokens[3:]) for d in dealt] == [(0, [10, 11]), (1, [20]), (2, [])]
    ledger.hear(2, [Said(0, 12), Said(2, 30)])
    assert sorted(drain(ledger)) == [(0, 10), (0, 11), (0, 12), (1, 20), (2, 30)]


def test_a_request_may_come_with_a_part_of_its_answer():
    ledger, request = Ledger(), Request(0, [1, 2, 3, 10, 11], SamplingParams(seed=0), 3)
    ledger.add(request)
    assert [(d.tokens, d.num_prompt) for d in ledger.deal([1], 2)[1]] == [([1, 2, 3, 10, 11], 3)]
    ledger.hear(1, [Said(0, 12), Said(0, 13)])
    assert drain(ledger) == [(0, 12), (0, 13)]
    ledger.take_back([])
    assert [d.tokens for d in ledger.deal([2], 2)[2]] == [[1, 2, 3, 10, 11, 12, 13]]


def test_a_request_that_ended_before_the_loss_is_not_computed_again():
    ledger, request = Ledger(), request_of(0)
    ledger.add(request)
    ledger.deal([1], 2)
    ledger.hear(1, [Said(0, 10, "stop")])
    assert ledger.take_back([]) == 0
    assert drain(ledger) == [(0, 10)]


def test_nothing_is_said_of_a_request_that_its_user_ended():
    ledger, queued, running = Ledger(), request_of(0), request_of(1)
    for one in (running, queued):
        ledger.add(one)
    ledger.deal([1], 1)
    ledger.hear(1, [Said(1, 10)])
    assert ledger.finish(queued, "abort") is None
    assert ledger.finish(running, "abort") == 1
    ledger.hear(1, [Said(1, 11)])
    assert drain(ledger) == []
    assert (len(ledger), ledger.num_queued, ledger.load(1)) == (0, 0, 0)


def test_hosts_are_dealt_many_at_once_and_what_has_begun_waits_for_nothing():
    ledger = Ledger()
    for number in range(9):
        ledger.add(request_of(number))
    assert {host: [d.id for d in dealt] for host, dealt in ledger.deal([1, 2], 4).items()} == {
        1: [0, 2, 4, 6],
        2: [1, 3, 5, 7],
    }
    ledger.hear(1, [Said(0, 10, "stop"), Said(2, 20)])
    assert ledger.deal([1, 2], 4) == {}  # host 1 has three of four
    assert ledger.take_back([2]) == 3
    assert [d.id for d in ledger.deal([2], 4)[2]] == [2]  # its answer has begun; 4 and 6 wait, as 8 does
    assert (ledger.load(1), ledger.load(2), ledger.num_queued) == (0, 5, 3)
    ledger.hear(2, [Said(n, 9, "stop") for n in (1, 3, 5)])
    assert [d.id for d in ledger.deal([2], 4)[2]] == [4, 6]
    assert ledger.num_queued == 1


def test_the_silence_limit_grows_with_slow_steps():
    policy = FailurePolicy(ClusterConfig(silence_s=3, silence_steps=10, stuck_s=60))
    assert policy.silence_limit([]) == policy.silence_limit([0.1]) == 3
    assert policy.silence_limit([1.0, 1.0, 9.0]) == 10
    assert policy.is_hung(3.1, 0, False, [])
    assert not policy.is_hung(3.1, 0, False, [1.0])
    assert policy.is_hung(0, 61, True, [])
    assert not policy.is_hung(0, 61, False, [])  # it has nothing to do
    assert not policy.does_not_leave(19.9, [1.0])  # it is in a step that takes so long
    assert policy.does_not_leave(20.1, [1.0])


def test_replacements_and_spares():
    policy = FailurePolicy(ClusterConfig(spares=1))
    assert policy.hosts_to_start(3, 3, 1) == 0
    assert policy.hosts_to_start(3, 2, 0) == 2
    assert FailurePolicy(ClusterConfig(replaces=False)).hosts_to_start(3, 1, 0) == 0
    with pytest.raises(ValueError, match=r"silence_s \(0.0\) must be positive"):
        ClusterConfig(silence_s=0)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def idle_beat(wait_s: float) -> Beat:
    time.sleep(wait_s)
    return Beat(0, 0, 0)


@pytest.mark.parametrize(
    "said",
    [
        Said(1, 10),
        Said(2, 11, "length"),
        Said(3, None, "error", error="no\nroom"),
        Said(4, 5, None, Logprobs(-0.1234567890123456789, {5: -0.1, 7: float("-inf")}, 1)),
        Said(5, 6, "stop", None, None, (Logprobs(-1.5, {}, 3), Logprobs(-2.5, {9: -2.5}, 1))),
    ],
)
def test_words_are_the_same_behind_a_line(said):
    beat = Beat(3, 4, 5, [said, Said(9, 9)])
    line = beat.to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Beat.from_line(line) == beat


@pytest.mark.parametrize(
    "line", [b"", b"5 7", b"[1,2,3]", b"[1,2,3,4]", b"[1,2,3,[[]]]", b'{"a":1}', b"[1,2,3,[[1,2,3,[]]]]"]
)
def test_what_is_no_beat_ends_the_line(line):
    with pytest.raises(ValueError, match="no beat of a host"):
        Beat.from_line(line)


def test_a_line_says_when_its_host_is_gone_or_given_up_and_refuses_strangers():
    lines = Lines("127.0.0.1", "word")
    stranger = socket.create_connection(("127.0.0.1", lines.port))
    stranger.sendall(b"another 5\n")
    assert stranger.recv(1) == b""  # hung up
    child = os.fork()
    if not child:
        desk = Desk()
        desk.submit([dealt(5, 1, 1, 1)])
        desk.hand_over(EngineOfAFewTokens())  # it has no room
        Lifeline("127.0.0.1", lines.port, "word", 3).start(lambda wait: Beat(17, 4, 2, desk.collect(0, wait)[1]))
        time.sleep(60)
    assert lines.wait_for_words(3, 1, 20)
    line = lines.get(3)
    assert (line.steps, line.free_blocks, line.placed) == (17, 4, 2)
    assert lines.take_words()[0] == (3, [Said(5, None, "error", error="no room")])
    lines.wait(20)
    assert not lines.get(3).is_closed
    os.kill(child, 9)
    os.waitpid(child, 0)
    until(lambda: lines.get(3).is_closed)
    assert lines.get(5) is None
    is_told = threading.Event()
    Lifeline("127.0.0.1", lines.port, "word", 4, is_told.set).start(idle_beat)
    until(lambda: lines.get(4) is not None)
    assert not lines.wait_for_words(4, 1, 0.0)
    lines.hang_up(4)
    assert is_told.wait(20)
    until(lambda: lines.get(4).is_closed)
    lines.hang_up(4)
    lines.close()


def test_a_sign_that_nobody_has_read_yet_is_one():
    """The thread that reads it did not get to run."""
    lines, (here, there) = Lines("127.0.0.1", "word"), socket.socketpair()
    line = Line(here, heard=-100.0, moved=-50.0)
    assert lines.since(line)[0] >= 100
    there.sendall(Beat(5, 7, 0).to_line())
    silent, stuck = lines.since(line)
    assert silent == 0.0
    assert stuck >= 50
    here.recv(100)
    assert lines.since(line)[0] >= 100
    there.close()
    here.close()
    lines.close()


def test_time_in_which_the_controller_was_stopped_does_not_count():
    """Its process is stopped again and again, for longer than a host may be silent: nobody is given up."""
    receiver, sender = MULTIPROCESSING.Pipe(duplex=False)
    child = MULTIPROCESSING.Process(target=watch_a_line, args=(sender,), daemon=True)
    child.start()
    assert receiver.recv() == "watches"
    for seconds in (2.5, 0.9, 0.9, 0.9):
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.05)
    assert receiver.recv() < 2.0
    child.join(10)


def watch_a_line(sender) -> None:
    lines = Lines("127.0.0.1", "word")
    Lifeline("127.0.0.1", lines.port, "word", 1).start(idle_beat)
    until(lambda: lines.get(1) is not None)
    sender.send("watches")
    started, longest = time.monotonic(), 0.0
    while time.monotonic() - started < 6:
        longest = max(longest, lines.since(lines.get(1))[0])
    sender.send(longest)


class EngineOfAFewTokens:
    """Numbers requests from 100, refuses prompts of more than two tokens."""

    def __init__(self) -> None:
        self.running: dict[int, Request] = {}
        self.ended: list[tuple[int, str]] = []

    def add_request(self, tokens, params, num_prompt=None):
        if len(tokens) > 2:
            raise ValueError("no room")
        request = Request(100 + len(self.running), list(tokens), params, num_prompt or len(tokens))
        self.running[request.id] = request
        return request

    def finish(self, request, reason):
        self.ended.append((request.id, reason))

    def says(self, number, token, finish_reason=None):
        request = self.running[number]
        request.tokens.append(token)
        request.finish_reason = finish_reason
        return request


def dealt(number, *tokens):
    return Dealt(number, list(tokens), len(tokens), SamplingParams())


def test_words_go_by_number_until_they_have_arrived():
    desk, engine = Desk(), EngineOfAFewTokens()
    desk.submit([dealt(1, 5), dealt(2, 6)])
    desk.hand_over(engine)
    desk.stepped([engine.says(100, 10), engine.says(101, 20)])
    assert desk.collect(0, 0.0) == (0, [Said(1, 10), Said(2, 20)])
    desk.stepped([engine.says(100, 11)])
    assert desk.collect(0, 0.0)[1] == [Said(1, 10), Said(2, 20), Said(1, 11)]  # asked again: the answer was lost
    assert desk.collect(2, 0.0) == (2, [Said(1, 11)])
    assert desk.collect(3, 0.0) == (3, [])


def test_who_is_cancelled_refused_or_done_is_heard_of_no_more():
    desk, engine = Desk(), EngineOfAFewTokens()
    desk.submit([dealt(1, 5), dealt(2, 6), dealt(3, 7, 7, 7)])
    desk.cancel([2, 7])  # 2 before it was begun, 7 is of nobody here
    desk.hand_over(engine)
    assert [r.tokens for r in engine.running.values()] == [[5]]
    assert desk.collect(0, 0.0) == (0, [Said(3, None, "error", error="no room")])
    desk.hand_over(engine)
    assert len(engine.running) == 1
    desk.submit([dealt(4, 8), dealt(5, 9)])
    desk.hand_over(engine)
    desk.cancel([4])
    desk.hand_over(engine)
    assert engine.ended == [(101, "abort")]
    desk.stepped([engine.says(100, 10, "stop"), engine.says(101, 11), engine.says(102, 12)])
    assert desk.collect(1, 0.0)[1] == [Said(1, 10, "stop"), Said(5, 12)]
    desk.clear(engine)
    assert engine.ended == [(101, "abort"), (102, "abort")]
    desk.stepped([engine.says(100, 13), engine.says(102, 14)])
    assert desk.collect(3, 0.0) == (3, [])


def test_settings_of_a_cluster():
    asked = EngineConfig.load(None, ["cluster.labels=a=b,c/d=e", "cluster.gpus_per_host=0.5"]).cluster
    assert (asked.label_selector(), asked.gpus_per_host) == ({"a": "b", "c/d": "e"}, 0.5)
    with pytest.raises(ValueError, match=r"cluster.labels \('H100'\) must look like"):
        EngineConfig.load(None, ["cluster.labels=H100"])
    with pytest.raises(ValueError, match=r"cluster.silence_s \('soon'\) must be a number"):
        EngineConfig.load(None, ["cluster.silence_s=soon"])
    with pytest.raises(ValueError, match=r"cluster.least_in_memory \(-1.0\) must be >= 0"):
        ClusterConfig(least_in_memory=-1)


def test_answers_of_a_column():
    stage = Answers(TINYMOE, ("dtype=float32", "offload.budget=0.5"), column="text", max_tokens=4, temperature=0)
    rows = np.empty(3, object)
    rows[:] = ["Once upon a time", [5, 6, 7], [1] * 5000]
    found = stage({"text": rows, "number": np.arange(3)})
    assert found["number"].tolist() == [0, 1, 2]
    assert [len(tokens) for tokens in found["answer_tokens"]] == [4, 4, 0]
    assert found["finish_reason"].tolist() == ["length", "length", "error"]
    assert found["error"][0] is None
    assert "5000" in found["error"][2]
    with pytest.raises(ValueError, match="no column 'text' in prompt"):
        stage({"prompt": rows})


def test_commands_and_files_for_clusters_can_be_read():
    """Every command of the page, and what `ray up` would read."""
    text = (ROOT / "docs" / "ray.md").read_text() + (ROOT / "examples/launch/laptop_hosts.sh").read_text()
    commands = re.findall(r"-m moe\.launch\.ray_cluster (.*)", text.replace("\\\n", " "))
    assert len(commands) == 3
    for command in commands:
        assert ray_cluster.make_parser().parse_args(shlex.split(command)).hosts >= 3
    cluster = yaml.safe_load((ROOT / "examples/launch/ray_cluster.yaml").read_text())
    head, workers = (cluster["available_node_types"][name] for name in ("head", "expert_host"))
    asked = re.search(r"moe (serve .*?)'", (ROOT / "examples/launch/ray_cluster.yaml").read_text(), re.S)[1]
    args = _parser().parse_args(shlex.split(asked.replace("#", "").replace("\\\n", " ")))
    wanted = engine_config(args).cluster
    assert wanted.label_selector().items() <= workers["labels"].items()
    assert (workers["resources"]["GPU"], head["resources"]["GPU"]) == (1, 0)
    assert workers["min_workers"] < args.hosts + wanted.spares <= workers["max_workers"], "one machine is yet to start"
    assert wanted.room_s >= 1200
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(cluster))
