"""Where a model's tensors lie, and what is free there."""

import torch

from moe.config import BatchConfig, EngineConfig
from moe.engine.layer_major import Sizes
from moe.offload.budget import format_bytes
from moe.offload.memory import available_memory

_SHARE_OF_FREE = 0.9  # the rest is for activations, buffers and the rest of the machine
_READERS = 4  # whose buffers may hold an expert each, where nobody says how many
_UNSEEN = 16 << 20  # what the allocator keeps, stacks of threads


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


def free_memory(device: torch.device, sharers: int = 1) -> int:
    """Bytes that this process can still take where the model's tensors lie.

    sharers: processes of this machine that take of its memory alike, this one counted; of a GPU's none does.
    """
    return available_memory() // sharers if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def num_blocks(device: torch.device, batch: BatchConfig, kv_bytes: int, max_context: int, sharers: int = 1) -> int:
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


def free_room(device: torch.device, config: EngineConfig, sizes: Sizes, sharers: int = 1) -> int:
    """Bytes for KV and slots: a tenth of what is free stays, or what steps and reads take, if that is more."""
    batch, free = config.batch, free_memory(device, sharers)
    step = batch.max_tokens * sizes.token_bytes + batch.max_sequences * sizes.row_bytes
    reads = (config.offload.readers or _READERS) * max(sizes.expert_bytes)
    return free - max(int(free * (1 - _SHARE_OF_FREE)), step + reads + _UNSEEN)
