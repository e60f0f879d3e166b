"""A driver for Triton's runtime that compiles for a chip that is not here and launches nothing.

The project's host code runs under it unchanged, on CPU tensors: every kernel is specialised, compiled and assembled as
the JIT would on that chip, which hand-written signatures do not show. Outputs stay as they were allocated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True, slots=True)
class Binary:
    """A kernel that the driver was asked to load."""

    name: str
    code: bytes
    shared_bytes: int


class NoLaunch:
    """Takes the place of Triton's C launcher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, *arguments: Any) -> None:
        """Every argument has been specialised by now; there is nothing to run them on."""


class _Loader:
    def __init__(self, shared_limit: int) -> None:
        self.loaded: list[Binary] = []
        self.shared_limit = shared_limit

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_limit, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append(Binary(name, code, shared))
        return 0, 0, 0, 0, 1024


class FakeDriver:
    """An NVIDIA chip of one compute capability (10 * major + minor), as Triton's runtime asks for it."""

    launcher_cls = NoLaunch

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = _Loader(163 * 1024 if capability < 90 else 227 * 1024)

    @property
    def loaded(self) -> list[Binary]:
        """All kernels compiled so far, in their order."""
        return self.utils.loaded

    def install(self) -> "FakeDriver":
        """From now on this process compiles for the chip. For a process of its own."""
        driver.set_active(self)
        return self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
