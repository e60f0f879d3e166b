"""How a step runs: alone, in lock step with other ranks, or with tokens that stay where their experts are.

The engine steps the same way in every mode; what differs is behind `StepMode`. A mode belongs to one generation of
ranks and is thrown away with it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe.comm.control import Control
from moe.comm.wire import Traffic
from moe.engine.coherent import CoherentRunner
from moe.engine.mirror import RequestMirror
from moe.engine.one_memory import Split
from moe.engine.online import OnlinePlacement
from moe.engine.requests import Chunk, Request
from moe.engine.runner import Runner
from moe.engine.sampling import Choice, choose
from moe.engine.scheduler import Scheduler
from moe.engine.upgrades import Upgrades
from moe.layer.experts import SlotExperts
from moe.layer.parallel import ExpertParallel
from moe.outputs import FinishReason


class StepMode(Protocol):
    """A step is `plan`, `forward`, `choose`; between steps requests come and go. With ranks all are collectives."""

    scheduler: Scheduler

    @property
    def control(self) -> Control | None:
        """Of the ranks; None if alone."""

    def start(self) -> None:
        """Begins a run of steps after which `has_work` is false."""

    @property
    def has_work(self) -> bool:
        """Whether this rank, or any, has something to compute or to hand over."""

    @property
    def traffic(self) -> list[Traffic]:
        """What this rank has sent, by part of the engine."""

    def plan(self) -> list[Chunk]:
        """What the next step computes here."""

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits on the model's device, as `choose` takes them."""

    def choose(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Choice]:
        """The next token of every chunk that samples."""

    def add(self, request: Request) -> None: ...
    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request from outside of a step."""

    def ended(self, request: Request) -> None:
        """A request ended in the step, on all ranks that know it."""

    def open_requests(self) -> list[Request]:
        """Those of this rank that are not finished, oldest first."""

    def close(self) -> None:
        """Leaves the ranks. No effect the second time."""


class Alone:
    """One process. split: moved between two steps; upgrades: given between two."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, split: Split | None = None, upgrades: Upgrades | None = None
    ) -> None:
        self.scheduler, self.runner, self.split, self.upgrades = scheduler, runner, split, upgrades
        if upgrades is not None:
            upgrades.use_ranks(None)

    @property
    def control(self) -> Control | None:
        return None

    def start(self) -> None:
        """Nothing is agreed."""

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def traffic(self) -> list[Traffic]:
        return []

    def plan(self) -> list[Chunk]:
        if self.upgrades is not None:
            self.upgrades.step()
        return self._chunks()

    def _chunks(self) -> list[Chunk]:
        if self.split is not None:
            self.split.step()
        return self.scheduler.schedule()

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """[chunks, V]."""
        return self.runner.forward(chunks) if chunks else torch.empty(0)

    def choose(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Choice]:
        rows = [row for row, chunk in enumerate(chunks) if chunk.samples]
        if not rows:
            return []
        if len(rows) < len(chunks):
            logits = logits.index_select(0, torch.tensor(rows).to(logits.device, non_blocking=True))
        return choose(logits, [(chunks[row].request.sampler, chunks[row].request.tokens) for row in rows])

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)

    def ended(self, request: Request) -> None:
        """Nobody else knows it."""

    def open_requests(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def close(self) -> None:
        """Holds nothing."""


class Ranks(Alone):
    """Each rank has requests of its own; a rank with fewer forwards joins those of the others with T = 0.

    shapes: (rows per token, K of a row) by layer, as `SlotExperts.join` takes them. online: what changes the plan while
    it runs; split: as of `Alone`, each rank's own; upgrades: the same on all ranks.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        control: Control,
        parallel: ExpertParallel,
        experts: SlotExperts,
        shapes: Sequence[tuple[int, int]],
        hidden_size: int,
        dtype: torch.dtype,
        online: OnlinePlacement | None = None,
        split: Split | None = None,
        upgrades: Upgrades | None = None,
    ) -> None:
        super().__init__(scheduler, runner, split, upgrades)
        if upgrades is not None:
            upgrades.use_ranks(control)
        self.online = online
        self._control, self.parallel, self.experts = control, parallel, experts
        self._joined_with = hidden_size, dtype, list(shapes)

    @property
    def control(self) -> Control:
        return self._control

    def start(self) -> None:
        self._agree(1, 0)

    @property
    def has_work(self) -> bool:
        return not self.control.agreement.is_over

    @property
    def traffic(self) -> list[Traffic]:
        ahead = self.experts.lookahead
        return [self.parallel.dispatcher.traffic, *(ahead.traffic if ahead is not None else ())]

    def plan(self) -> list[Chunk]:
        chunks = self._chunks()
        self._agree(self.runner.num_forwards(chunks), sum(c.end - c.start for c in chunks))
        return chunks

    def close(self) -> None:
        if self.online is not None:
            self.online.close()

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        logits = super().forward(chunks)
        for _ in range(self.control.agreement.most_forwards - self.runner.num_forwards(chunks)):
            self.experts.join(*self._joined_with)
        return logits

    def _agree(self, forwards: int, tokens: int) -> None:
        agreement = self.control.agree(forwards, tokens)
        if self.upgrades is not None:
            self.upgrades.step()
        if self.online is not None:
            self.online.step()
        if self.parallel.begin_step(agreement.tokens if agreement.most_forwards <= 1 else None):
            self.experts.fetch_share()


class Coherent:
    """All ranks have all requests and plan the same steps (moe/engine/coherent.py)."""

    def __init__(self, scheduler: Scheduler, runner: CoherentRunner, control: Control, mirror: RequestMirror) -> None:
        self.scheduler, self.runner, self.control, self.mirror = scheduler, runner, control, mirror

    def start(self) -> None:
        self._agree(1)

    @property
    def has_work(self) -> bool:
        return not self.control.agreement.is_over

    @property
    def traffic(self) -> list[Traffic]:
        return [self.runner.parallel.dispatcher.traffic, *self.runner.traffic]

    def plan(self) -> list[Chunk]:
        self._agree(int(self.scheduler.has_work or self.control.has_heard))
        self.mirror.hear(self.scheduler)
        return self.scheduler.schedule()

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """[chunks that sample and ended on this rank, V]."""
        return self.runner.forward(chunks) if chunks else torch.empty(0)

    def choose(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Choice]:
        return self.runner.choose(chunks, logits) if chunks else []

    def add(self, request: Request) -> None:
        self.mirror.add(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        self.mirror.finish(request, reason)  # by all ranks, before the next step

    def ended(self, request: Request) -> None:
        self.mirror.forget(request)

    def open_requests(self) -> list[Request]:
        return self.mirror.own()

    def close(self) -> None:
        """Holds nothing."""

    def _agree(self, forwards: int) -> None:
        self.control.agree(forwards, 0)
        self.runner.parallel.begin_step(None)
