"""What can go wrong between ranks, as errors that a caller can act on."""

from typing import NamedTuple


class Task(NamedTuple):
    """What ranks were doing together, as an error names it."""

    what: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.what if self.layer is None else f"{self.what} of layer {self.layer}"


class CommError(RuntimeError):
    """Ranks did not do something together; the message names this rank, the operation and the layer.

    generation: of the groups; layer: of the model; peers: the ranks that did not answer. Each where it is known.
    """

    def __init__(
        self, message: str, *, generation: int | None = None, layer: int | None = None, peers: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.generation, self.layer, self.peers = generation, layer, peers


class MissingPeers(CommError):
    """The ranks of a generation did not all come; `peers` are those that are missing, if they are known."""


class LostPeer(CommError):
    """A peer ended or fell silent after the start.

    `peers`: those that left no word (moe/comm/lost.py); several where it cannot be known.
    """


def first_line(error: BaseException) -> str:
    """The first sentence of a backend's error, without its source position."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if line.startswith("[") and "] " in line:
        line = line.split("] ", 1)[1]
    return line.split(". ", 1)[0]
