"""What a controller does about hosts that are lost, silent or too few: the rules, apart from what carries them out."""

import enum
from dataclasses import dataclass
from statistics import median

from moe.comm.errors import CommError
from moe.config import ClusterConfig

_LOADING = 10  # times as long as one that serves may one be silent that loads or starts: imports hold a whole process


class State(enum.Enum):
    """Of a cluster. The arrows: STARTING → SERVING → SETTLING → SERVING …; any → CLOSED."""

    STARTING = "hosts load the model"
    SERVING = "a generation of hosts steps"
    SETTLING = "the generation ends: hosts leave it, or are given up"
    WAITING = "no host is left; replacements load"
    CLOSED = "no more requests are served"


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """The rules, with the limits of `limits`."""

    limits: ClusterConfig

    def silence_limit(self, step_seconds: list[float]) -> float:
        """How long a host may be silent. step_seconds: of the last steps."""
        limits = self.limits
        return max(limits.silence_s, limits.silence_steps * median(step_seconds) if step_seconds else 0.0)

    def is_hung(self, silent_s: float, stuck_s: float, is_busy: bool, step_seconds: list[float]) -> bool:
        """silent_s: since its last sign of life; stuck_s: since its last finished step."""
        return silent_s > self.silence_limit(step_seconds) or (is_busy and stuck_s > self.limits.stuck_s)

    def starts_s(self) -> float:
        """How long an actor that was asked for may take until its first sign of life: a place, a process, imports."""
        return self.limits.room_s + _LOADING * self.limits.answer_s

    def why_not_loading(self, silent_s: float | None, asked_s: float) -> str | None:
        """Why one that loads is given up, if it is. silent_s: since its last sign of life, None before the first;
        asked_s: since Ray was asked for it, or last had no room for it."""
        limits = self.limits
        if silent_s is None and asked_s > self.starts_s():
            return (
                f"no sign of life {asked_s:.0f} s after it was asked for, more than cluster.room_s "
                f"({limits.room_s:g}) and {_LOADING} x cluster.answer_s ({limits.answer_s:g}) together; raise "
                "cluster.answer_s if a process takes so long to start"
            )
        if silent_s is not None and silent_s > (most := _LOADING * limits.silence_s):
            return f"silent for {silent_s:.1f} s while it loads, more than {_LOADING} x cluster.silence_s ({most:g} s)"
        if asked_s > limits.room_s + limits.load_s:
            return (
                f"not ready {asked_s:.0f} s after it was asked for, more than cluster.room_s ({limits.room_s:g}) and "
                f"cluster.load_s ({limits.load_s:g}) together; raise cluster.load_s if loading takes so long"
            )
        return None

    def controller_starts_s(self) -> float:
        """How long a controller may take until its hosts serve: its own start and theirs, and their meeting."""
        limits = self.limits
        return limits.room_s + limits.load_s + limits.meet_s + limits.answer_s

    def does_not_leave(self, since_freed_s: float, step_seconds: list[float]) -> bool:
        """Of one that gives signs of life. It may be in a long step, or wait for the connection of a peer that died
        while they met: it is given twice as long as one that is silent."""
        return since_freed_s > 2 * self.silence_limit(step_seconds)

    def hosts_to_start(self, target: int, alive: int, loading: int) -> int:
        """How many hosts to start so that `target` serve and the spares wait."""
        wanted = target + self.limits.spares if self.limits.replaces else 0
        return max(0, wanted - alive - loading)


class ClusterError(CommError):
    """The cluster cannot go on; what was finished stays finished."""


class Refused(ValueError):
    """A host does not load what is in its folder, and neither would another: nobody tries again by itself."""


def first_sentence(error: BaseException) -> str:
    """Without Ray's boxes, tracebacks and guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Worker exit type: ")[0] if lines else type(error).__name__
