"""Experts in fewer bits than they are stored in: what `moe pack --experts` writes. Lossy; the errors are kept.

A store over another one: it reads an expert, decodes it in float32, rounds it to the wanted codes (kernels/encode.py,
or kernels/calibrated.py where inputs were kept) and notes how far the rounded weights lie from the read ones.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.calibrated import encode_calibrated
from moe.kernels.encode import Encoded, encode
from moe.kernels.encode_nested import encode_nested
from moe.kernels.formats import decode
from moe.kernels.nested import LEVELS
from moe.kernels.reference import activation_reference, dequantized
from moe.kernels.weights import Activation
from moe.offload.formats.slot import BF12, WHOLE, MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.nested import at_level, set_bits
from moe.offload.segments import ExpertIndex
from moe.offload.short_floats import short_format
from moe.offload.stores import ExpertStore, aligned_bytes

_BF16 = MatrixFormat(torch.bfloat16)
Biases = tuple[Tensor | None, Tensor | None]
Target = Literal["bf12", "int8", "int4", "mxfp4", "fp8", "nested"]


def target_format(target: str, group: int | None) -> MatrixFormat:
    """What `--experts target --group group` means. Raises ValueError for what is no format of experts."""
    if group is not None and group < 8:
        raise ValueError(f"--group ({group}) must be at least 8 columns a scale")
    match target:
        case "int8":
            return MatrixFormat.coded("int8", (1, group or WHOLE), torch.float32)
        case "int4":
            return MatrixFormat.coded("int4", (1, group or 32), torch.float16)
        case "nested" if group is None or group % 16 == 0:
            return MatrixFormat.coded("nested", (1, group or 64), torch.float16)._replace(bits=8)
        case "nested":
            raise ValueError(f"--group ({group}) of nested precision must be a multiple of 16 columns")
        case "mxfp4" if group in (None, 32):
            return MatrixFormat.coded("e2m1", (1, 32), torch.float8_e8m0fnu)
        case "fp8" if group is None:
            return MatrixFormat.coded("e4m3", (128, 128), torch.float32)
        case "bf12" if group is None:
            return BF12
        case "mxfp4" | "fp8" | "bf12":
            raise ValueError(f"--group ({group}) cannot be chosen for {target}; leave it out, or use int4 or int8")
    raise ValueError(f"--experts ({target}) must be one of {', '.join(get_args(Target))}")


def requantised(site: ExpertSite, layout: ExpertLayout, to: MatrixFormat) -> ExpertLayout:
    """`layout` with both matrices in `to`; biases stay."""
    bias = layout.piece("gate_up_bias")
    first = second = to
    if to.code == "bf12":  # where it is smaller, as most models have it
        first, second = (short_format(to.rare, columns) for columns in (site.hidden_size, site.intermediate_size))
    return ExpertLayout.of(site, first, second, None if bias is None else bias.dtype)


def sizes(index: ExpertIndex) -> dict[str, tuple[int, int]]:
    """For each target that makes the experts smaller: bytes of all of them, and of the largest one.

    Nested precision counts as it is read: in each of its widths.
    """
    found: dict[str, tuple[int, int]] = {}
    for target in get_args(Target):
        to = target_format(target, None)
        if to.code == "bf12" and any(f != _BF16 for l in index.layouts for f in (l.gate_up_format, l.down_format)):
            continue
        layouts = [requantised(site, layout, to) for site, layout in zip(index.sites, index.layouts)]
        forms = {target: layouts}
        if target == "nested":
            forms = {f"nested, {n} bits": [at_level(s, l, n) for s, l in zip(index.sites, layouts)] for n in LEVELS}
        found |= {name: _bytes(index, each) for name, each in forms.items()}
    now = _bytes(index, index.layouts)[0]
    return {name: nbytes for name, nbytes in found.items() if nbytes[0] < now}


def _bytes(index: ExpertIndex, layouts: Sequence[ExpertLayout]) -> tuple[int, int]:
    total = sum(site.num_experts * layout.nbytes for site, layout in zip(index.sites, layouts))
    return total, max(layout.nbytes for layout in layouts)


class Calibration(Protocol):
    """What experts were asked on some text."""

    def inputs(self, layer: int, expert: int) -> Tensor:
        """fp32 [T, H]; T may be 0."""

    def activation(self, layer: int) -> Activation:
        """Between the two matrices of the layer's experts."""


class Requantised:
    """Implements `ExpertStore`. errors: by layer and expert, |rounded - read| / |read| of gate_up and of down.

    calibration: what rounding should disturb least; None = to nearest. output_errors: then the same of what each expert
    answers to its inputs; None where it had none. losses: of nested precision, what each expert is worth and what it
    loses in 2, 3, 4 and 8 bits (offload/nested.py): squares of its answers to the inputs, or of its weights. uses: how
    many inputs these were, 1 of weights.
    """

    def __init__(
        self,
        source: ExpertStore,
        sites: Sequence[ExpertSite],
        to: MatrixFormat,
        calibration: Calibration | None = None,
    ) -> None:
        if calibration is not None and to.block[0] != 1:
            raise ValueError("calibration needs scales of single rows: int8, int4 or mxfp4; fp8 has blocks of rows")
        self.source, self.sites, self.to, self.calibration = source, list(sites), to, calibration
        self.output_errors: list[list[float | None]] = [[None] * n for n in source.num_experts]
        self.num_experts = list(source.num_experts)
        self.layouts = [requantised(site, layout, to) for site, layout in zip(sites, source.layouts)]
        self.errors: list[list[tuple[float, float]]] = [[(0.0, 0.0)] * n for n in self.num_experts]
        self.losses: list[list[tuple[float, list[float]]]] = [[(0.0, [])] * n for n in self.num_experts]
        self.uses = [[1] * n for n in self.num_experts]

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        site, before, after = self.sites[layer], self.source.layouts[layer], self.layouts[layer]
        blob = aligned_bytes(before.nbytes)
        nbytes = self.source.read_into(layer, expert, blob)
        stored, made = before.views(blob[None]), after.views(out[None])
        act = Activation(kind="silu" if site.gated else "relu", gated=site.gated, interleaved=site.interleaved)
        gate_up, down = dequantized(before.weights(stored, act), 0)
        x = h = None
        first_bias, bias = (
            stored[name][0].float() if name in stored else None for name in ("gate_up_bias", "down_bias")
        )
        if self.calibration is not None:
            x, act = self.calibration.inputs(layer, expert), self.calibration.activation(layer)
            h = activation_reference(F.linear(x, gate_up, first_bias), act).float()
        made_first, first_error = self._write(made, "gate_up", gate_up, site, x)
        made_second, second_error = self._write(made, "down", down, site, h)
        self.errors[layer][expert] = first_error, second_error
        if x is not None and h is not None and len(x):
            again = activation_reference(F.linear(x, made_first, first_bias), act).float()
            y, rounded = F.linear(h, down, bias), F.linear(again, made_second, bias)
            self.output_errors[layer][expert] = float((rounded - y).norm() / y.norm().clamp(min=1e-30))
        for name in ("gate_up_bias", "down_bias"):
            if name in stored:
                made[name].copy_(stored[name])
        if self.to.bits:
            answers = partial(_answers, x=x, act=act, biases=(first_bias, bias))
            self.uses[layer][expert] = 1 if x is None else len(x)
            self.losses[layer][expert] = _losses(after, out, act, answers, (gate_up, down))
        if after.not_finite(out) is not None:
            raise ValueError(f"layer {layer}, expert {expert}: weights too large for scales in {self.to.scale_dtype}")
        return nbytes

    def _write(
        self, made: dict[str, Tensor], name: str, w: Tensor, site: ExpertSite, x: Tensor | None
    ) -> tuple[Tensor, float]:
        """w: [parts * n, k], x: its inputs [T, k], both fp32. Returns the rounded matrix and its relative error."""
        parts = site.parts if name == "gate_up" else 1
        is_woven = parts == 2 and site.interleaved
        each = w.unflatten(0, (-1, parts)).transpose(0, 1) if is_woven else w.unflatten(0, (parts, -1))
        if self.to.bits:
            made[f"{name}.bits"].fill_(self.to.bits)
            for part, rows in enumerate(each):
                _place_planes(encode_nested(rows, self.to.block[1], x), made, name, part, is_woven)
            again = self._decoded(made, name, w.shape[1], is_woven)
            return again, _relative(again, w)
        codes, scale = self._encoded(each, x)
        made[name][0] = (codes.transpose(0, 1) if is_woven else codes).flatten(0, 1)
        made[f"{name}.scale"][0] = scale
        again = self._decoded(made, name, w.shape[1], is_woven)
        return again, _relative(again, w)

    def _encoded(self, each: Tensor, x: Tensor | None) -> Encoded:
        """each: [parts, n, k]."""
        code, block, dtype = self.to.code, self.to.block, self.to.scale_dtype
        assert code is not None
        if x is None:
            return encode(each, code, block, dtype)
        codes, scale = encode_calibrated(each.flatten(0, 1), code, block[1], dtype, x)
        return Encoded(codes.unflatten(0, (len(each), -1)), scale.unflatten(0, (len(each), -1)))

    def _decoded(self, made: dict[str, Tensor], name: str, columns: int, is_woven: bool) -> Tensor:
        coding = self.to.coding(made, name)
        assert coding is not None
        return decode(made[name][0], coding, columns, 0, interleaved=is_woven)

    def close(self) -> None:
        self.source.close()


def _relative(again: Tensor, w: Tensor) -> float:
    return float((again - w).double().norm() / w.double().norm().clamp(min=1e-300))


def _place_planes(planes: Sequence[Tensor], made: dict[str, Tensor], name: str, part: int, is_woven: bool) -> None:
    """One part's planes into the views of one blob."""
    ends = ("", ".scale", *(f".{what}{level}" for level in LEVELS[1:] for what in ("codes", "scale")))
    n = len(planes[0])
    rows = slice(part, None, 2) if is_woven else slice(part * n, (part + 1) * n)
    for end, piece in zip(ends, planes):
        view = made[name + end][0]
        view[part if "scale" in end else rows] = piece


def _answers(gate_up: Tensor, down: Tensor, x: Tensor | None, act: Activation, biases: Biases) -> Tensor:
    """What an expert answers to x; where there is none, its weights, which stand for an answer to anything."""
    if x is None:
        return torch.cat((gate_up.flatten(), down.flatten()))
    return F.linear(activation_reference(F.linear(x, gate_up, biases[0]), act).float(), down, biases[1])


def _losses(
    layout: ExpertLayout,
    blob: Tensor,
    act: Activation,
    answers: Callable[[Tensor, Tensor], Tensor],
    exact_weights: tuple[Tensor, Tensor],
) -> tuple[float, list[float]]:
    """(energy, [losses]) of `Sensitivity`. blob: the expert in nested precision, as it is again afterwards."""
    exact, lost = answers(*exact_weights), []
    for bits in LEVELS:
        set_bits(layout, blob, bits)
        read = dequantized(layout.weights(layout.views(blob[None]), act), 0)
        lost.append(float((answers(*read) - exact).double().square().sum()))
    return float(exact.double().square().sum()), lost
