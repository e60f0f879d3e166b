"""Requests in and words out, between the thread that steps and its callers."""

from types import SimpleNamespace

from moe.cluster.desk import Desk, Outbox
from moe.cluster.messages import Dealt, Said
from moe.engine.requests import Request
from moe.engine.sampling import Logprobs
from moe.params import SamplingParams


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


def dealt(number, *tokens, is_awaited=True, **params):
    return Dealt(number, list(tokens), len(tokens), SamplingParams(**params), is_awaited)


def test_words_go_by_number_until_they_have_arrived():
    outbox, engine = Outbox(), EngineOfAFewTokens()
    desk = Desk(outbox.tell)
    desk.submit([dealt(1, 5), dealt(2, 6)])
    desk.hand_over(engine)
    desk.stepped([engine.says(100, 10), engine.says(101, 20)])
    assert outbox.collect(0, 0.0) == (0, [Said(1, (10,)), Said(2, (20,))])
    desk.stepped([engine.says(100, 11)])
    assert outbox.collect(0, 0.0)[1] == [
        Said(1, (10,)),
        Said(2, (20,)),
        Said(1, (11,)),
    ]  # again: it was lost
    assert outbox.collect(2, 0.0) == (2, [Said(1, (11,))])
    assert outbox.collect(3, 0.0) == (3, [])


def test_who_is_cancelled_refused_or_done_is_heard_of_no_more():
    outbox, engine = Outbox(), EngineOfAFewTokens()
    desk = Desk(outbox.tell)
    desk.submit([dealt(1, 5), dealt(2, 6), dealt(3, 7, 7, 7)])
    desk.cancel([2, 7])  # 2 before it was begun, 7 is of nobody here
    desk.hand_over(engine)
    assert [r.tokens for r in engine.running.values()] == [[5]]
    assert outbox.collect(0, 0.0) == (0, [Said(3, (), "error", error="no room")])
    desk.hand_over(engine)
    assert len(engine.running) == 1
    desk.submit([dealt(4, 8), dealt(5, 9)])
    desk.hand_over(engine)
    desk.cancel([4])
    desk.hand_over(engine)
    assert engine.ended == [(101, "abort")]
    desk.stepped([engine.says(100, 10, "stop"), engine.says(101, 11), engine.says(102, 12)])
    assert outbox.collect(1, 0.0)[1] == [Said(1, (10,), "stop"), Said(5, (12,))]
    desk.clear(engine)
    assert engine.ended == [(101, "abort"), (102, "abort")]
    desk.stepped([engine.says(100, 13), engine.says(102, 14)])
    assert outbox.collect(3, 0.0) == (3, [])


def test_tokens_that_nobody_waits_for_are_told_together():
    said, engine = list[list[Said]](), EngineOfAFewTokens()
    desk = Desk(lambda words: said.append(list(words)), hold_s=1e9)
    desk.submit([dealt(1, 5, is_awaited=False, logprobs=0), dealt(2, 6, is_awaited=False), dealt(3, 7)])
    desk.hand_over(engine)
    chosen = [Logprobs(-1.0, {}, 1), Logprobs(-2.0, {}, 1)]
    engine.running[100].logprobs.append(chosen[0])
    desk.stepped([engine.says(100, 10), engine.says(101, 20)])
    engine.running[100].logprobs.append(chosen[1])
    desk.stepped([engine.says(100, 11, "length"), engine.says(101, 21)])
    assert said == []
    desk.stepped([engine.says(102, 30)])  # this one is waited for, and takes the others along
    whole = Said(1, (10, 11), "length", tuple(chosen))
    assert said == [[whole, Said(2, (20, 21)), Said(3, (30,))]]
    desk.stepped([engine.says(101, 22)])
    desk.stepped([], may_hold=False)  # nothing is left to compute
    assert said[1:] == [[Said(2, (22,))]]
    desk.stepped([engine.says(101, 23)])
    desk.tell_all()  # the generation ends
    assert said[2:] == [[Said(2, (23,))]]
    desk.tell_all()
    desk.stepped([engine.says(101, 24)])
    desk.cancel([2])
    desk.hand_over(engine)
    desk.tell_all()
    assert len(said) == 3


def test_tokens_that_nobody_waits_for_are_held_for_so_long(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("moe.cluster.desk.time", SimpleNamespace(monotonic=lambda: now[0]))
    said, engine = list[list[Said]](), EngineOfAFewTokens()
    desk = Desk(lambda words: said.append(list(words)), hold_s=0.02)
    desk.submit([dealt(1, 5, is_awaited=False)])
    desk.hand_over(engine)
    desk.stepped([engine.says(100, 10)])
    assert said == []
    now[0] += 0.019
    desk.stepped([engine.says(100, 11)])
    assert said == []
    now[0] += 0.002
    desk.stepped([engine.says(100, 12)])
    assert said == [[Said(1, (10, 11, 12))]]


def test_an_end_is_told_at_once_when_others_may_come():
    said, engine = list[list[Said]](), EngineOfAFewTokens()
    desk = Desk(lambda words: said.append(list(words)), hold_s=1e9, few=2)
    desk.submit([dealt(number, 5, is_awaited=False) for number in range(4)])
    desk.hand_over(engine)
    desk.stepped([engine.says(100, 10, "length"), engine.says(101, 20)])
    assert said == []  # three are left
    desk.stepped([engine.says(101, 21, "length"), engine.says(102, 30)])
    assert said == [[Said(0, (10,), "length"), Said(1, (20, 21), "length"), Said(2, (30,))]]
    desk.stepped([engine.says(102, 31)])
    assert len(said) == 1  # none has ended


def test_what_a_request_came_with_is_not_told_again():
    said, engine = list[list[Said]](), EngineOfAFewTokens()
    desk = Desk(lambda words: said.append(list(words)))
    desk.submit([Dealt(1, [5, 6], 1, SamplingParams())])  # 6 was said elsewhere
    desk.hand_over(engine)
    desk.stepped([engine.says(100, 7)])
    engine.running[100].error = "its logits are not finite"
    engine.running[100].finish_reason = "error"
    desk.stepped([engine.running[100]])
    assert said == [[Said(1, (7,))], [Said(1, (), "error", error="its logits are not finite")]]
