"""When a running job changes its plan, and by how much; plain data, which settings may load."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """When plans change and by how much.

    window: tokens whose routing decides. imbalance: busiest rank's load over the mean which starts a turn once it has
    been exceeded by half a window of tokens of one traffic; calm: below it the next may start after a turn that moved
    nothing.
    most_moved: share of all copies that a turn may move. bytes_per_step: of experts that come, on all ranks together.
    payback: tokens within which a migration must pay for itself. Raises ValueError for numbers that make no sense.
    """

    window: int = 896
    imbalance: float = 1.2
    calm: float = 1.12
    most_moved: float = 0.15
    bytes_per_step: int = 1 << 28
    payback: int = 1_000_000

    def __post_init__(self) -> None:
        if self.window < 8 or self.payback < 1 or self.bytes_per_step < 1:
            raise ValueError(
                f"window ({self.window}) must be >= 8, bytes_per_step ({self.bytes_per_step}) and payback "
                f"({self.payback}) >= 1"
            )
        if not 1.0 <= self.calm <= self.imbalance:
            raise ValueError(f"calm ({self.calm}) must lie between 1 and imbalance ({self.imbalance})")
        if not 0 < self.most_moved <= 1:
            raise ValueError(f"most_moved ({self.most_moved}) must lie in (0, 1]")
