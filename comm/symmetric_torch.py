"""A symmetric heap between GPUs of one node, by torch's symmetric memory (labelled alpha; only this file touches it).

Not yet run: it needs several GPUs with peer access. TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 lets ranks share one.
"""

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory


class TorchSymmetricHeap:
    """Memory of every rank of `group`, mapped into all of them, so that kernels store to peers by plain pointers.

    nbytes must be equal on all ranks; all must call. Raises what torch raises when peers cannot be mapped.
    """

    def __init__(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"torch's symmetric memory needs a GPU, not {device}; use MappedHeap between CPU processes"
            )
        self.memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(self.memory, group.group_name)
        # The allocation may start inside a pool: ask for each rank's view of it, not for its buffer's base.
        parts = [self.handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.handle.world_size)]
        own = parts[self.handle.rank].data_ptr()
        assert own == self.memory.data_ptr(), (own, self.memory.data_ptr())
        self.bases = torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64, device=device)
        self.first_rank, self.num_ranks = self.handle.rank, 1
        self.memory.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody puts before everybody has cleared
