"""Requests in and words out, between the thread that steps and its callers."""

from moe.cluster.desk import Desk, Outbox
from moe.cluster.messages import Dealt, Said
from moe.engine.requests import Request
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


def dealt(number, *tokens):
    return Dealt(number, list(tokens), len(tokens), SamplingParams())


def test_words_go_by_number_until_they_have_arrived():
    outbox, engine = Outbox(), EngineOfAFewTokens()
    desk = Desk(outbox.tell)
    desk.submit([dealt(1, 5), dealt(2, 6)])
    desk.hand_over(engine)
    desk.stepped([engine.says(100, 10), engine.says(101, 20)])
    assert outbox.collect(0, 0.0) == (0, [Said(1, 10), Said(2, 20)])
    desk.stepped([engine.says(100, 11)])
    assert outbox.collect(0, 0.0)[1] == [Said(1, 10), Said(2, 20), Said(1, 11)]  # asked again: the answer was lost
    assert outbox.collect(2, 0.0) == (2, [Said(1, 11)])
    assert outbox.collect(3, 0.0) == (3, [])


def test_who_is_cancelled_refused_or_done_is_heard_of_no_more():
    outbox, engine = Outbox(), EngineOfAFewTokens()
    desk = Desk(outbox.tell)
    desk.submit([dealt(1, 5), dealt(2, 6), dealt(3, 7, 7, 7)])
    desk.cancel([2, 7])  # 2 before it was begun, 7 is of nobody here
    desk.hand_over(engine)
    assert [r.tokens for r in engine.running.values()] == [[5]]
    assert outbox.collect(0, 0.0) == (0, [Said(3, None, "error", error="no room")])
    desk.hand_over(engine)
    assert len(engine.running) == 1
    desk.submit([dealt(4, 8), dealt(5, 9)])
    desk.hand_over(engine)
    desk.cancel([4])
    desk.hand_over(engine)
    assert engine.ended == [(101, "abort")]
    desk.stepped([engine.says(100, 10, "stop"), engine.says(101, 11), engine.says(102, 12)])
    assert outbox.collect(1, 0.0)[1] == [Said(1, 10, "stop"), Said(5, 12)]
    desk.clear(engine)
    assert engine.ended == [(101, "abort"), (102, "abort")]
    desk.stepped([engine.says(100, 13), engine.says(102, 14)])
    assert outbox.collect(3, 0.0) == (3, [])
