"""What would make an accelerator wait for the host, or the host for it, counted on CPU tensors."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

# Methods that hand numbers to Python, or copy them there or from there.
ASKING = {
    Tensor.tolist,
    Tensor.item,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__array__,
}
# Operators whose result has a size that only the numbers tell, or that read one number.
TELLING = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::lift_fresh",  # torch.tensor of Python numbers: a copy to the device
}


class HostSyncs(TorchFunctionMode):
    """Inside, `names` grows by one name for each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._operators = _Operators(self.names)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in ASKING:
            self.names.append(resolve_name(function) or function.__name__)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._operators.__exit__(*raised)


class _Operators(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().removesuffix(".default")
        is_mask = name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in TELLING or is_mask:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))
