"""Dense layers in fewer bits: what `moe pack --dense` writes, in compressed-tensors' names. Lossy; errors are kept.

    int8   X.weight I8 [N, K], X.weight_scale F32 [N, 1]
    int4   X.weight_packed I32 [N, K / 8], X.weight_scale F16 [N, K / 32], X.weight_shape I64 [N, K]

Read by offload/formats/integers.py as any checkpoint's; in registers with `dense=packed`. Rounded to nearest.
"""

# mypy: allow-untyped-calls

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moe.kernels.encode import encode
from moe.kernels.formats import decode
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.slot import WHOLE, MatrixFormat

DenseTarget = Literal["int8", "int4"]
_FORMATS = {
    "int8": MatrixFormat.coded("int8", (1, WHOLE), torch.float32),
    "int4": MatrixFormat.coded("int4", (1, 32), torch.float16),
}


class Kind(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class RoundedDense:
    """Some weights of a checkpoint, each rounded when it is asked for. Raises ValueError for what is no format."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str], target: str) -> None:
        if target not in get_args(DenseTarget):
            raise ValueError(f"--dense ({target}) must be one of {', '.join(get_args(DenseTarget))}")
        self.checkpoint, self.format = checkpoint, _FORMATS[target]
        self.names = frozenset(name for name in names if self._fits(name))
        self.errors: dict[str, float] = {}  # |rounded - read| / |read|

    def _fits(self, name: str) -> bool:
        shape = self.checkpoint.tensors[name].shape
        return name.endswith(".weight") and len(shape) == 2 and (self.format.code == "int8" or shape[1] % 32 == 0)

    def kinds(self, name: str) -> dict[str, Kind]:
        """The tensors that a weight becomes."""
        n, k = self.checkpoint.tensors[name].shape
        if self.format.code == "int8":
            return {name: Kind(torch.int8, (n, k)), f"{name}_scale": Kind(torch.float32, (n, 1))}
        return {
            f"{name}_packed": Kind(torch.int32, (n, k // 8)),
            f"{name}_scale": Kind(torch.float16, (n, k // 32)),
            f"{name}_shape": Kind(torch.int64, (2,)),
        }

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As `kinds` says. Reads the weight and notes its error."""
        weight = self.checkpoint.load(name).float()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} holds numbers that are not finite; it cannot be rounded")
        assert self.format.code is not None
        codes, scale = encode(weight, self.format.code, self.format.block, self.format.scale_dtype)
        if not bool(scale.isfinite().all()):
            raise ValueError(f"{name}: weights too large for scales in {self.format.scale_dtype}")
        views = {"": codes[None], ".scale": scale[None, None]}
        coding = self.format.coding(views, "")
        assert coding is not None
        again = decode(codes, coding, weight.shape[1], 0)
        self.errors[name] = float((again - weight).double().norm() / weight.double().norm().clamp(min=1e-300))
        made = [codes, scale]
        if self.format.code == "int4":
            made = [codes.contiguous().view(torch.int32), scale, torch.tensor(weight.shape)]
        return {
            key: tensor.view(kind.shape) for (key, kind), tensor in zip(self.kinds(name).items(), made, strict=True)
        }
