"""Real gloo ranks for tests: start them, collect what they return, raise what they raise, never wait for ever.

Ranks are forked from a server that imported torch once, so that a start costs a fraction of a second. `function` must
be importable by name from its module; it is called as `function(*args)` on each rank with the environment of torchrun.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import PATIENCE_S

MULTIPROCESSING = multiprocessing.get_context("forkserver")
# torch._inductor.config is what use_deterministic_algorithms imports, moe.opening what an LLM does where one is made:
# seconds per rank if each did it.
_MODULES = [
    "torch.distributed",
    "torch._inductor.config",
    "pytest",
    "hypothesis",
    "moe.llm",
    "moe.opening",
    "moe.batch",
]
MULTIPROCESSING.set_forkserver_preload(_MODULES)


class RankFailed(AssertionError):
    """A rank raised, died, or took too long; the message holds every failed rank's traceback."""


def spawn(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    ranks_per_node: int | None = None,
    time_limit_s: float = PATIENCE_S + 100,
    may_die: Sequence[int] = (),
) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks and return what each returned (a picklable value).

    ranks_per_node: LOCAL_WORLD_SIZE, to let one machine stand for several nodes; None = all on one.
    time_limit_s: longer than what a rank itself waits, so that it says why.
    may_die: ranks whose sudden end is part of the test; their value is None. Raises RankFailed for any other failure.
    """
    # The store lives here: its port is taken, not guessed, and it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    local_size = ranks_per_node or world_size
    ranks = []
    for rank in range(world_size):
        environment = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank % local_size,
            "LOCAL_WORLD_SIZE": local_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": 1,
        }
        receiver, sender = MULTIPROCESSING.Pipe(duplex=False)
        process = MULTIPROCESSING.Process(target=_rank_main, args=(sender, environment, function, args), daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))

    deadline = time.monotonic() + time_limit_s
    results: list[Any] = []
    failures: list[str] = []
    try:
        for rank, (process, receiver) in enumerate(ranks):
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank}: no result within {time_limit_s:g} s")
                results.append(None)
                continue
            value, error = _received(receiver)
            if error == "ended":
                process.join(PATIENCE_S)
                error = None if rank in may_die else f"ended without a result, exit code {process.exitcode}"
            if error is not None:
                failures.append(f"rank {rank}: {error}")
            results.append(value)
    finally:
        for process, receiver in ranks:
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()
    if failures:
        raise RankFailed("\n".join(failures))
    return results


def _received(receiver: Connection) -> tuple[Any, str | None]:
    try:
        value, error = receiver.recv()
    except EOFError:
        return None, "ended"
    return value, error


def _rank_main(sender: Connection, environment: dict[str, Any], function: Callable[..., Any], args: Any) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a forgotten write shows as NaN
    try:
        message = (function(*args), None)
    except BaseException:
        message = (None, traceback.format_exc())
    sender.send(message)
    sender.close()
