"""Dense layers kept as they are stored (`dense=packed`): linear layers whose codes are decoded in registers; and bf16
ones that become bf12 at load, where experts do when they arrive (`offload.keep`).

Wins where memory matters: quantised attention and shared experts take a half to a quarter of what decoding them at load
takes, and few rows read that much less. CPU only, through the compiled helper. A row's result does not depend on the
other rows. Weights that the model does not keep as a plain linear layer of the same name are decoded as ever.
"""

import re
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_block import Linear
from moe.kernels.cpu_encode import most_rare_of, shorten
from moe.kernels.cpu_linear import CpuLinear
from moe.kernels.cpu_struct import MOST_COLUMNS
from moe.kernels.formats import decode
from moe.models.blueprint import Blueprint
from moe.offload.formats.slot import MatrixFormat, PieceKind
from moe.offload.formats.stored import StoredMatrix
from moe.offload.short_floats import short_format
from moe.offload.stores import aligned_bytes


class PackedLinear(nn.Module):
    """x [..., K] -> [..., N] in x's dtype; codes and what decodes them are buffers.

    shape: [N, K]; views: as `MatrixFormat.pieces` names them, each [1, ...]; dtype: of the model.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: MatrixFormat,
        views: dict[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        for name, view in views.items():
            self.register_buffer(name.lstrip(".") or "codes", view, persistent=False)
        self.bias = bias
        self._dtype = dtype
        self._decoded: Tensor | None = None
        coding = layout.coding(views, "")
        self.described = Linear(views[""][0], bias, coding, self.in_features)
        self._linear = CpuLinear(views[""][0], bias, coding=coding, columns=self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return self._linear(input)

    @property
    def weight(self) -> Tensor:
        """[N, K], decoded: some models read it beside calling the layer. Kept from the first time on."""
        if self._decoded is None:
            codes, coding = self._linear.weight, self._linear.coding
            assert coding is not None
            self._decoded = decode(codes, coding, self.in_features, 0).to(self._dtype)
        return self._decoded


def packable(skeleton: nn.Module, matrix: StoredMatrix) -> bool:
    """Whether the model keeps this weight as a linear layer of its own that can stay packed."""
    path = matrix.name.removesuffix(".weight")
    if load_helper() is None or path == matrix.name or len(matrix.shape) != 2 or matrix.shape[1] > MOST_COLUMNS:
        return False
    try:
        module: Any = skeleton.get_submodule(path)
    except AttributeError:
        return False
    return type(module) is nn.Linear and tuple(module.weight.shape) == matrix.shape


def tied_weights(model: Any) -> dict[str, str]:
    """Names of weights that are another's, with that one's."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def roundable(blueprint: Blueprint) -> list[str]:
    """Weights of the checkpoint, in floats, that the model keeps as plain linear layers of their own: neither its
    routers nor a head that is its embedding."""
    names, tied = [], tied_weights(blueprint.skeleton)
    for name in sorted(set(blueprint.checkpoint.tensors) - blueprint.index.expert_keys):
        info, path = blueprint.checkpoint.tensors[name], name.removesuffix(".weight")
        if (
            path == name
            or name in tied
            or not info.dtype.is_floating_point
            or info.dtype.itemsize < 2
            or len(info.shape) != 2
        ):
            continue
        try:
            module: Any = blueprint.skeleton.get_submodule(path)
        except AttributeError:
            continue
        is_plain = type(module) is nn.Linear and tuple(module.weight.shape) == info.shape
        if is_plain and not _routes(blueprint, path, info.shape[0]):
            names.append(name)
    return names


def _routes(blueprint: Blueprint, path: str, outputs: int) -> bool:
    """Whether a layer chooses or weighs experts: it stands beside some, or within what does, and has an output for
    each, or one."""
    beside = {site.module.rpartition(".")[0]: site.num_experts for site in blueprint.index.sites}
    above = [path[: dot.start()] for dot in re.finditer(r"\.", path)]  # routers may be modules of several
    return outputs == 1 or outputs in [beside[name] for name in above if name in beside]


def pack_dense(model: nn.Module, matrices: list[StoredMatrix]) -> None:
    """Puts packed layers in place of the model's own, whose weights are placeholders.

    All lie in one stretch of memory, in large pages: in small ones a step of int4 took 4 to 6 % longer.
    """
    left = aligned_bytes(sum(_room_of(matrix.format, matrix.shape) for matrix in matrices))
    for matrix in matrices:
        views = {}
        for name, read in matrix.views().items():
            views[name] = left[: read.nbytes].view(read.dtype).view(read.shape).copy_(read)
            left = left[_room(_pieces(matrix)[name]) :]
        path = matrix.name.removesuffix(".weight")
        _replace(model, path, matrix.shape, matrix.format, views)


def shortenable(model: nn.Module, blueprint: Blueprint) -> dict[str, tuple[int, int]]:
    """[N, K] of the linear layers that may become bf12, by path: all but routers and weights that are another's."""
    tied = tied_weights(model)
    shared, found = {*tied, *tied.values()}, dict[str, tuple[int, int]]()
    for path, module in model.named_modules():
        if type(module) is nn.Linear and f"{path}.weight" not in shared:
            n, k = module.weight.shape
            if n and k <= MOST_COLUMNS and not _routes(blueprint, path, n):
                found[path] = n, k
    return found


def shorten_dense(model: nn.Module, blueprint: Blueprint) -> None:
    """Puts bf12 (kernels/bf12.py) in place of bf16 linear layers that become smaller: the same bits of fewer bytes.

    A weight is given back before the next is made.
    """
    shapes, formats = shortenable(model, blueprint), dict[str, MatrixFormat]()
    for path, (_, k) in shapes.items():
        weight = model.get_parameter(f"{path}.weight").detach()
        if weight.dtype == torch.bfloat16 and weight.is_contiguous():
            formats[path] = short_format(most_rare_of(weight), k)
    formats = {path: layout for path, layout in formats.items() if layout.code is not None}
    pieces = {path: layout.pieces(1, *shapes[path]) for path, layout in formats.items()}
    left = aligned_bytes(sum(_room_of(layout, shapes[path]) for path, layout in formats.items()))
    for path, layout in formats.items():
        views = {}
        for name, piece in pieces[path].items():
            views[name] = left[: piece.nbytes].view(piece.dtype).view(1, *piece.shape)
            left = left[_room(piece) :]
        over = shorten(model.get_parameter(f"{path}.weight").detach(), views[""][0], views[".scale"][0])
        assert not over, f"{path}: {over} rows have more rare weights than were counted"
        _replace(model, path, shapes[path], layout, views)


def _replace(
    model: nn.Module, path: str, shape: tuple[int, ...], layout: MatrixFormat, views: dict[str, Tensor]
) -> None:
    old: Any = model.get_submodule(path)
    bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
    model.set_submodule(path, PackedLinear(shape, layout, views, bias, old.weight.dtype))


def _pieces(matrix: StoredMatrix) -> dict[str, PieceKind]:
    return matrix.format.pieces(1, *matrix.shape)


def _room(piece: PieceKind) -> int:
    """Bytes, whole cache lines."""
    return -(-prod(piece.shape) * piece.dtype.itemsize // 64) * 64


def _room_of(layout: MatrixFormat, shape: tuple[int, ...]) -> int:
    """Bytes of a packed layer."""
    return sum(map(_room, layout.pieces(1, *shape).values()))
