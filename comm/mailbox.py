"""Messages that arrive after one way, with their counts: what gloo's collectives take two round trips for.

gloo sends only what the receiver has asked for, so that each round of a collective costs a round trip, and rows whose
number is not known yet cost two rounds: counts, then rows. Here every member keeps buffers posted for every peer. A
message says its own length: up to the size of the buffers it is there after one way, counts and rows together; what
is longer follows at its exact size by gloo's own protocol. Small batches win on every link, slow ones most.

Between ranks of one node the buffers are lines through memory that both map (`lines.py`); what is longer than one
passes through them in pieces.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.comm.lines import LINE_BYTES, Lines

DEPTH = 2  # buffers per peer: it may be a message ahead
_SHORT, _LONG = 1, 2  # tags; messages of one tag between two members keep their order


class Moving(NamedTuple):
    """A send or receive under way; its bytes must live until `work.wait()`."""

    work: dist.Work
    data: Tensor


class Mailbox:
    """One member's messages over one gloo group. All members must have one, of the same size.

    num_bytes: the largest message that needs no second one, its counts included. Memory: DEPTH such buffers per peer.
    timeout_s: of each wait (gloo's own would be the one that the group was made with, whatever is set later).
    lines: to the members of this node, numbered there by `on_lines`; None: gloo for all.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int,
        timeout_s: float,
        lines: Lines | None = None,
        on_lines: Mapping[int, int] | None = None,
    ) -> None:
        self.group, self.num_bytes, self.timeout = group, num_bytes, timedelta(seconds=timeout_s)
        self.lines = lines
        self.on_lines = {} if lines is None or on_lines is None else dict(on_lines)
        self._posted: list[deque[tuple[dist.Work, Tensor]]] = [deque() for _ in range(group.size())]
        self._read: list[list[Tensor]] = [[] for _ in range(group.size())]  # buffers to post again
        for member in set(range(group.size())) - {group.rank()} - set(self.on_lines):
            self._read[member] = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(DEPTH)]
            self._post(member)

    def _post(self, member: int) -> None:
        for buffer in self._read[member]:
            self._posted[member].append((self.group.recv([buffer], member, _SHORT), buffer))
        self._read[member].clear()

    def send(self, member: int, head: Tensor, body: Tensor) -> list[Moving]:
        """head: int64 [1 + C], len(body) and C counts, as the receiver expects them; body: uint8 [B].

        A body that `is_in_pieces` is left to `pass_pieces`.
        """
        if self.lines is not None and (on_line := self.on_lines.get(member)) is not None:
            rest = body[:0] if self.is_in_pieces(member, len(head) - 1, len(body)) else body
            self.lines.send(on_line, head.view(torch.uint8), rest)
            return []
        head = head.view(torch.uint8)
        self._post(member)  # here, so that both reach the member at once
        if len(head) + len(body) <= self.num_bytes:
            parts = {_SHORT: torch.cat([head, body])}
        else:
            parts = {_SHORT: head, _LONG: body}
        return [Moving(self.group.send([data], member, tag), data) for tag, data in parts.items()]

    def receive(self, member: int, num_counts: int) -> tuple[list[int], Tensor, list[Moving]]:
        """The next message of a member: its counts, its body uint8 [B], and what is still under way of the body.

        A body that `is_in_pieces` is empty memory, for `pass_pieces` to fill.
        The body may be overwritten after the next `send` or `receive` of this member. Raises RuntimeError when no
        message comes within the time-out.
        """
        if self.lines is not None and (on_line := self.on_lines.get(member)) is not None:
            buffer = self.lines.receive(on_line)
        else:
            buffer = self._receive_by_gloo(member)
        end = 8 * (1 + num_counts)
        length, *counts = buffer[:end].view(torch.int64).tolist()
        if end + length <= len(buffer):
            return counts, buffer[end : end + length], []
        body = torch.empty(length, dtype=torch.uint8)
        if self.is_in_pieces(member, num_counts, length):
            return counts, body, []
        return counts, body, [Moving(self.group.recv([body], member, _LONG), body)]

    def is_in_pieces(self, member: int, num_counts: int, num_bytes: int) -> bool:
        """Whether a body of so many bytes is for `pass_pieces`: its member is of this node, and no buffer holds it."""
        return self.lines is not None and member in self.on_lines and 8 * (1 + num_counts) + num_bytes > LINE_BYTES

    def pass_pieces(self, out: Sequence[tuple[int, Tensor]], come: Sequence[tuple[int, Tensor]]) -> Iterator[int]:
        """Bodies to and from members, after all heads of a round; yields whom it is about to wait for.

        A piece to each, then one from each, and so on: no member can be more than a piece ahead of one that it waits
        for, and a line holds two, so that none waits in a circle.
        """
        assert self.lines is not None or not (out or come)
        longest = max((len(body) for _, body in (*out, *come)), default=0)
        for at in range(0, longest, LINE_BYTES):
            for member, body in out:
                if self.lines is not None and at < len(body):
                    yield member
                    self.lines.send(self.on_lines[member], body[:0], body[at : at + LINE_BYTES])
            for member, body in come:
                if self.lines is not None and at < len(body):
                    yield member
                    self.lines.receive_into(self.on_lines[member], body[at : at + LINE_BYTES])

    def _receive_by_gloo(self, member: int) -> Tensor:
        if not self._posted[member]:
            self._post(member)
        work, buffer = self._posted[member].popleft()
        work.wait(self.timeout)
        self._read[member].append(buffer)
        return buffer
