"""Every request of a cluster with its tokens so far: whose words count, and who computes what."""

from moe.cluster.ledger import Ledger
from moe.cluster.messages import Said
from moe.engine.requests import Request
from moe.params import SamplingParams


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
    ledger.hear(7, [Said(0, (10,)), Said(0, (11,)), Said(0, (12,), "length")])
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
    ledger.hear(1, [Said(0, (10,)), Said(1, (20,)), Said(0, (11,))])
    assert ledger.take_back([2]) == 2
    ledger.hear(1, [Said(0, (99,))])
    dealt = ledger.deal([2], 9)[2]
    assert [(d.id, d.tokens[3:]) for d in dealt] == [(0, [10, 11]), (1, [20]), (2, [])]
    ledger.hear(2, [Said(0, (12,)), Said(2, (30,))])
    assert sorted(drain(ledger)) == [(0, 10), (0, 11), (0, 12), (1, 20), (2, 30)]


def test_a_request_may_come_with_a_part_of_its_answer():
    ledger, request = Ledger(), Request(0, [1, 2, 3, 10, 11], SamplingParams(seed=0), 3)
    ledger.add(request)
    assert [(d.tokens, d.num_prompt) for d in ledger.deal([1], 2)[1]] == [([1, 2, 3, 10, 11], 3)]
    ledger.hear(1, [Said(0, (12,)), Said(0, (13,))])
    assert drain(ledger) == [(0, 12), (0, 13)]
    ledger.take_back([])
    assert [d.tokens for d in ledger.deal([2], 2)[2]] == [[1, 2, 3, 10, 11, 12, 13]]


def test_a_request_that_ended_before_the_loss_is_not_computed_again():
    ledger, request = Ledger(), request_of(0)
    ledger.add(request)
    ledger.deal([1], 2)
    ledger.hear(1, [Said(0, (10,), "stop")])
    assert ledger.take_back([]) == 0
    assert drain(ledger) == [(0, 10)]


def test_nothing_is_said_of_a_request_that_its_user_ended():
    ledger, queued, running = Ledger(), request_of(0), request_of(1)
    for one in (running, queued):
        ledger.add(one)
    ledger.deal([1], 1)
    ledger.hear(1, [Said(1, (10,))])
    assert ledger.finish(queued, "abort") is None
    assert ledger.finish(running, "abort") == 1
    ledger.hear(1, [Said(1, (11,))])
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
    ledger.hear(1, [Said(0, (10,), "stop"), Said(2, (20,))])
    assert ledger.deal([1, 2], 4) == {}  # host 1 has three of four
    assert ledger.take_back([2]) == 3
    assert [d.id for d in ledger.deal([2], 4)[2]] == [2]  # its answer has begun; 4 and 6 wait, as 8 does
    assert (ledger.load(1), ledger.load(2), ledger.num_queued) == (0, 5, 3)
    ledger.hear(2, [Said(n, (9,), "stop") for n in (1, 3, 5)])
    assert [d.id for d in ledger.deal([2], 4)[2]] == [4, 6]
    assert ledger.num_queued == 1


def test_several_tokens_may_be_told_at_once():
    ledger, request = Ledger(), request_of(0)
    request.is_awaited = False
    ledger.add(request)
    assert [dealt.is_awaited for dealt in ledger.deal([1], 4)[1]] == [False]
    ledger.hear(1, [Said(0, (10, 11, 12))])
    ledger.take_back([])
    assert [dealt.tokens for dealt in ledger.deal([2], 4)[2]] == [[1, 2, 3, 10, 11, 12]]
    ledger.hear(2, [Said(0, (13,), "stop")])
    assert ledger.hand_out() == [request]
    assert (request.tokens, request.finish_reason) == ([1, 2, 3, 10, 11, 12], None)
    assert ledger.hand_out() == [request]
    assert (request.tokens, request.finish_reason, ledger.num_handed_out) == ([1, 2, 3, 10, 11, 12, 13], "stop", 4)
