"""Dense layers in fewer bits: what `moe pack --dense` writes, in compressed-tensors' names where those have one.

    int8   X.weight I8 [N, K], X.weight_scale F32 [N, 1]
    int4   X.weight_packed I32 [N, K / 8], X.weight_scale F16 [N, K / 32], X.weight_shape I64 [N, K]
    bf12   offload/formats/bf12.py

Read as any checkpoint's; in registers with `dense=packed`, bf12 wherever bf16 is computed with. Integers are rounded to
nearest: lossy, and the errors are kept.
"""

# mypy: allow-untyped-calls

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moe.kernels.bf12 import bytes_of_row
from moe.kernels.cpu_encode import most_rare_of
from moe.kernels.encode import encode
from moe.kernels.formats import decode
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.slot import BF12, WHOLE, MatrixFormat
from moe.offload.short_floats import short, short_format

DenseTarget = Literal["bf12", "int8", "int4"]
_FORMATS = {
    "bf12": BF12,
    "int8": MatrixFormat.coded("int8", (1, WHOLE), torch.float32),
    "int4": MatrixFormat.coded("int4", (1, 32), torch.float16),
}


class Kind(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class RoundedDense:
    """Some weights of a checkpoint, each rounded when it is asked for. Raises ValueError for what is no format.

    As bf12 those that are bf16 and become smaller, each of which is read once here.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str], target: str) -> None:
        if target not in get_args(DenseTarget):
            raise ValueError(f"--dense ({target}) must be one of {', '.join(get_args(DenseTarget))}")
        self.checkpoint, self.format = checkpoint, _FORMATS[target]
        self._rare: dict[str, int] = {}  # of bf12
        self.names = frozenset(name for name in names if self._fits(name))
        self.errors: dict[str, float] = {}  # |rounded - read| / |read|

    def _fits(self, name: str) -> bool:
        shape = self.checkpoint.tensors[name].shape
        if self.format.code == "bf12":
            if len(shape) != 2 or self.checkpoint.tensors[name].dtype != torch.bfloat16:
                return False
            made = short_format(most_rare_of(self.checkpoint.load(name)), shape[1])
            self._rare[name] = made.rare
            return made.code is not None
        return name.endswith(".weight") and len(shape) == 2 and (self.format.code == "int8" or shape[1] % 32 == 0)

    def kinds(self, name: str) -> dict[str, Kind]:
        """The tensors that a weight becomes."""
        n, k = self.checkpoint.tensors[name].shape
        if self.format.code == "bf12":
            return {
                f"{name}_bf12": Kind(torch.uint8, (n, bytes_of_row(k))),
                f"{name}_words": Kind(torch.int32, (n, 1 + self._rare[name])),
                f"{name}_shape": Kind(torch.int64, (2,)),
            }
        if self.format.code == "int8":
            return {name: Kind(torch.int8, (n, k)), f"{name}_scale": Kind(torch.float32, (n, 1))}
        return {
            f"{name}_packed": Kind(torch.int32, (n, k // 8)),
            f"{name}_scale": Kind(torch.float16, (n, k // 32)),
            f"{name}_shape": Kind(torch.int64, (2,)),
        }

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As `kinds` says. Reads the weight and notes its error."""
        if self.format.code == "bf12":
            weight = self.checkpoint.load(name)
            codes, words = short(weight, self._rare[name])
            return dict(zip(self.kinds(name), (codes, words[0], torch.tensor(weight.shape)), strict=True))
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
