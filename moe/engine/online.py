"""The loop of a running job, over its ranks: each tells what it routed, rank 0 decides, all move in the same step.

    rank r: routing of its forwards ─▶ line "routing" ─▶ all ranks' agreement on a step ─▶ rank 0: placement/loop.py
    rank 0: migration ─▶ line "writes" ─▶ all ranks, in the same step ─▶ `ExpertParallel.migrate`, one state a step

Lines go with the agreement that opens every step, a small round more in the steps that have any. Which experts a token
gets does not depend on where they are, so that nothing of the answers changes.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.comm.control import Control
from moe.layer.parallel import ExpertParallel
from moe.layer.routing import RoutedLayer, RoutingSeam, StepContext, WholeForwards
from moe.placement.loop import CHECKS, OnlineLoop, PlacementStats, Recent, SolverProcess
from moe.placement.loop_options import LoopOptions
from moe.placement.migrate import Write, states_of
from moe.placement.turn import Machine, Window


class OnlinePlacement:
    """One rank's side; owns its place among the observers of routing, and on rank 0 the process that solves.

    stats: of all ranks, on rank 0; elsewhere nothing is counted.
    Two host syncs a layer on an accelerator (`WholeForwards`).
    """

    def __init__(
        self, control: Control, parallel: ExpertParallel, routing: RoutingSeam, machine: Machine, options: LoopOptions
    ) -> None:
        self.control, self.parallel, self.routing = control, parallel, routing
        self.window = options.window
        self.loop: OnlineLoop | None = None
        if control.groups.rank == 0:
            self.loop = OnlineLoop(parallel.plan, machine, options, SolverProcess())
        self.stats = PlacementStats() if self.loop is None else self.loop.stats
        self.forwards = WholeForwards(parallel.plan.num_layers, self._routed)
        routing.observers.append(self.forwards)
        self._begin()

    def step(self) -> None:
        """Between the agreement on a step and the step; all ranks call it."""
        for rank, lines in enumerate(self.control.heard()):
            for line in lines:
                self._hear(rank, json.loads(line))
        if self._tokens * self.control.groups.world_size * CHECKS >= self.window:
            self.control.tell(self._told())
        migration = None if self.loop is None else self.loop.step()
        if migration is not None:
            self.control.tell(json.dumps({"writes": migration.steps}).encode() + b"\n")

    def close(self) -> None:
        """No effect the second time."""
        if self.forwards in self.routing.observers:
            self.routing.observers.remove(self.forwards)
            if self.loop is not None:
                self.loop.close()

    def _begin(self) -> None:
        self._kept, self._tokens, self._sent = Recent(self.window), 0, self._sent_so_far()

    def _sent_so_far(self) -> int:
        return sum(self.parallel.dispatcher.traffic.bytes_to)

    def _routed(self, step: StepContext, layers: Sequence[RoutedLayer]) -> None:
        if step.num_tokens:
            ids = np.stack([layer.topk_ids for layer in layers], axis=1)
            self._kept.add(Window(ids, np.zeros(len(ids), np.int64)))
            self._tokens += len(ids)

    def _told(self) -> bytes:
        ids = self._kept.window().ids
        message = {
            "tokens": self._tokens,
            "bytes": self._sent_so_far() - self._sent,
            "shape": ids.shape,
            "routing": base64.b64encode(np.ascontiguousarray(ids, "<i2").tobytes()).decode(),
        }
        self._begin()
        return json.dumps(message).encode() + b"\n"

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if "writes" in message:
            steps = [[Write(*write) for write in step] for step in message["writes"]]
            self.parallel.migrate(states_of(self.parallel.plan, steps))
        elif self.loop is not None:
            ids = np.frombuffer(base64.b64decode(message["routing"]), "<i2").reshape(message["shape"])
            self.loop.observe(ids.astype(np.int16), rank, message["tokens"], message["bytes"])
