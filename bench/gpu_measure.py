"""How the GPU session keeps and takes its measurements: rows on disk at once, and times that are the kernels' own.

A row is one JSON line, flushed as it comes: whatever ends the session, what was measured is there. A failure is a row.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SLEEP_CYCLES = 2_000_000  # about a millisecond: Python queues its launches meanwhile
FLUSHED_BYTES = 256 << 20  # more than any L2

Run = Callable[..., Tensor]


class Rows:
    """Appends to one file; several processes may, a line each."""

    def __init__(self, path: Path | None, phase: str) -> None:
        self.path, self.phase, self.num_failed = path, phase, 0

    def add(self, **values: Any) -> None:
        line = json.dumps({"phase": self.phase, **values}, default=str)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """What fails inside becomes a row, and the phase goes on."""
        try:
            yield
        except Exception as error:  # of any kind: the next measurement must not be lost with this one
            self.num_failed += 1
            first = (str(error).strip() or "no message").splitlines()[0]
            self.add(**what, failed=f"{type(error).__name__}: {first}"[:300])


class Rotation:
    """A candidate that computes several inputs in a row, each once, beginning with number `first`.

    On a GPU as one graph: the latency of a launch is paid once for all of them, and no call finds in L2 what it reads,
    if the inputs together are larger and its neighbours begin with others.
    """

    def __init__(self, run: Run, sets: Sequence[tuple[Tensor, ...]], first: int, *, graph: bool) -> None:
        first %= len(sets)
        self.sets = [tuple(t.clone() for t in one) for one in (*sets[first:], *sets[:first])]
        self.run = run
        self.outs = [run(*one) for one in self.sets]  # compiles too
        self.graph: Any = None
        if graph:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outs = [run(*one) for one in self.sets]

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for one in self.sets:
                self.run(*one)

    def __len__(self) -> int:
        return len(self.sets)


class Clock:
    """Times on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self._flush = torch.empty(FLUSHED_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def once_us(self, call: Callable[[], object], *, hide_launches: bool = True) -> float:
        """Microseconds of one call, L2 cold. hide_launches: the GPU begins when Python has queued everything."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        if hide_launches:
            torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def median_us(self, call: Callable[[], object], repeats: int) -> float:
        call()
        return statistics.median(self.once_us(call) for _ in range(repeats))

    def turns(self, candidates: Mapping[str, Rotation], repeats: int) -> dict[str, dict[str, float]]:
        """Median, least and most microseconds of one call of each; candidates take turns."""
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for round_ in range(repeats + 1):
            for name, one in candidates.items():
                us = self.once_us(one) / len(one)
                if round_:
                    times[name].append(us)
        return {n: {"us": statistics.median(t), "low": min(t), "high": max(t)} for n, t in times.items()}
