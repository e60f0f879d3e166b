"""What a controller does about hosts that are lost, silent or too few: the rules, apart from what carries them out."""

import enum
from dataclasses import dataclass
from statistics import median

from moe.comm.errors import CommError


class State(enum.Enum):
    """Of a cluster. The arrows: STARTING → SERVING → SETTLING → SERVING …; any → CLOSED."""

    STARTING = "hosts load the model"
    SERVING = "a generation of hosts steps"
    SETTLING = "the generation ends: hosts leave it, or are given up"
    WAITING = "no host is left; replacements load"
    CLOSED = "no more requests are served"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailurePolicy:
    """Limits in seconds.

    silence_s: without a sign of life from a host whose line is open, until it is killed; never under
    `silence_steps` median steps. stuck_s: with signs of life, but without a finished step while it has requests.
    leave_s: for hosts to leave a generation by themselves before they are freed, and again before they are killed.
    replaces: start another host for each that is lost. spares: hosts kept loaded beside those that serve.
    max_losses: hosts that may be lost in one run; then it ends, with all that was finished.
    """

    silence_s: float = 3.0
    silence_steps: int = 10
    stuck_s: float = 300.0
    leave_s: float = 1.0
    replaces: bool = True
    spares: int = 0
    max_losses: int = 100

    def __post_init__(self) -> None:
        for name in ("silence_s", "stuck_s", "leave_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if self.spares < 0 or self.max_losses < 0:
            raise ValueError(f"spares ({self.spares}) and max_losses ({self.max_losses}) must be >= 0")

    def silence_limit(self, step_seconds: list[float]) -> float:
        """How long a host may be silent. step_seconds: of the last steps."""
        return max(self.silence_s, self.silence_steps * median(step_seconds) if step_seconds else 0.0)

    def is_hung(self, silent_s: float, stuck_s: float, is_busy: bool, step_seconds: list[float]) -> bool:
        """silent_s: since its last sign of life; stuck_s: since its last finished step."""
        return silent_s > self.silence_limit(step_seconds) or (is_busy and stuck_s > self.stuck_s)

    def hosts_to_start(self, target: int, alive: int, loading: int) -> int:
        """How many hosts to start so that `target` serve and the spares wait."""
        wanted = target + self.spares if self.replaces else 0
        return max(0, wanted - alive - loading)


class ClusterError(CommError):
    """The cluster cannot go on; what was finished stays finished."""


def first_sentence(error: BaseException) -> str:
    """Without Ray's boxes and tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
