"""Where the single launch stops winning on this machine: measured, stored, never assumed.

One table per machine (device, torch, triton). Between ranks the choice must be one: all measure together, rank 0's
table counts for everybody, and `tokens` is the largest of the ranks, which the scheduler knows.
"""

# mypy: allow-untyped-calls

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import triton

Choice = Literal["single", "grouped"]
SLEEP_CYCLES = 2_000_000  # about a millisecond
TOKENS = (1, 4, 16, 64, 128, 256, 1024, 4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKey:
    """What the crossover depends on beside the number of tokens."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    world_size: int
    dtype: str
    stored: str = ""  # `ExpertWeights.stored`


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Median microseconds of both paths for a layer and a number of tokens."""

    layer: LayerKey
    tokens: int
    single_us: float
    grouped_us: float


def machine_name(device: torch.device) -> str:
    """What a measurement is valid for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"interpreter on {device.type}"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


class CrossoverTable:
    """The measurements of one machine, in a JSON file that holds any number of machines."""

    def __init__(self, path: Path, machine: str) -> None:
        self.path, self.machine = path, machine
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.rows = [Measured(layer=LayerKey(**row.pop("layer")), **row) for row in stored.get(machine, [])]
        self._choices: dict[LayerKey, list[tuple[int, Choice]]] = {}

    def is_measured(self, layer: LayerKey) -> bool:
        return any(row.layer == layer for row in self.rows)

    def choose(self, layer: LayerKey, tokens: int) -> Choice:
        """The faster path at the least measured number of tokens that is not below `tokens`.

        Beyond the largest measured number the grouped path: no heap was made for more. `ValueError` if not measured.
        """
        points = self._choices.get(layer) or self._sorted(layer)  # asked in every layer of every step
        if not points:
            raise ValueError(
                f"no crossover measured for {layer} on {self.machine}; call measure() once on this machine"
            )
        return next((choice for measured, choice in points if measured >= tokens), "grouped")

    def _sorted(self, layer: LayerKey) -> list[tuple[int, Choice]]:
        found = sorted((row for row in self.rows if row.layer == layer), key=lambda row: row.tokens)
        points: list[tuple[int, Choice]] = [
            (row.tokens, "single" if row.single_us < row.grouped_us else "grouped") for row in found
        ]
        self._choices[layer] = points
        return points

    def measure(
        self,
        layer: LayerKey,
        single: Callable[[int], object],
        grouped: Callable[[int], object],
        device: torch.device,
        *,
        tokens: Sequence[int] = TOKENS,
        repeats: int = 20,
    ) -> None:
        """Time `single(T)` and `grouped(T)`, taking turns, for each T, and store the medians."""
        rows = []
        for count in tokens:
            single_us, grouped_us = medians_us([partial(single, count), partial(grouped, count)], device, repeats)
            rows.append(Measured(layer=layer, tokens=count, single_us=single_us, grouped_us=grouped_us))
        self.replace(layer, rows)

    def replace(self, layer: LayerKey, rows: Sequence[Measured]) -> None:
        """Store `rows` as all that is known of `layer`."""
        self.rows = [row for row in self.rows if row.layer != layer] + list(rows)
        self._choices.pop(layer, None)
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        stored[self.machine] = [asdict(row) for row in self.rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".new")
        written.write_text(json.dumps(stored, indent=1))
        written.replace(self.path)  # another process never reads half a table


def medians_us(candidates: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Median microseconds of each candidate, one call each in turn, after one warm-up round."""
    times: list[list[float]] = [[] for _ in candidates]
    for candidate in candidates:
        candidate()
    for _ in range(repeats):
        for candidate, found in zip(candidates, times, strict=True):
            found.append(_once_us(candidate, device))
    return [statistics.median(found) for found in times]


def _once_us(candidate: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        candidate()
        return (time.perf_counter() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SLEEP_CYCLES)  # the GPU starts after Python has queued everything: kernels are timed, not Python
    begin.record()
    candidate()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3
