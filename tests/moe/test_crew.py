"""A crew and hosts that compute nothing, without Ray: what becomes of hosts that stop while they load, or have no room.

Lines, ledger, policy and plans are the real ones; `Hosts` stands for Ray, its hosts live in threads of the test, and
time passes only when the crew looks at them.
"""

import re
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

pytest.importorskip("ray")
from moe.cluster.crew import Crew
from moe.cluster.fleet import Bundles, Fleet, Host, HostEnded
from moe.cluster.ledger import Ledger
from moe.cluster.lines import Lifeline, Lines
from moe.cluster.messages import Beat, Dealt, Ended, HostInfo, Said, Serve, Where
from moe.cluster.policy import ClusterError, Refused, State
from moe.config import ClusterConfig, EngineConfig
from moe.engine.limits import Limits
from moe.engine.requests import Request
from moe.engine.stats import State as EngineState
from moe.params import SamplingParams
from tests.patience import PATIENCE_S

SHAPE = 2, 8
LOOK_S = 2.0  # that pass by the clock of the crew between two looks at its hosts
LIMITS = {"silence_s": 3.0, "room_s": 5.0, "load_s": 30.0, "stuck_s": 20.0, "answer_s": 1.0}


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    """As time passes only when it looks, it need not wait for the next look."""
    monkeypatch.setattr("moe.cluster.crew._LOOK_S", 0.01)


class Clock(Lines):
    """Lines whose time stands still until `pass_time`."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def pass_time(self, seconds: float, hosts: list[int]) -> None:
        """And until it has heard all of these hosts."""
        self.seconds += seconds
        deadline = time.monotonic() + PATIENCE_S
        while any((line := self.get(host)) is None or line.heard < self.seconds for host in hosts):
            assert time.monotonic() < deadline
            self.wait(0.002)


class Actor:
    """A host as a crew knows it: `actor.method.remote(…)` gives a reference. It says one token of each request."""

    def __init__(self, number: int, where: Where, loads: str) -> None:
        self.number, self.where, self.ready_now = number, where, Future[HostInfo]()
        self.runs, self.said = threading.Event(), list[Said]()  # runs: unless it is stopped
        self.order: tuple[Serve, Future[Ended]] | None = None
        self.line: Lifeline | None = None
        self.runs.set()
        if loads != "before it calls":
            self.line = Lifeline(where.address, where.line_port, where.word, number, self._hang_up)
            self.line.start(self._beat)
            threading.Thread(target=self._speak, args=(self.line,), daemon=True).start()
        if loads == "stopped":
            self.runs.clear()
        elif loads == "refused":
            self.ready_now.set_exception(HostEnded("other weights", Refused("other weights")))
        elif loads == "well":
            sizes = {"slots": 8, "experts": 16, "slot_bytes": 0, "dense_bytes": 0, "peak_rss_bytes": 0}
            state = EngineState(running=0, waiting=0, blocks=9, free_blocks=9, **sizes)
            limits = Limits(100, 64, 4, 9, frozenset())
            self.ready_now.set_result(HostInfo(1000 + number, "node", limits, SHAPE, state, ()))

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self, f"do_{name}"))})

    def _beat(self, said: Sequence[Said]) -> Beat:
        self.runs.wait(PATIENCE_S)
        return Beat(0, 9, 0, said)

    def _speak(self, line: Lifeline) -> None:
        while line._socket.fileno() >= 0:
            self.runs.wait(PATIENCE_S)
            said, self.said = self.said, []
            line.say(said)
            time.sleep(0.005)

    def _hang_up(self) -> None:
        assert self.line is not None
        self.line._socket.close()

    @property
    def beats(self) -> bool:
        return self.line is not None and self.runs.is_set() and self.line._socket.fileno() >= 0

    def do_serve(self, order: Serve) -> Future[Ended]:
        self.order = order, Future()
        return self.order[1]

    def do_leave(self, generation: int) -> None:
        if self.runs.is_set() and self.order is not None:
            order, ended = self.order
            self.order = None
            ended.set_result(Ended(order.generation, None, {}, self.line.num_said + len(self.said), order.plan, None))

    def do_interrupt(self, generation: int) -> None:
        return

    def do_submit(self, dealt: list[Dealt]) -> None:
        self.said += [Said(one.id, (self.number,), "length") for one in dealt]

    def ends(self) -> None:
        """As by SIGKILL."""
        assert self.line is not None
        self.runs.clear()  # it says nothing more
        self.line._socket.shutdown(socket.SHUT_RDWR)
        ended = HostEnded("its process has died")
        if self.order is not None:
            self.order[1].set_exception(ended)
            self.order = None
        elif not self.ready_now.done():
            self.ready_now.set_exception(ended)


class Hosts(Fleet):
    """room: for so many hosts; loads: how they load, by number, "well" if not told."""

    def __init__(self, config: EngineConfig, room: int, **loads: str) -> None:
        self.config, self.room, self.loads = config, room, {int(name[1:]): how for name, how in loads.items()}
        self.lines = self.clock = Clock("127.0.0.1", "word")
        self.where = Where("127.0.0.1", self.lines.port, "word", "job")
        self._bundle, self._labels = {"CPU": 1.0}, {}
        self.there: list[Host] = []  # all that have a place
        self.asked_for: list[Host] = []
        self.killed: list[int] = []
        self._next = 0
        self._asks = ThreadPoolExecutor(1)

    def start(self, count: int, num_ranks: int, *, is_growth: bool = False) -> list[Host]:
        hosts = []
        for _ in range(count):
            host = Host(self._next, Bundles(1), 0, is_growth=is_growth, asked=self.lines.now())
            host.ready = Place(host)
            self._next += 1
            hosts.append(host)
        self.asked_for += hosts
        self._place()
        return hosts

    def _place(self) -> None:
        for host in self.asked_for[: self.room - len(self.there)]:
            self.asked_for.remove(host)
            self.there.append(host)
            host.actor = Actor(host.number, self.where, self.loads.get(host.number, "well"))

    def check_room(self, hosts: Any) -> None:
        assert not self.asked_for

    def has_place(self, bundles: Bundles) -> bool:
        return any(host.bundles is bundles for host in self.there)

    def resources(self) -> tuple[dict[str, float], dict[str, float]]:
        return {"CPU": self.room}, {"CPU": self.room - len(self.there)}

    def done(self, references: Any, wait_s: float = 0.0) -> list[Any]:
        self._place()
        self.clock.pass_time(LOOK_S, [host.number for host in self.there if host.actor.beats])
        futures = {r.future if isinstance(r, Place) else r: r for r in references}
        there = [future for future in futures if future is not None]
        if not there:
            time.sleep(wait_s)
            return []
        return [futures[f] for f in wait(there, wait_s, FIRST_COMPLETED).done]

    def answer(self, reference: Any) -> Any:
        return (reference.future if isinstance(reference, Place) else reference).result(0)

    def kill(self, host: Host) -> None:
        self.killed.append(host.number)
        self.lines.hang_up(host.number)
        self._let_end(host)
        for known in (self.there, self.asked_for):
            if host in known:
                known.remove(host)

    def close(self, hosts: Any) -> None:
        self._asks.shutdown()
        for host in hosts:
            self._let_end(host)

    def _let_end(self, host: Host) -> None:
        if host.actor is not None:
            host.actor.runs.set()


class Place:
    """A reference to the `ready` of a host that may have no actor yet."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    def future(self) -> Future[HostInfo] | None:
        return None if self.host.actor is None else self.host.actor.ready_now


def crew_of(num_hosts: int, room: int, settings: dict[str, Any] | None = None, **loads: str) -> Crew:
    config = EngineConfig(cluster=ClusterConfig(**(LIMITS | (settings or {}))))
    return Crew(Hosts(config, room, **loads), config, num_hosts, Ledger())


def pump_until(crew: Crew, condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, crew.noted
        crew.deal()
        crew.pump(0.02)


def serves(crew: Crew) -> list[int]:
    """A request is answered; numbers of the hosts that serve."""
    request = Request(crew.generation, [1, 2], SamplingParams(max_tokens=1, seed=0), 2)
    crew.ledger.add(request)
    pump_until(crew, lambda: crew.ledger.has_news)
    (request,) = crew.ledger.hand_out()
    assert request.tokens[-1] in [host.number for host in crew.alive]
    return [host.number for host in crew.alive]


def notes(crew: Crew, word: str) -> list[str]:
    return [note.what for note in crew.noted if word in note.what]


@pytest.mark.parametrize(
    ("loads", "sentence"),
    [
        ("stopped", r"host 1 did not load: silent for \S+ s while it loads, more than 10 x cluster.silence_s \(30 s"),
        ("before it calls", r"host 1 did not load: no sign of life (16|17) s after it .* 10 x cluster.answer_s \(1\)"),
        ("for ever", r"host 1 did not load: not ready (36|37) s after .* raise cluster.load_s if loading takes"),
    ],
    ids=["loading", "starting", "never ready"],
)
def test_a_first_host_that_stops_while_it_loads_ends_the_start(loads, sentence):
    with pytest.raises(ClusterError, match=sentence):
        crew_of(2, 2, h1=loads)


@pytest.mark.parametrize("loads", ["stopped", "before it calls", "for ever"])
def test_growth_by_a_host_that_stops_while_it_loads_is_reached_by_another(loads):
    crew = crew_of(1, 3, h1=loads)
    crew.scale(2)
    pump_until(crew, lambda: len(crew.alive) == 2)
    assert serves(crew) == [0, 2]
    assert crew.fleet.killed == [1]
    assert len(notes(crew, "a host did not load: ")) == 1
    crew.close()


def test_no_more_hosts_than_a_layer_has_experts():
    crew = crew_of(1, 20)
    with pytest.raises(
        ValueError, match="9 hosts would share 8 experts of a layer, so that 1 had none; ask for at most 8"
    ):
        crew.scale(9)
    assert (crew.target, len(crew.loading)) == (1, 0)
    crew.close()


def test_growth_ends_where_no_other_host_may_be_started():
    crew = crew_of(1, 3, {"replaces": False}, h1="stopped")
    crew.scale(2)
    pump_until(crew, lambda: crew.target == 1)
    assert serves(crew) == [0]
    assert not crew.loading
    crew.close()


def test_a_replacement_waits_for_room_while_others_serve():
    crew = crew_of(2, 2)
    crew.fleet.room = 1
    crew.alive[0].actor.ends()
    pump_until(crew, lambda: len(notes(crew, "no room")) >= 2)  # told once in room_s, and it waits on
    why = r"Ray has no room for 1 bundles of {'CPU': 1.0}: after 5 s the cluster has {'CPU': 1}, of which {'CPU': 0}"
    assert re.match(why, notes(crew, "no room")[0])
    assert serves(crew) == [1]
    assert crew.target == 2
    crew.fleet.room = 2
    pump_until(crew, lambda: len(crew.alive) == 2)
    assert serves(crew) == [1, 2]
    assert crew.noted[-1].told() == f"generation {crew.generation}, hosts 1, 2: serves"
    assert next(note for note in crew.noted if note.what == "lost").told() == "generation 1, host 0: lost"
    crew.close()


def test_a_run_that_nobody_serves_for_want_of_room_ends():
    crew = crew_of(2, 2)
    crew.fleet.room = 0
    for host in crew.alive:
        host.actor.ends()
    with pytest.raises(ClusterError, match=r"no room for 2 bundles .*; no host is left that serves, and finished work"):
        pump_until(crew, lambda: False)
    assert crew.state is State.WAITING
    crew.close()


def test_hosts_that_stop_while_they_load_again_and_again_end_the_run():
    crew = crew_of(1, 2, {"max_losses": 1}, h1="stopped")
    crew.alive[0].actor.ends()
    with pytest.raises(ClusterError, match="2 hosts were lost, more than 1"):
        pump_until(crew, lambda: False)
    crew.close()


def test_a_replacement_that_is_refused_is_not_tried_again():
    crew = crew_of(2, 2, h2="refused", h3="refused")
    crew.alive[0].actor.ends()
    pump_until(crew, lambda: notes(crew, "a host did not load: other weights"))
    assert serves(crew) == [1]
    crew.scale(2)  # whoever mends the folder asks for it
    assert serves(crew) == [1]
    pump_until(crew, lambda: len(notes(crew, "a host did not load")) == 2)
    assert crew.target == 1  # growth is given up
    crew.alive[0].actor.ends()
    with pytest.raises(ClusterError, match=r"^other weights; too few hosts are left to serve, and finished"):
        pump_until(crew, lambda: False)
    assert len(notes(crew, "a host did not load")) == 2
    crew.close()


@pytest.mark.parametrize("loads", ["well", "refused"])
def test_hosts_that_wait_for_one_that_is_refused_end_at_once(loads):
    crew = crew_of(2, 2, {"least_in_memory": 1.0}, h2=loads)  # 8 slots each, of 16 experts
    crew.alive[0].actor.ends()
    if loads == "well":
        pump_until(crew, lambda: len(crew.alive) == 2)
        assert serves(crew) == [1, 2]
    else:
        with pytest.raises(ClusterError, match=r"^other weights; too few hosts"):
            pump_until(crew, lambda: False)
    crew.close()


def test_a_spare_that_waited_longer_than_a_step_may_take_is_not_stuck_when_it_begins():
    crew = crew_of(1, 2, {"spares": 1})
    pump_until(crew, lambda: crew.lines.now() > 30)
    crew.alive[0].actor.ends()
    pump_until(crew, lambda: [host.number for host in crew.alive] == [1])
    crew.alive[0].actor.do_submit = lambda dealt: None  # it takes a request, and is in its first step
    crew.ledger.add(Request(0, [1], SamplingParams(seed=0), 1))
    began = crew.lines.now()
    pump_until(crew, lambda: crew.lines.now() - began > 15)
    assert (crew.ledger.load(1), crew.fleet.killed) == (1, [0])
    pump_until(crew, lambda: notes(crew, "no step for"))
    crew.close()
