"""A double of CUDA graphs on the CPU: what the device was given is kept and given again, and no line of Python is run.

Operators and interpreted kernels are kept with the very tensors that they had; each result goes to the memory of the
first one. So a forward that depends on anything else than its buffers replays wrong, and one that asks the host raises.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from tests.host_syncs import HostSyncs


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)

        def again() -> None:
            for first, now in zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(first, torch.Tensor) and first.numel() and first.data_ptr() != now.data_ptr():
                    first.copy_(now)

        self.steps.append(again)
        return out


class Recording:
    """`moe.engine.graphs.Capture`. num_steps: of the last captured forward."""

    def __init__(self) -> None:
        self.num_steps = 0

    def capture(self, run):
        run()
        tape, launch = _Tape(), GridExecutor.__call__

        def launched(executor, *args, **kwargs):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                launch(executor, *args, **kwargs)
            tape.steps.append(lambda: launch(executor, *args, **kwargs))

        GridExecutor.__call__ = launched
        try:
            with HostSyncs() as syncs, tape:
                out = run()
        finally:
            GridExecutor.__call__ = launch
        if syncs.names:
            raise RuntimeError(f"it asks the host: {', '.join(sorted(set(syncs.names)))}")
        self.num_steps = len(tape.steps)

        def replay() -> None:
            for step in tape.steps:
                step()

        return replay, out
