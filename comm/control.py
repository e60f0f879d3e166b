"""The lock step of all ranks: what each will do in this step, and the lines that they have for each other.

One small round a step. Lines go with it in a second one, which is left out when nobody has any: to all ranks (`tell`),
or to rank 0 alone (`hand_over`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.lost import in_collective
from moe.comm.wire import Wire, traffic_of


@dataclass(frozen=True, slots=True)
class Intent:
    """What one rank will do in a step. told, handed: bytes of its lines for all ranks, and for rank 0. asks: it wants
    to be told what all have routed (moe/engine/online.py)."""

    forwards: int
    tokens: int
    told: int
    handed: int
    leaves: bool  # it asks all to end this generation after the step
    asks: bool = False

    @property
    def is_idle(self) -> bool:
        return not (self.forwards or self.told or self.handed)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks said at the start of a step, rank by rank."""

    ranks: tuple[Intent, ...]

    @property
    def most_forwards(self) -> int:
        return max(rank.forwards for rank in self.ranks)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(rank.tokens for rank in self.ranks)

    @property
    def is_over(self) -> bool:
        """No rank has anything to compute or to hand over."""
        return all(rank.is_idle for rank in self.ranks)

    @property
    def is_asked(self) -> bool:
        """Some rank wants to be told."""
        return any(rank.asks for rank in self.ranks)

    @property
    def is_last(self) -> bool:
        """Some rank asked to end the generation: all leave it after this step."""
        return any(rank.leaves for rank in self.ranks)


class Control:
    """One rank's side of the agreement; owns the lines on their way. Every rank must call `agree` once a step."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.agreement = Agreement((Intent(1, 0, 0, 0, False),) * groups.world_size)
        self._wire = Wire(groups, groups.world, groups.world_ranks, traffic_of(groups))
        self._to_all: list[bytes] = []
        self._to_first: list[bytes] = []
        self._heard: list[list[bytes]] = [[] for _ in groups.world_ranks]
        self._received: list[bytes] = []
        self._leaves = self._asks = False

    def tell(self, line: bytes) -> None:
        """A line for all ranks, this one included; it ends with a newline and goes with the next step."""
        self._to_all.append(line)

    def hand_over(self, line: bytes) -> None:
        """A line for rank 0; it ends with a newline and goes with the next step."""
        self._to_first.append(line)

    def take_back(self) -> None:
        """Drops what was to be handed over: the step that would have taken it will not come."""
        self._to_first.clear()

    def leave(self) -> None:
        """Asks all ranks to end this generation after the next step."""
        self._leaves = True

    def ask(self) -> None:
        """Asks all ranks, in the next step, for what they have routed: no round of its own."""
        self._asks = True

    @property
    def has_heard(self) -> bool:
        return any(self._heard)

    def heard(self) -> list[list[bytes]]:
        """The lines that came for all ranks since the last call, by the rank that told them."""
        lines, self._heard = self._heard, [[] for _ in self._heard]
        return lines

    def received(self) -> list[bytes]:
        """On rank 0: the lines that were handed over since the last call."""
        lines, self._received = self._received, []
        return lines

    def agree(self, forwards: int, tokens: int) -> Agreement:
        """Tells all ranks what this one will do in this step, and brings the lines. A collective."""
        told, handed = b"".join(self._to_all), b"".join(self._to_first)
        own = torch.tensor([forwards, tokens, len(told), len(handed), self._leaves, self._asks], dtype=torch.int64)
        figures = [row.tolist() for row in self._gather(own, "the agreement on a step")]
        self.agreement = Agreement(
            tuple(Intent(row[0], row[1], row[2], row[3], bool(row[4]), bool(row[5])) for row in figures)
        )
        self._asks = False
        for lines in self._exchange_lines(handed, [rank.handed for rank in self.agreement.ranks]):
            self._received += lines if self.groups.rank == 0 else []
        for heard, lines in zip(self._heard, self._exchange_lines(told, [rank.told for rank in self.agreement.ranks])):
            heard += lines
        self._to_all.clear()
        self._to_first.clear()
        return self.agreement

    def of_all(self, value: int) -> list[int]:
        """Every rank's, rank by rank. A collective."""
        return [int(v) for v in self._gather(torch.tensor([value]), "agreeing on a number")]

    def smallest(self, value: int) -> int:
        """The least of all ranks' values. A collective."""
        return min(self.of_all(value))

    def sums(self, numbers: Tensor) -> Tensor:
        """int64 [N]: of all ranks', number by number. numbers: int64 [N], N alike on all. A collective."""
        return torch.stack(self._gather(numbers, "adding up numbers")).sum(0)

    def numbers_of_first(self, numbers: Sequence[int]) -> set[int]:
        """Rank 0's numbers on every rank. A collective."""
        world, device = self.groups.world, self.groups.device
        if world is None:
            return set(numbers)
        with in_collective(self.groups, Task("hearing numbers of rank 0")):
            count = torch.tensor([len(numbers)], device=device)
            dist.broadcast(count, 0, group=world)
            shared = torch.zeros(int(count), dtype=torch.int64, device=device)
            if self.groups.rank == 0:
                shared.copy_(torch.tensor(list(numbers), dtype=torch.int64))
            dist.broadcast(shared, 0, group=world)
            return set(shared.tolist())

    def _exchange_lines(self, own: bytes, sizes: Sequence[int]) -> list[list[bytes]]:
        """The lines of every rank; nothing is sent if there are none."""
        if not any(sizes):
            return []
        padded = torch.frombuffer(bytearray(own.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        gathered = self._gather(padded, "handing over results and requests")
        return [bytes(data[:size].numpy()).splitlines(keepends=True) for data, size in zip(gathered, sizes)]

    def _gather(self, own: Tensor, what: str) -> list[Tensor]:
        if self.groups.world is None:
            return [own]
        ones = [1] * self._wire.size  # as an all-to-all: gloo's all-gather is a ring of G - 1 steps
        everywhere = own.to(self.groups.device).repeat(self._wire.size, 1)
        return list(self._wire.exchange(everywhere, ones, ones, Task(what)).cpu())
