"""Lines between the ranks of one node: messages through memory that both map, with nobody in between.

gloo takes a message through threads of its own and the kernel's sockets: 0.7 to 1.4 ms of CPU time for each exchange of
two ranks and 16 to 50 kB, where copying it takes microseconds. The lines are compiled (`line.c`); where they are not,
or memory is short, the ranks of a node talk as those of different nodes do.
"""

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

LINE_BYTES = 1 << 18
DEPTH = 2  # of them: a sender may be one ahead
_SLICE_NS = 20_000_000  # a wait looks so often whether its peer lives

log = logging.getLogger(__name__)


@cache
def load_helper() -> ctypes.CDLL | None:
    """The library, or None where it is absent or of other sources; the reason is logged, once."""
    folder = Path(__file__).resolve().parent
    files = sorted(folder.glob("_line*.so"))
    try:
        if not files:
            raise OSError(
                f"no _line*.so in {folder}; it is compiled at installation (of a checkout: pip install -e .), "
                "which needs gcc or clang and Linux"
            )
        helper = ctypes.CDLL(str(files[0]))
        if not hasattr(helper, "moe_line_head"):
            raise OSError(f"{files[0].name} was compiled from other sources; reinstall")
    except OSError as error:
        log.warning("ranks of a node talk through sockets, which is slower: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments, result in (
        ("head", [], number),
        ("send", [pointer, number, number, pointer, number, pointer, number], None),
        ("take", [pointer], None),
        ("await_message", [pointer, number], number),
        ("await_room", [pointer, number, number], number),
        ("rouse", [pointer], None),
        ("live", [number, number], number),
        ("is_alive", [number, number], number),
    ):
        function = getattr(helper, f"moe_line_{name}")
        function.argtypes, function.restype = arguments, result
    return helper


def file_bytes(num_members: int) -> int:
    """Of the file of all lines between so many ranks."""
    return num_members * (num_members - 1) * _line_bytes()


class Lines:
    """One rank's lines to and from its peers on this node, over a file that all have mapped.

    Members are numbered within the node; peers: the others. freed: set, then `rouse`, by whoever takes this rank out of
    a wait. All raise RuntimeError when the peer's process ends, at once, or takes longer than `timeout_s`.
    """

    def __init__(self, path: Path, member: int, num_members: int, timeout_s: float, freed: threading.Event) -> None:
        helper = load_helper()
        assert helper is not None
        self._helper, self._timeout_s, self._freed = helper, timeout_s, freed
        self._memory = torch.from_file(str(path), shared=True, size=file_bytes(num_members), dtype=torch.uint8)
        # After the mapping: whoever closes any descriptor of the file in this process gives the lock up.
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if error := helper.moe_line_live(self._file, member):
            self.close()
            raise OSError(error, os.strerror(error), str(path))
        peers = [one for one in range(num_members) if one != member]
        self.peers = tuple(peers)
        self._out = {peer: self._line(member, peer, num_members) for peer in peers}
        self._in = {peer: self._line(peer, member, num_members) for peer in peers}
        self._is_read = dict.fromkeys(peers, False)  # a message lies open in the line's oldest buffer
        self._num_taken = dict.fromkeys(peers, 0)

    def _line(self, sender: int, receiver: int, num_members: int) -> int:
        """Where a line begins, in bytes of the file."""
        return (sender * (num_members - 1) + receiver - (receiver > sender)) * _line_bytes()

    def send(self, peer: int, head: Tensor, body: Tensor) -> None:
        """A message of at most LINE_BYTES. head, body: contiguous. Waits where the peer is DEPTH messages behind."""
        line = self._memory.data_ptr() + self._out[peer]
        self._wait(peer, partial(self._helper.moe_line_await_room, line, DEPTH))
        size = (head.nbytes, body.nbytes)
        self._helper.moe_line_send(line, LINE_BYTES, DEPTH, head.data_ptr(), size[0], body.data_ptr(), size[1])

    def receive(self, peer: int) -> Tensor:
        """The next message of a peer, uint8 [LINE_BYTES] of which it fills the beginning, until the next `receive`."""
        at = self._in[peer]
        self._take(peer)
        self._wait(peer, partial(self._helper.moe_line_await_message, self._memory.data_ptr() + at))
        self._is_read[peer] = True
        at += self._helper.moe_line_head() + self._num_taken[peer] % DEPTH * LINE_BYTES
        return self._memory[at : at + LINE_BYTES]

    def receive_into(self, peer: int, to: Tensor) -> None:
        """The next message of a peer, as long as `to`, uint8 [B]."""
        to.copy_(self.receive(peer)[: len(to)])
        self._take(peer)

    def _take(self, peer: int) -> None:
        """Gives the buffer that lies open back to the peer."""
        if self._is_read[peer]:
            self._is_read[peer] = False
            self._num_taken[peer] += 1
            self._helper.moe_line_take(self._memory.data_ptr() + self._in[peer])

    def rouse(self) -> None:
        """Lets a wait of another thread of this process look around."""
        for at in [*self._out.values(), *self._in.values()]:
            self._helper.moe_line_rouse(self._memory.data_ptr() + at)

    def close(self) -> None:
        """Tells the peers that this rank has left."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _wait(self, peer: int, is_there: Callable[[int], int]) -> None:
        if is_there(_SLICE_NS):
            return
        deadline = time.monotonic() + self._timeout_s
        while not is_there(_SLICE_NS):
            if self._freed.is_set():
                raise RuntimeError("it was taken out of its wait")
            if not self._helper.moe_line_is_alive(self._file, peer):
                if is_there(0):  # its last word
                    return
                raise RuntimeError("the peer's process has ended or left")
            if time.monotonic() > deadline:
                raise RuntimeError("timed out")


def _line_bytes() -> int:
    helper = load_helper()
    assert helper is not None
    return int(helper.moe_line_head()) + DEPTH * LINE_BYTES
