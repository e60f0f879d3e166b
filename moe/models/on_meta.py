"""Models without weights, quickly: torch works out sizes on the meta device in Python, for which it imports sympy, a
fifth of what `moe info` takes. Made so, a model needs none of that: nothing is drawn for weights that have no memory,
and positions, which rotary embeddings compute with, are numbers in memory until they meet what has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

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
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            if len({one.is_meta for one in given}) < 2:
                raise
            return func(*tree_map(_sizes, args), **tree_map(_sizes, kwargs))


def without_values(model: nn.Module) -> None:
    """All of its buffers on the meta device, too."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = _sizes(buffer)


def _sizes(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device) == _META
