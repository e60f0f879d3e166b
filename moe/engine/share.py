"""What a process has of the experts."""

from dataclasses import dataclass

from moe.engine.device import ALONE, Sharers
from moe.layer.parallel import experts_of_rank
from moe.offload.nested import Held
from moe.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Share:
    """What a process will have of the experts, known before it meets a peer: rank `rank`'s part of `plan`.

    host_copy: processes of a node that give the same name have one copy of all experts in host memory together.
    sharers: of this machine's memory. may_change: whether it may get other experts later.
    """

    plan: Plan
    rank: int
    host_copy: str = ""
    sharers: Sharers = ALONE
    may_change: bool = False

    @property
    def experts(self) -> list[list[int]]:
        """By layer."""
        return experts_of_rank(self.plan, self.rank)

    @property
    def held(self) -> Held:
        """Of all ranks."""
        return Held([experts_of_rank(self.plan, rank) for rank in range(self.plan.num_ranks)], self.rank)
