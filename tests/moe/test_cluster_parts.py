"""What a cluster is made of, without Ray: who keeps which expert, whose words count, when a host is given up."""

import os
import socket
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.cluster.ledger import Ledger
from moe.cluster.lines import Lifeline, Lines
from moe.cluster.messages import Said
from moe.cluster.plans import plan_for
from moe.cluster.policy import FailurePolicy
from moe.engine.requests import Request
from moe.params import SamplingParams


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


def test_the_silence_limit_grows_with_slow_steps():
    policy = FailurePolicy(silence_s=3, silence_steps=10, stuck_s=60)
    assert policy.silence_limit([]) == policy.silence_limit([0.1]) == 3
    assert policy.silence_limit([1.0, 1.0, 9.0]) == 10
    assert policy.is_hung(3.1, 0, False, [])
    assert not policy.is_hung(3.1, 0, False, [1.0])
    assert policy.is_hung(0, 61, True, [])
    assert not policy.is_hung(0, 61, False, [])  # it has nothing to do


def test_replacements_and_spares():
    policy = FailurePolicy(spares=1)
    assert policy.hosts_to_start(3, 3, 1) == 0
    assert policy.hosts_to_start(3, 2, 0) == 2
    assert FailurePolicy(replaces=False).hosts_to_start(3, 1, 0) == 0
    with pytest.raises(ValueError, match=r"silence_s \(0\) must be positive"):
        FailurePolicy(silence_s=0)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_line_says_when_its_host_is_gone_and_refuses_strangers():
    lines = Lines("127.0.0.1", "word")
    stranger = socket.create_connection(("127.0.0.1", lines.port))
    stranger.sendall(b"another 5\n")
    assert stranger.recv(1) == b""  # hung up
    child = os.fork()
    if not child:
        Lifeline("127.0.0.1", lines.port, "word", 3).steps = 17
        time.sleep(60)
    until(lambda: lines.get(3) is not None and lines.get(3).steps == 17)
    assert not lines.get(3).is_closed
    os.kill(child, 9)
    os.waitpid(child, 0)
    until(lambda: lines.get(3).is_closed)
    assert lines.get(5) is None
    lines.close()
