"""When a running job changes its plan, and by how much; plain data, which settings may load."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """When plans change and by how much.

    window: tokens whose routing decides, of which 0.875 (0.6 with copies) must be of one traffic. imbalance: busiest
    rank's load over the mean which starts a turn, where the newest 0.6 of a window (0.4) are of one traffic and it has
    been exceeded by half of them; calm: below it the next may start after a turn that moved nothing.
    most_moved: share of all copies that may move after a change of traffic, and after eight windows without one, in one
    turn or several. bytes_per_step: of experts that come, on all ranks together. payback: tokens within which a
    migration must pay for itself. share: of the CPU time of rank 0's steps, at most, in which it hears what was routed
    and looks at it. Raises ValueError for numbers that make no sense.
    """

    window: int = 896
    imbalance: float = 1.2
    calm: float = 1.12
    most_moved: float = 0.15
    bytes_per_step: int = 1 << 28
    payback: int = 1_000_000
    share: float = 0.005

    def __post_init__(self) -> None:
        if self.window < 8 or self.payback < 1 or self.bytes_per_step < 1:
            raise ValueError(
                f"window ({self.window}) must be >= 8, bytes_per_step ({self.bytes_per_step}) and payback "
                f"({self.payback}) >= 1"
            )
        if not 1.0 <= self.calm <= self.imbalance:
            raise ValueError(f"calm ({self.calm}) must lie between 1 and imbalance ({self.imbalance})")
        for name, value in (("most_moved", self.most_moved), ("share", self.share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} ({value}) must lie in (0, 1]")
