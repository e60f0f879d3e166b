"""What every phase of the GPU session is given."""

from dataclasses import dataclass

import torch

from bench.gpu_layers import (
    LAYERS,
    TINY,
    Layer,
)
from bench.gpu_measure import Clock, Rows


@dataclass(frozen=True)
class Session:
    """Where a phase runs, and how much it does."""

    rows: Rows
    device: torch.device
    clock: Clock
    tiny: bool
    jobs: int
    gpus: int = 1

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def layers(self) -> tuple[Layer, ...]:
        return TINY if self.tiny else LAYERS

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 12

    @property
    def routings(self) -> tuple[str, ...]:
        return ("power_law",) if self.tiny else ("balanced", "power_law", "one")

    def bytes_free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.on_gpu else 1 << 30
