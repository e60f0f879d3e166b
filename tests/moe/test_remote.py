"""A service's end and controllers that compute nothing, without Ray: stopped, lost or without hosts, at any time.

Desk, ledger and policy are the real ones; `Starts` stands for Ray. A stopped controller answers when it goes on.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import pytest

pytest.importorskip("ray")
from moe.cluster.policy import ClusterError
from moe.cluster.remote import RemoteEngine
from moe.cluster.resident import Attached, Collected, ControllerEnded, Controllers, ControllerSilent, Session
from moe.cluster.stats import ClusterStats, ClusterStatus
from moe.config import BatchConfig, EngineConfig
from moe.engine.limits import Limits
from moe.engine.requests import Request
from moe.params import SamplingParams
from tests.moe.moe_cases import TINYMOE

LENGTH = 40
LIMITS = {"room_s": 0.05, "load_s": 0.05, "meet_s": 0.05, "answer_s": 0.05}  # the first answer is waited for 0.55 s


class Engine:
    """A token of each request a step: how many the request has so far."""

    def __init__(self) -> None:
        self.running: dict[int, Request] = {}
        self.next_id = 0

    def add_request(self, tokens: Any, params: Any, num_prompt: Any = None) -> Request:
        request = self.running[self.next_id] = Request(self.next_id, list(tokens), params, num_prompt or len(tokens))
        self.next_id += 1
        return request

    def finish(self, request: Request, reason: Any) -> None:
        del self.running[request.id]

    def step(self) -> list[Request]:
        moved = list(self.running.values())
        for request in moved:
            request.tokens.append(len(request.tokens))
            if request.num_output == request.params.max_tokens:
                request.finish_reason = "length"
                del self.running[request.id]
        return moved


class Controller:
    """As `Resident`, by calls that give futures. how: what is the matter with it."""

    def __init__(self, folder: str, how: str, weights: str) -> None:
        self.weights = "ffffffffffffffff" if how == "other weights" else weights
        self.folder, self.how, self.engine, self.session = folder, how, Engine(), Session.new("")
        self.runs, self.has_ended = how != "stopped", False
        self.waiting: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": lambda _, *given: self._call(getattr(self, f"do_{name}"), given)})()

    def _call(self, function: Callable[..., Any], given: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def obey() -> None:
            try:
                if self.has_ended:
                    raise ControllerEnded("the controller ended: its process has died")
                if (result := function(*given)) is not NotImplemented:  # else it never answers
                    future.set_result(result)
            except (ValueError, ClusterError) as error:
                future.set_exception(error)

        if self.runs or self.has_ended:
            obey()
        else:
            self.waiting.append(obey)
        return future

    def goes_on(self) -> None:
        """As by SIGCONT."""
        self.runs, waiting, self.waiting = True, self.waiting, []
        for obey in waiting:
            obey()

    def ends(self) -> None:
        self.has_ended = True
        self.goes_on()

    def do_served(self) -> str:
        return self.folder

    def do_attach(self, session: str) -> Any:
        if self.how == "loads for ever":
            return NotImplemented
        if self.how == "ends":
            raise ControllerEnded("the controller ended: its process has died")
        if self.how == "no room":
            raise ValueError("Ray has no room for 2 bundles")
        self.session = Session.new(session)
        return Attached(Limits(2048, 512, 16, 99, frozenset()), (), BatchConfig(), *self.do_status(), self.weights)

    def do_submit(self, session: str, dealt: Any) -> None:
        self._check(session)
        self.session.desk.submit(dealt)

    def do_cancel(self, session: str, ids: Any) -> None:
        self._check(session)
        self.session.desk.cancel(ids)

    def do_collect(self, session: str, after: int, wait_s: float) -> Collected:
        self._check(session)
        self.session.desk.hand_over(self.engine)
        self.session.desk.stepped(self.engine.step())
        return Collected(*self.session.outbox.collect(after, 0.0), None)

    def do_status(self) -> tuple[ClusterStatus, ClusterStats]:
        if not self.session.name:
            raise ClusterError("the hosts load the model")
        of = {"state": "serving", "generation": 1, "target": 2, "hosts": (), "plan": None, "noted": ()}
        return ClusterStatus(model=self.how, counts=ClusterStats(), **of), ClusterStats()

    def _check(self, session: str) -> None:
        if session != self.session.name:
            raise ClusterError("another server has taken this cluster over")


class Starts(Controllers):
    """hows: what is the matter with the controllers that are started, one after another; then they are well."""

    def __init__(self, *hows: str) -> None:
        self.name, self.hows, self.started, self.is_closed = "test", list(hows), list[Controller](), False
        self.actor: Controller | None = None

    def start(self, folder: str, *others: Any) -> Any:
        if self.actor is None:
            self.actor = Controller(folder, self.hows.pop(0) if self.hows else "well", others[-1])
            self.started.append(self.actor)
        return self.actor

    def has_come(self, reference: Any, wait_s: float) -> bool:
        return bool(wait([reference], wait_s).done)

    def answer(self, reference: Any, limit_s: float) -> Any:
        try:
            return reference.result(limit_s)
        except TimeoutError:
            raise ControllerSilent(f"the controller 'test' did not answer within {limit_s:g} s") from None

    def stop(self, limit_s: float) -> None:
        self.actor = None

    def close(self) -> None:
        self.is_closed = True


def engine_of(starts: Starts) -> RemoteEngine:
    return RemoteEngine(TINYMOE, EngineConfig.load(None, [f"cluster.{k}={v}" for k, v in LIMITS.items()]), 2, starts)


def ask(engine: RemoteEngine) -> list[Request]:
    return [engine.add_request([5] * n, SamplingParams(max_tokens=LENGTH, seed=0)) for n in (3, 4, 5)]


def check_answers(engine: RemoteEngine, requests: list[Request]) -> None:
    for _ in range(1000):
        if not engine.has_work:
            break
        engine.step()
    assert all(r.finish_reason == "length" for r in requests)
    assert [r.tokens for r in requests] == [[5] * n + list(range(n, n + LENGTH)) for n in (3, 4, 5)]
    assert engine.why_not_whole() is None


@pytest.mark.parametrize(
    ("how", "error", "sentence", "is_left"),
    [
        ("stopped", ControllerSilent, "did not answer within 0.55 s", True),
        ("loads for ever", ControllerSilent, "did not answer within 0.2 s", True),
        ("ends", ControllerEnded, "the controller ended", True),
        ("no room", ValueError, "Ray has no room", False),
        ("other weights", ValueError, r"weights .* changed \(fingerprint f{16}, now [0-9a-f]{16}\); end it", True),
    ],
)
def test_a_start_ends_with_a_sentence(how, error, sentence, is_left):
    """Whoever is silent may be another server's, and is left; whoever says that it has no hosts is ended."""
    starts = Starts(how)
    with pytest.raises(error, match=sentence):
        engine_of(starts)
    assert starts.is_closed
    assert (starts.actor is not None) == is_left


@pytest.mark.parametrize("fault", ["stopped", "ends"])
def test_a_controller_that_is_lost_is_followed_by_another(fault):
    starts = Starts()
    engine = engine_of(starts)
    requests = ask(engine)
    for _ in range(9):
        engine.step()
    first = starts.started[0]
    if fault == "stopped":
        first.runs = False
    else:
        first.ends()
    check_answers(engine, requests)
    assert len(starts.started) == 2
    first.goes_on()  # late: what it says now is of nobody
    check_answers(engine, ask(engine))
    engine.close()
    assert starts.is_closed


def test_a_controller_that_is_stopped_for_less_is_waited_for():
    starts = Starts()
    engine = engine_of(starts)
    requests = ask(engine)
    for _ in range(5):
        starts.started[0].runs = False
        for _ in range(4):  # of at most 0.05 s each, and it may be silent for 0.55 s
            engine.step()
        starts.started[0].goes_on()
        engine.step()
    check_answers(engine, requests)
    assert len(starts.started) == 1


@pytest.mark.parametrize("how", ["stopped", "loads for ever", "ends", "no room"])
def test_a_successor_that_does_not_begin_is_followed_by_a_third(how):
    """The step ends with what is the matter; the next begins with another, and nothing that was said is lost."""
    starts = Starts("well", how)
    engine = engine_of(starts)
    requests = ask(engine)
    for _ in range(9):
        engine.step()
    starts.started[0].ends()
    with pytest.raises((ClusterError, ValueError), match=r"did not answer|ended|no room"):
        check_answers(engine, requests)
    assert engine.status().model == "well"  # as it was last
    check_answers(engine, requests)
    assert [one.how for one in starts.started] == ["well", how, "well"]


def test_a_server_whose_cluster_was_taken_over_ends_and_leaves_it():
    starts = Starts()
    engine = engine_of(starts)
    requests = ask(engine)
    starts.started[0].session = Session.new("another")
    with pytest.raises(ClusterError, match="another server has taken"):
        check_answers(engine, requests)
    assert "another server" in str(engine.why_not_whole())
    engine.close()
    assert starts.actor is not None
