"""Where a model's tensors lie, and what is free there."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.lost import in_collective
from moe.config import BatchConfig, EngineConfig
from moe.engine.layer_major import Sizes
from moe.offload.budget import format_bytes
from moe.offload.files_in_use import SHARED_MEMORY
from moe.offload.memory import available_memory
from moe.offload.promised import own_memory, own_promised

_SHARE_OF_FREE = 0.9  # the rest is for activations, buffers and the rest of the machine
_READERS = 4  # whose buffers may hold an expert each, where nobody says how many
_UNSEEN = 40 << 20  # what allocators keep, stacks of threads; nothing that was freed at the start is left to serve it


@dataclass(frozen=True, slots=True)
class Began:
    """Bytes: free and of shared memory when the first of some processes began to load, own when this one did."""

    free: int
    shared: int
    own: int

    @staticmethod
    def now(first: Callable[[str], str]) -> "Began":
        """first: of what the processes give, what the first gave."""
        free, shared = map(int, first(f"{available_memory()} {_shared_memory()}").split())
        return Began(free, shared, own_memory())

    def left(self, number: int) -> int:
        """For this one, of an equal part: what the others have taken since does not count, nor what they will."""
        return (self.free - (_shared_memory() - self.shared)) // number - (own_memory() - self.own)


@dataclass(frozen=True, slots=True)
class Sharers:
    """Processes of this machine that take of its memory alike. number: of them, this one counted.

    free: of what the machine has and what each of them was promised of that, a collective of them: the least that any
    has seen, with the promises of all. None where they do not know each other yet, and then began: what was there for
    all of them.
    """

    number: int = 1
    free: Callable[[], int] | None = None
    began: Began | None = None

    @staticmethod
    def of(groups: Groups) -> "Sharers":
        """The ranks of this node."""

        def over_ranks(value: int, operation: dist.ReduceOp.RedOpType) -> int:
            shared = torch.tensor([value], device=groups.device)
            with in_collective(groups, Task("counting the memory of a node"), groups.local_ranks):
                dist.all_reduce(shared, operation, group=groups.local)
            return int(shared)

        def free() -> int:
            promised = over_ranks(own_promised(), dist.ReduceOp.SUM)  # nobody counts what another is about to load
            return over_ranks(available_memory() + promised, dist.ReduceOp.MIN)  # nor takes any before all have counted

        return Sharers(len(groups.local_ranks), None if groups.local is None else free)


ALONE = Sharers()


def find_device(name: str | None) -> torch.device:
    """None: the first GPU, else the CPU. Raises ValueError for one that torch does not have here."""
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if has_gpu else "cpu") if name is None else name)
    except RuntimeError:
        raise ValueError(f"device ({name!r}) is no device of torch; give cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device ({name!r}) is not served; give cpu, cuda or cuda:0")
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"device ({name!r}) cannot be used: torch sees no GPU here; give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device ({name!r}) cannot be used: torch sees {torch.cuda.device_count()} GPUs here")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device, wherever the tensors lie
    return device


def free_memory(device: torch.device, sharers: Sharers = ALONE) -> int:
    """Bytes that this process can still take where the model's tensors lie, with what it was promised of them when it
    loaded. A collective of those that share them.

    Of a GPU's memory none but this process takes.
    """
    if device.type != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    if sharers.began is not None:
        return max(0, min(available_memory(), sharers.began.left(sharers.number)))
    if sharers.free is None:
        return available_memory() // sharers.number
    return sharers.free() // sharers.number


def _shared_memory() -> int:
    """Bytes of what processes of this machine have together, such as a host copy of the experts."""
    return shutil.disk_usage(SHARED_MEMORY).used


def num_blocks(
    device: torch.device, batch: BatchConfig, kv_bytes: int, max_context: int, sharers: Sharers = ALONE
) -> int:
    """KV blocks as configured, by default for full sequences of full length within a quarter of free memory.

    kv_bytes: of a token. Raises ValueError where they are more than all of it.
    """
    tokens, free = batch.kv_tokens, free_memory(device, sharers)
    if tokens is None:
        tokens = min(batch.num_running * max_context, free // 4 // max(1, kv_bytes))
    blocks = max(1, -(-tokens // batch.block_size))
    if (nbytes := blocks * batch.block_size * kv_bytes) > free:
        raise ValueError(
            f"the KV cache of {blocks} blocks of {batch.block_size} tokens takes {format_bytes(nbytes)}, "
            f"{format_bytes(free)} are free after the dense weights; lower batch.kv_tokens, or batch.block_size"
        )
    return blocks


def free_room(device: torch.device, config: EngineConfig, sizes: Sizes, sharers: Sharers = ALONE) -> int:
    """Bytes for KV and slots: `_UNSEEN` stays free, and a tenth of the rest, or what steps and reads take if more."""
    batch, free = config.batch, free_memory(device, sharers) - _UNSEEN
    step = batch.max_tokens * sizes.token_bytes + batch.max_sequences * sizes.row_bytes
    reads = (config.offload.readers or _READERS) * max(sizes.read_bytes, *sizes.expert_bytes)
    return free - max(int(free * (1 - _SHARE_OF_FREE)), step + reads)
