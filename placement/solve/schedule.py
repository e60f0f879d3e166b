"""How an annealer cools (pace.h): so many iterations, or as many as a deadline leaves time for."""

from typing import NamedTuple

from moe.placement.deadline import NEVER, Deadline, Pace

PIECES = 20  # of a search, between which penalties grow


class Schedule(NamedTuple):
    """temperatures: first and last, in rank visits; severity: of the penalties, first and last, in equal steps.

    Where time does not end it, the same iterations give the same search.
    """

    iterations: int
    temperatures: tuple[float, float] = (1.0, 1.0)
    severity: tuple[float, float] = (1.0, 1.0)
    deadline: Deadline = NEVER

    def packed(self, pace: Pace) -> tuple[float, ...]:
        """struct Schedule of pace.h; `pace` must live as long as it is used."""
        return (self.iterations, PIECES, *self.temperatures, *self.severity, pace.address)
