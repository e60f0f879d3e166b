"""What a model that has loaded will still take of the memory."""

from moe.engine.assemble import Loaded
from moe.models.kv import BlockPool


def bytes_to_come(loaded: Loaded, pool: BlockPool) -> int:
    """What slots and KV may take of the host's memory and have not taken yet. pool: of the KV that is in use."""
    if loaded.read.device.type != "cpu":  # a GPU has allocated all of it
        return 0
    slots, kv_bytes = loaded.experts.slots, loaded.memory.kv_bytes
    if pool is not loaded.memory.scheduler.pool:
        kv_bytes = pool.num_blocks * pool.block_size * loaded.dense.tried.kv_bytes
    kv_to_come = kv_bytes * (pool.room - pool.num_used) // pool.room
    return kv_to_come + (0 if slots is None else slots.cache.empty_bytes)
