"""The loop of a running job, over its ranks: each tells what it routed, rank 0 decides, all move in the same step.

    rank 0: asks, with the agreement that opens a step
    rank r: routing of its forwards ─▶ line "routing" ─▶ all ranks' agreement on a step ─▶ rank 0: placement/loop.py
    rank 0: migration ─▶ line "writes" ─▶ all ranks, in the same step ─▶ `ExpertParallel.migrate`, one state a step

In a step nothing is computed but a list of the ids that the router made anyway; they are put together where rank 0
asks, and it asks as seldom as keeps that, and a look at it, to a share of its CPU time. Lines go with the agreement, a
small round more in the steps that have any. Which experts a token gets does not depend on where they are, so that
nothing of the answers changes.
"""

import base64
import json
import time
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.comm.control import Control
from moe.comm.cores import beside
from moe.layer.parallel import ExpertParallel
from moe.layer.routing import Routing, RoutingSeam, StepContext
from moe.placement.loop import OnlineLoop, PlacementStats, SolverProcess
from moe.placement.loop_options import LoopOptions
from moe.placement.migrate import Write, states_of
from moe.placement.turn import Machine


class LatestIds:
    """An observer that keeps the ids of whole forwards, so many tokens of them; an interrupted one's, never.

    Nothing is copied, and nothing waits for the device, before `take`.
    """

    def __init__(self, num_layers: int, size: int) -> None:
        self.num_layers, self.size = num_layers, size
        self.num_tokens = self.num_seen = 0
        self._layers: list[Tensor] = []
        self._forwards: deque[list[Tensor]] = deque()

    def begin(self, step: StepContext) -> None:
        self._layers = []

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        self._layers.append(routing.topk_ids)
        if len(self._layers) == self.num_layers:
            self._keep(self._layers)
            self._layers = []

    def take(self, most: int) -> NDArray[np.int16]:
        """The newest tokens since the last call, at most so many: [T, L, K], oldest first. One host sync."""
        forwards = list(self._forwards)
        self._forwards.clear()
        self.num_tokens = self.num_seen = 0
        if not forwards or not most:
            return np.empty((0, self.num_layers, 0), np.int16)
        by_layer = torch.cat([forward[layer] for layer in range(self.num_layers) for forward in forwards])
        ids = by_layer.to(torch.int16).numpy(force=True).reshape(self.num_layers, -1, by_layer.shape[1])
        return np.ascontiguousarray(ids[:, -most:].swapaxes(0, 1))

    def _keep(self, layers: list[Tensor]) -> None:
        rows = len(layers[0])
        if not rows:
            return
        assert all(len(ids) == rows for ids in layers), [len(ids) for ids in layers]
        self._forwards.append(layers)
        self.num_tokens += rows
        self.num_seen += rows
        while self.num_tokens - len(self._forwards[0][0]) >= self.size:
            self.num_tokens -= len(self._forwards.popleft()[0])


class OnlinePlacement:
    """One rank's side; owns its place among the observers of routing, and on rank 0 the process that solves.

    stats: of all ranks, on rank 0; elsewhere nothing is counted.
    """

    def __init__(
        self, control: Control, parallel: ExpertParallel, routing: RoutingSeam, machine: Machine, options: LoopOptions
    ) -> None:
        self.control, self.parallel, self.routing = control, parallel, routing
        self.window, self.share = options.window, options.share
        self.loop: OnlineLoop | None = None
        if control.groups.rank == 0:
            solver = SolverProcess(beside(control.groups.cores, torch.get_num_threads()))
            self.loop = OnlineLoop(parallel.plan, machine, options, solver)
        self.stats = PlacementStats() if self.loop is None else self.loop.stats
        self.latest = LatestIds(parallel.plan.num_layers, options.window)
        routing.observers.append(self.latest)
        self._sent, self._own, self._all = self._sent_so_far(), 0, 0  # tokens since rank 0 asked
        self._owed, self._last = 0.0, time.thread_time()  # CPU time of this thread

    def step(self) -> None:
        """Between the agreement on a step and the step; all ranks call it."""
        began, agreement = time.thread_time(), self.control.agreement
        bought = self.share * max(0.0, began - self._last)  # another thread's clock may stand earlier
        self._owed, self._last = max(0.0, self._owed - bought), began
        is_asked, has_heard = agreement.is_asked, self.control.has_heard
        writes = self._heard() if has_heard else []
        migration = None if self.loop is None else self.loop.step()
        if migration is not None:
            self.control.tell(json.dumps({"writes": migration.steps}).encode() + b"\n")
        if is_asked and self._all:
            self.control.tell(self._told())
        if is_asked or has_heard:
            self._owed += time.thread_time() - began
        if writes:
            self.parallel.migrate(states_of(self.parallel.plan, writes))
        tokens = agreement.tokens
        self._all += sum(tokens)
        self._own += tokens[self.control.groups.rank]
        if self.loop is None or self.loop.is_over or (self._owed and not self.loop.is_waiting):
            return
        if self._all >= self.loop.wanted:
            self.control.ask()

    def close(self) -> None:
        """No effect the second time."""
        if self.latest in self.routing.observers:
            self.routing.observers.remove(self.latest)
            if self.loop is not None:
                self.loop.close()

    def _sent_so_far(self) -> int:
        return sum(self.parallel.dispatcher.traffic.bytes_to)

    def _told(self) -> bytes:
        sent, tokens = self._sent_so_far(), self.latest.num_seen
        ids = self.latest.take(-(-self.window * self._own // self._all))  # all ranks' together fill the window
        message = {
            "tokens": tokens,
            "bytes": sent - self._sent,
            "shape": ids.shape,
            "routing": base64.b64encode(np.ascontiguousarray(ids, "<i2").tobytes()).decode(),
        }
        self._sent, self._own, self._all = sent, 0, 0
        return json.dumps(message).encode() + b"\n"

    def _heard(self) -> list[list[Write]]:
        """Hands to the loop what ranks have routed; returns the steps of a migration, if one begins."""
        writes: list[list[Write]] = []
        for rank, lines in enumerate(self.control.heard()):
            for message in map(json.loads, lines):
                if "writes" in message:
                    writes = [[Write(*write) for write in step] for step in message["writes"]]
                elif self.loop is not None:
                    ids = np.frombuffer(base64.b64decode(message["routing"]), "<i2").reshape(message["shape"])
                    self.loop.observe(ids.astype(np.int16), rank, message["tokens"], message["bytes"])
        return writes
