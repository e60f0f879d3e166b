"""Counts by size: what is kept of durations in a run without an end."""

import bisect
from dataclasses import dataclass, field

_SECONDS = tuple(base * 10.0**power for power in range(-4, 3) for base in (1, 1.8, 3.2, 5.6))


@dataclass(slots=True)
class Histogram:
    """counts[i]: values up to bounds[i]; the last counts what is larger. Bounds are a quarter of a decade apart."""

    bounds: tuple[float, ...] = _SECONDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def number(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The bound that at least `share` of the values do not exceed; 0 if there are none."""
        wanted, seen = share * self.number, 0
        for count, bound in zip(self.counts, (*self.bounds, self.bounds[-1])):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0
