"""The loop of a running job: a window of routing, a trigger, a turn in the background, and what came of it.

    routing of each step ─▶ window ─▶ trigger ─▶ solver (another process) ─▶ Turn ─▶ migration, one state a step
                                                      measured over the next window ◀─┘ beside what was predicted

No torch and no ranks here: whoever runs steps feeds it and applies what it hands out (moe/engine/online.py, and
bench/bench_drift.py on recorded traces).
"""

import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe.placement.loop_options import LoopOptions
from moe.placement.migrate import Migration
from moe.placement.plan import Plan
from moe.placement.recent import Part, Recent, imbalance_of, imbalance_of_chance, in_time, newest_alike, since_change
from moe.placement.turn import Figures, Machine, Question, Turn, Verdict, Window, answer

log = logging.getLogger(__name__)

CHECKS = 16  # looks at the window per window of tokens, at most
PATIENCE = 0.6  # of a window: so many tokens of the same traffic say whether few moves help
ENOUGH = 0.875  # of a window: so many say which
WITH_COPIES = (0.4, 0.6)  # both, where experts have copies, whose search takes two to three times as long
# Windows after which a turn is tried again that moved nothing, though the load never was calm, and after which traffic
# that did not change may move experts anew.
RESTS = 8


class Solver(Protocol):
    """Takes turns while steps run; one at a time."""

    def ask(self, question: Question) -> None: ...
    def poll(self) -> Verdict | Turn | None:
        """The answer, once; None if it is not there yet. Raises RuntimeError if there will be none."""

    def close(self) -> None: ...


class SolverAtOnce:
    """The slow twin of `SolverProcess`: answers where it is asked."""

    def __init__(self) -> None:
        self._answer: Verdict | Turn | None = None

    def ask(self, question: Question) -> None:
        self._answer = answer(question)

    def poll(self) -> Verdict | Turn | None:
        found, self._answer = self._answer, None
        return found

    def close(self) -> None:
        """Holds nothing."""


class SolverProcess:
    """Another process of low priority and one thread, started with the first question; it ends with this one.

    cores: that it runs on; none = those of whoever asks.
    """

    def __init__(self, cores: Collection[int] = ()) -> None:
        self._cores = sorted(cores)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="placement")
        self._answer: Future[Verdict | Turn] | None = None

    def ask(self, question: Question) -> None:
        self._answer = self._thread.submit(self._exchange, question)

    def poll(self) -> Verdict | Turn | None:
        if self._answer is None or not self._answer.done():
            return None
        done, self._answer = self._answer, None
        try:
            return done.result(0)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"the process that solves placements has ended ({error!r})") from error

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()  # no limit: it was killed
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._process is not None and self._process.stdin and self._process.stdout:
            self._process.stdout.close()
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                return  # what it had not read yet is of no use

    def _exchange(self, question: Question) -> Verdict | Turn:
        if self._process is None:
            command = [sys.executable, "-m", "moe.placement.loop", *map(str, self._cores)]
            one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread}
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(question, self._process.stdin)
        self._process.stdin.flush()
        found: Verdict | Turn = pickle.load(self._process.stdout)
        return found


def answer_questions(cores: Collection[int]) -> None:
    """What the process of `SolverProcess` does, until its pipe is closed."""
    os.nice(10)
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            log.warning("placements are solved on the processor cores of rank 0, not on %s: %s", sorted(cores), error)
    while True:
        try:
            question: Question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(question), sys.stdout.buffer)
        sys.stdout.buffer.flush()


class Trigger:
    """Fires when the load of the traffic of late has been too uneven; after a turn in vain not before it was calm."""

    def __init__(self, options: LoopOptions, patience: float) -> None:
        """patience: tokens of one traffic that must be there; half as long they must have been uneven."""
        self.options, self.patience = options, patience
        self._uneven = 0  # tokens for which the load has been
        self._rests = 0  # tokens until it may fire without having been calm

    def fires(self, imbalance: float, alike: int, tokens: int, chance: float = 1.0) -> bool:
        """imbalance: of the newest `alike` tokens, which are of one traffic; tokens: since the last call; chance: as
        `imbalance_of_chance`, what chance alone may show is neither uneven nor not calm."""
        self._rests = 0 if imbalance < max(self.options.calm, chance) else max(0, self._rests - tokens)
        self._uneven = self._uneven + tokens if imbalance > max(self.options.imbalance, chance) else 0
        return alike >= self.patience and self._uneven >= self.patience / 2 and not self._rests

    def took(self, has_moved: bool) -> None:
        """A turn was taken."""
        self._uneven = 0
        self._rests = 0 if has_moved else RESTS * self.options.window


def _received(migration: Migration) -> list[int]:
    """Copies that come to a rank in each step."""
    plans = [migration.start, *migration.states()]
    return [int((new.hosted & ~old.hosted).sum()) for old, new in pairwise(plans)]


class Sums:
    """What was counted since a moment."""

    def __init__(self) -> None:
        self.tokens, self.bytes, self.began = 0, 0, time.perf_counter()

    def figures(self, imbalance: float, layers: int) -> Figures:
        tokens = max(1, self.tokens)
        return Figures(imbalance, self.bytes / tokens / layers, (time.perf_counter() - self.began) / tokens)


@dataclass(slots=True)
class PlacementStats:
    """What a loop has done (moe/metrics.py reads it). Loads are the busiest rank's over the mean."""

    placement_turns: int = field(default=0, metadata={"help": "Searches for a better placement of experts on ranks"})
    moved_experts: int = field(default=0, metadata={"help": "Copies of experts that were moved to another rank"})
    moved_bytes: int = field(default=0, metadata={"help": "Of the experts that were moved", "unit": "bytes"})
    placement_load: float = field(
        default=0.0, metadata={"help": "Busiest rank's load over the mean in the latest window", "kind": "gauge"}
    )
    predicted_load: float = field(
        default=0.0, metadata={"help": "The load that was predicted for the last moves", "kind": "gauge"}
    )
    measured_load: float = field(
        default=0.0, metadata={"help": "The load in the window after the last moves", "kind": "gauge"}
    )

    def after(self, before: "PlacementStats") -> "PlacementStats":
        """With the counts of an earlier loop of the same run; gauges are this one's."""
        counts = ("placement_turns", "moved_experts", "moved_bytes")
        return replace(self, **{name: getattr(before, name) + getattr(self, name) for name in counts})


class OnlineLoop:
    """What decides, for all ranks. plan: where the run starts. Memory: `options.window` tokens of routing.

    `observe` takes what was routed, `step` is called once between two steps and never waits. history: every turn, and
    what was measured over a window before and one after it, None until then; notes: the same in words; is_over: nothing
    more will come, as its solver has ended.
    """

    def __init__(self, plan: Plan, machine: Machine, options: LoopOptions, solver: Solver) -> None:
        self.plan, self.machine, self.options, self.solver = plan, machine, options, solver
        self.history: list[tuple[Turn, Figures, Figures | None]] = []
        self.notes: list[str] = []
        self.stats = PlacementStats()
        self._recent = Recent(options.window, plan, is_exact=machine.wire.is_exact)
        patience, enough = WITH_COPIES if (plan.replicas > 1).any() else (PATIENCE, ENOUGH)
        self._trigger, self._enough = Trigger(options, patience * options.window), int(enough * options.window)
        self._verdict: Verdict | None = None  # of the traffic since `_changed_at`, which few moves help
        self._told: list[Window] = []  # since the latest step
        self._sums, self._unseen = Sums(), 0
        self._heard = self._asked_at = self._changed_at = 0  # tokens, in all, at the latest question and change
        self._moved = 0  # copies that came, since traffic changed
        self._is_asked = self.is_over = False
        self._measuring: int | None = None  # place in the history of the turn that moved last
        self._moving = 0  # steps until the last state of a migration

    def observe(self, ids: NDArray[np.int16], home: int, tokens: int, num_bytes: int) -> None:
        """ids: [T, L, K], of some of the `tokens` that rank `home` computed; num_bytes: that it sent for them."""
        if len(ids):
            self._told.append(Window(ids, np.full(len(ids), home, np.int64)))
        self._heard += len(ids)
        self._sums.tokens += tokens
        self._sums.bytes += num_bytes
        self._unseen += tokens

    @property
    def wanted(self) -> int:
        """Tokens to hear until there is something to look at."""
        seldom = -(-self.options.window // CHECKS)
        if self._verdict is None:
            return seldom
        missing = self._enough - (self._heard - self._changed_at)
        return max(1, missing) if missing < 2 * seldom else seldom

    @property
    def is_waiting(self) -> bool:
        """Only for tokens, to move experts by: these are worth their time."""
        return self._verdict is not None

    def step(self) -> Migration | None:
        """A migration that all ranks begin now, one of its states a step; mostly None."""
        if self._told:
            self._recent.add(in_time(self._told))
            self._told.clear()
        if self._moving:
            self._moving -= 1
            if not self._moving:
                self._sums = Sums()
            return None
        if self.is_over:
            return None
        if self._is_asked:
            return self._answered()
        if self._recent.num_tokens < self._trigger.patience or self._unseen < self.wanted:
            return None
        parts = self._recent.parts()
        num_layers, top_k = parts[0].window.ids.shape[1:]
        if self._measuring is not None and self._sums.tokens >= self.options.window:
            self._measured(self._measuring, imbalance_of(parts), num_layers)
        changed_at, alike = self._changed_at, self._alike(parts)
        num_alike = sum(len(part.window.ids) for part in alike)
        imbalance = self.stats.placement_load = imbalance_of(alike)
        chance = imbalance_of_chance(num_alike * top_k, self.plan.num_ranks)
        fires = self._trigger.fires(imbalance, num_alike, self._unseen, chance)
        self._unseen = 0
        if imbalance <= max(self.options.imbalance, chance) or self._changed_at != changed_at:
            self._verdict = None
        has_changed = len(alike) < len(parts) and self._heard - num_alike >= self._asked_at
        if has_changed or self._heard - self._asked_at >= RESTS * self.options.window:
            self._moved = 0
        copies = int(self.plan.hosted.sum())
        left = int(self.options.most_moved * copies) - self._moved
        if left > 0 and (fires if self._verdict is None else self._heard - self._changed_at >= self._enough):
            self._before = self._sums.figures(imbalance, num_layers)
            options, window = replace(self.options, most_moved=left / copies), since_change(parts, len(alike))
            self.solver.ask(Question(self.plan, window, self.machine, options, self._verdict))
            self._is_asked, self._asked_at, self._changed_at = True, self._heard, self._heard - len(window.ids)
        return None

    def close(self) -> None:
        self.solver.close()

    def _alike(self, parts: list[Part]) -> list[Part]:
        """The newest parts, of one traffic. A change that was found is remembered, and where it was found to be: what
        little is left of the traffic before it would not show it any more."""
        ends = self._heard - self._recent.num_tokens + np.cumsum([len(part.window.ids) for part in parts])
        first = len(parts) - newest_alike(np.stack([part.counts for part in parts]), self._recent.num_tokens)
        if first and not ends[first - 1] - len(parts[first - 1].window.ids) <= self._changed_at <= ends[first]:
            self._changed_at = int(ends[first - 1])
        begins = np.append(ends[0] - len(parts[0].window.ids), ends[:-1])
        return [part for part, begin in zip(parts, begins, strict=True) if begin >= self._changed_at] or parts[-1:]

    def _answered(self) -> Migration | None:
        try:
            turn = self.solver.poll()
        except RuntimeError as error:  # a run goes on without: its answers do not depend on it
            self._note(f"placement.online is off from here on, the present plan stays: {error}")
            self.is_over = True
            return None
        if turn is None:
            return None
        self._is_asked, self._verdict = False, None
        if isinstance(turn, Verdict):
            if not turn.reason:
                self._verdict = turn
                return None
            turn = Turn(None, *turn)
        self._unseen = 0
        self._trigger.took(turn.migration is not None)
        self.history.append((turn, self._before, None))
        self.stats.placement_turns += 1
        migration = turn.migration
        if migration is None:
            self._note(f"load {self._before.imbalance:.3f}, the plan stays: {turn.reason}")
            return None
        received = _received(migration)
        most = max(received) * self.machine.sizes.expert_bytes
        assert most <= self.options.bytes_per_step, (most, self.options.bytes_per_step)
        self.plan, self._moving = migration.target, len(migration.steps) + 1
        self._recent.use(self.plan)
        self._measuring = len(self.history) - 1
        self._moved += sum(received)
        self.stats.moved_experts += sum(received)
        self.stats.moved_bytes += migration.num_bytes
        self.stats.predicted_load = turn.after.imbalance
        self._note(
            f"moves {turn.num_moved} of {self.plan.hosted.sum()} experts, {migration.num_bytes} bytes in "
            f"{len(migration.steps)} steps; predicted {turn.before} -> {turn.after} (solved in {turn.seconds:.2f} s)"
        )
        return migration

    def _measured(self, place: int, imbalance: float, layers: int) -> None:
        self._measuring = None
        after = self._sums.figures(imbalance, layers)
        turn, before, _ = self.history[place]
        self.history[place] = turn, before, after
        self.stats.measured_load = after.imbalance
        self._note(f"predicted {turn.before} -> {turn.after}, measured {before} -> {after}")
        self._sums = Sums()

    def _note(self, words: str) -> None:
        self.notes.append(words)
        log.warning("placement: %s", words)


if __name__ == "__main__":
    answer_questions([int(core) for core in sys.argv[1:]])
