"""Who was lost: survivors leave word before they end, so that the end of one is not taken for the loss of it.

A rank that waits for a peer sees only that the peer is gone, and the peer may have ended because it saw a loss before.
So each writes into the generation's store whom it waited for, while its own connections are still open. Lost is who was
waited for and left no word.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moe.comm.errors import CommError, LostPeer, Task, first_line
from moe.comm.groups import Groups

_PATIENCE_S = 1.0  # for words that come at the same time: after a time-out, and of all that a collective waits for


def lost_peer(
    groups: Groups,
    what: Task,
    started: float,
    error: RuntimeError,
    ranks: Sequence[int],
    waited_for: Sequence[int] = (),
    patience_s: float = _PATIENCE_S,
) -> LostPeer:
    """The error of this rank, which was to do `what` with `ranks`. waited_for: those it still needed, () = all.

    patience_s: how much later than this rank another may see the loss.
    """
    seconds, needed = time.monotonic() - started, [rank for rank in waited_for or ranks if rank != groups.rank]
    is_sudden = len(needed) == 1 and seconds < 0.5 * groups.timeout_s
    lost = who_is_lost(groups, needed, 0.0 if is_sudden else patience_s)
    who = f"rank {lost[0]}" if len(lost) == 1 else f"one of ranks {list(lost)}"
    is_timely = seconds < 0.9 * groups.timeout_s
    why = "its connection ended" if is_timely else f"it ended or did not answer within {groups.timeout_s:g} s"
    return LostPeer(
        f"rank {groups.rank} of {groups.world_size}: lost {who} in {what} with ranks {list(ranks)} after "
        f"{seconds:.1f} s: {why} ({first_line(error)})",
        generation=groups.generation,
        layer=what.layer,
        peers=lost,
    )


def who_is_lost(groups: Groups, waited_for: Sequence[int], patience_s: float) -> tuple[int, ...]:
    """Leaves word of whom this rank waited for, and follows the words of others. Several where it cannot be known.

    Costs some round trips to the store, and `patience_s` for those who live but have not left word yet; nothing more
    once this rank was freed: whoever did it knows.
    """
    lost, words = set(waited_for), {groups.rank}
    if groups.store is None:
        return tuple(sorted(lost))
    deadline = time.monotonic() + patience_s
    try:
        groups.store.set(f"waited_{groups.rank}", json.dumps(list(waited_for)))
        while lost:
            heard = [rank for rank in sorted(lost) if groups.store.check([f"waited_{rank}"])]
            for rank in heard:
                words.add(rank)
                lost = (lost | set(json.loads(groups.store.get(f"waited_{rank}")))) - words
            if not heard:
                if groups.freed.is_set() or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
    except RuntimeError:  # the store is gone with its process: what this rank saw is all that is known
        return tuple(sorted(waited_for))
    return tuple(sorted(lost or waited_for))


def speaks_for_job(groups: Groups) -> bool:
    """Whether this rank is the first of its generation to ask: one sentence tells of a loss, not one of each rank."""
    try:
        return groups.store is None or int(groups.store.add("spoken", 1)) == 1
    except RuntimeError:  # the store is gone, so that nobody else can be asked
        return True


@contextmanager
def in_collective(groups: Groups, what: Task, ranks: Sequence[int] | None = None) -> Iterator[None]:
    """Around calls of torch.distributed alone: what it raises becomes LostPeer. ranks: of the group, None = all."""
    started = time.monotonic()
    try:
        yield
    except CommError:
        raise
    except RuntimeError as error:
        raise lost_peer(groups, what, started, error, ranks or groups.world_ranks) from error
