"""What a model that has loaded will still take of the memory."""

from moe.engine.assemble import Loaded
from moe.models.kv import BlockPool


def bytes_to_come(loaded: Loaded, pool: BlockPool) -> int:
    """What slots and KV may take of the host's memory and have not taken yet. pool: of the KV that is in use."""
    if loaded.read.device.type != "cpu":  # a GPU has allocated all of it
        return 0
    slots, free = loaded.experts.slots, pool.num_blocks - pool.num_used
    kv_to_come = free * pool.block_size * loaded.dense.tried.kv_bytes if loaded.dense.is_packed else 0
    return kv_to_come + (0 if slots is None else slots.cache.empty_bytes)
