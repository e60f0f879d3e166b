"""Models without weights, quickly: torch works out sizes on the meta device in Python, for which it imports sympy, a
fifth of what `moe info` takes. Made so, a model needs none of that: nothing is drawn for weights that have no memory,
and positions, which rotary embeddings compute with, are numbers in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_META = torch.device("meta")


@contextmanager
def on_meta() -> Iterator[None]:
    """Tensors made within have no memory, but for what is computed from `arange`, which `without_values` takes away."""
    with quick_meta(), _META:
        yield


class quick_meta(TorchFunctionMode):  # a context, named as torch names them
    """For code that goes to the meta device by itself, as transformers' loading does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.arange and _is_meta(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"})
        if getattr(func, "__module__", None) == nn.init.__name__:
            weight = args[0] if args else kwargs["tensor"]
            if weight.is_meta:
                return weight
        return func(*args, **kwargs)


def without_values(model: nn.Module) -> None:
    """All of its buffers on the meta device, too."""
    for module in model.modules():
        for name, kept in module.named_buffers(recurse=False):
            if not kept.is_meta:
                module._buffers[name] = torch.empty_strided(kept.shape, kept.stride(), dtype=kept.dtype, device=_META)


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device) == _META
