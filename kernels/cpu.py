"""Expert compute on CPUs through the compiled helper `_cpu_experts` (cpu_experts.c), one call per layer.

Storage stays fp32, bf16, fp16 or the codes of kernels/formats.py, which become numbers in registers; all arithmetic is
fp32, on every x86-64 (AVX-512, AVX2 or neither, chosen at run time) and on aarch64. It wins over torch wherever weights
are read from memory, and in bf16 at any number of tokens (bench/results/experts_cpu_intel.md).

A token's result does not depend on the other tokens, their number, the slot numbers or the number of threads: bit for
bit. It rounds where kernels/reference.py says. Threads: `torch.set_num_threads`. The GIL is released.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from moe.kernels.cpu_struct import BLOCK, CHOICE, KINDS, MATRIX, MOST_COLUMNS, STAGE, STEP, pack_matrix
from moe.kernels.reference import (
    bad_slot,
    check_expert_input,
    check_expert_weights,
    combine_reference,
    experts_reference,
)
from moe.kernels.weights import ExpertWeights

log = logging.getLogger(__name__)

_INTEGERS = {torch.int32: 0, torch.int64: 1}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "gpt_oss": 5}
_LAYER = Struct(f"={2 * MATRIX.size}s4q2f")  # struct layer: two matrices, slots, gated, interleaved, act, alpha, limit
_CALL = Struct("=12q")  # struct call


@cache
def load_helper() -> ctypes.CDLL | None:
    """The compiled helper, or None where it is absent or cannot run; the reason is logged, once."""
    folder = Path(__file__).resolve().parent
    files = sorted(folder.glob("_cpu_experts*.so"))
    try:
        if not files:
            raise OSError(
                f"no _cpu_experts*.so in {folder}; it is compiled at installation (of a checkout: pip install -e .), "
                "which needs gcc or clang"
            )
        helper = ctypes.CDLL(str(files[0]))
        sizes = {
            "moe_cpu_abi": (_LAYER, _CALL),
            "moe_cpu_block_abi": (BLOCK, STEP),
            "moe_cpu_layers_abi": (STAGE, STEP),
            "moe_cpu_choice_abi": (MATRIX, CHOICE),
        }
        if any(not hasattr(helper, n) or getattr(helper, n)() != 1000 * a.size + b.size for n, (a, b) in sizes.items()):
            raise OSError(f"{files[0].name} was compiled from other sources; reinstall")
    except OSError as error:
        log.warning("experts on the CPU run in plain torch, several times slower: %s", error)
        return None
    helper.moe_cpu_experts.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
    helper.moe_cpu_experts.restype = ctypes.c_int64
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    helper.moe_cpu_linear.argtypes = [ctypes.c_char_p, pointer, integer, integer, integer, pointer, integer, integer]
    helper.moe_cpu_linear.restype = integer
    helper.moe_cpu_expected.argtypes = [
        *(ctypes.c_char_p, pointer, integer, integer, integer, integer),
        *(ctypes.c_float, pointer, pointer, integer, integer),
    ]
    helper.moe_cpu_expected.restype = integer
    helper.moe_cpu_shorten.argtypes = [pointer, *[integer] * 4, pointer, pointer, integer]
    helper.moe_cpu_shorten.restype = integer
    helper.moe_cpu_choose.argtypes = [ctypes.c_char_p, ctypes.c_char_p, integer, integer]
    helper.moe_cpu_choose.restype = integer
    helper.moe_cpu_rms_norm.argtypes = [*[pointer] * 3, *[integer] * 3, ctypes.c_float, integer]
    helper.moe_cpu_rms_norm.restype = None
    helper.moe_cpu_block.argtypes, helper.moe_cpu_block.restype = [ctypes.c_char_p, ctypes.c_char_p], integer
    helper.moe_cpu_layers.argtypes = [ctypes.c_char_p, integer, ctypes.c_char_p, pointer, pointer]
    helper.moe_cpu_layers.restype = integer
    helper.moe_cpu_block_work.argtypes, helper.moe_cpu_block_work.restype = [ctypes.c_char_p, integer, integer], integer
    helper.moe_cpu_isa.argtypes, helper.moe_cpu_isa.restype = [ctypes.c_int64], ctypes.c_char_p
    return helper


def instruction_sets() -> list[str]:
    """What the helper can use on this machine, best first; empty without a helper."""
    helper = load_helper()
    names: list[str] = []
    while helper is not None and (name := helper.moe_cpu_isa(len(names))) is not None:
        names.append(name.decode())
    return names


@cache
def _say_custom_is_slow() -> None:
    log.warning("experts with a custom activation run in plain torch: the compiled helper cannot call Python")


class CpuExperts:
    """The experts of one layer, ready to be called: addresses and shapes are looked up once.

    Holds the tensors of `weights`; their contents may change between calls, their addresses may not.
    `isa`: index into `instruction_sets()`, for tests. Raises ValueError if the tensors do not fit together.
    """

    def __init__(self, weights: ExpertWeights, *, isa: int = 0) -> None:
        check_expert_weights(weights)
        columns = weights.hidden_size, weights.intermediate_size
        if weights.gate_up.device.type != "cpu" or (weights.formats != {"float"} and max(columns) > MOST_COLUMNS):
            raise ValueError(
                f"expert weights of {columns} columns are on {weights.gate_up.device}; CPU experts need them on cpu, "
                f"and at most {MOST_COLUMNS} columns of codes"
            )
        self.weights = weights
        self._isa = isa
        self.packed = b""  # struct layer; empty without a helper
        self._slots, self._hidden = len(weights.gate_up), weights.hidden_size
        self._helper = load_helper()
        if weights.activation.kind == "custom":
            self._helper = None
            _say_custom_is_slow()
        if self._helper is not None:
            a = weights.activation
            interleaved = a.gated and a.interleaved
            up, down = weights.gate_up_coding, weights.down_coding
            self.packed = _LAYER.pack(
                pack_matrix(weights.gate_up, weights.gate_up_bias, up, columns[0], interleaved=interleaved)
                + pack_matrix(weights.down, weights.down_bias, down, columns[1]),
                *(self._slots, a.gated, interleaved, _ACTIVATIONS[a.kind], a.alpha, a.limit),
            )
            self._run = self._helper.moe_cpu_experts

    def experts(self, x: Tensor, slot_ids: Tensor, out_y: Tensor | None = None) -> Tensor:
        """y[t, k] = expert(slot_ids[t, k])(x[t]), 0 where slot_ids is -1, and where it is LEFT what `out_y` has.

        x: [T, H] fp32, bf16 or fp16; slot_ids: int [T, K]; T may be 0. Returns y [T, K, H] in fp32, of values that
        x's dtype holds, `out_y` if given (contiguous). Raises ValueError for a slot that does not exist.
        """
        rows = self._check(x, slot_ids, out_y)
        if self._helper is None:
            return experts_reference(x, slot_ids, self.weights, out_y)
        y = torch.empty((*rows, self._hidden), dtype=torch.float32) if out_y is None else out_y
        self._call(x, slot_ids, None, y, out_y)
        return y

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor, y: Tensor | None = None) -> Tensor:
        """out[t] = Σ_k topk_weights[t, k] · y[t, k] in the order of k, in fp32, rounded once to the dtype of x.

        The same bits as `combine_reference(self.experts(x, slot_ids, y), topk_weights, x.dtype)`, without y in memory
        of the caller; y: as `experts` gave it, if there are LEFT pairs; changed. topk_weights: [T, K] fp32, bf16 or
        fp16. Returns [T, H].
        """
        rows = self._check(x, slot_ids, y)
        if topk_weights.shape != rows or topk_weights.dtype not in KINDS:
            found = f"{topk_weights.dtype} {tuple(topk_weights.shape)}"
            raise ValueError(f"topk_weights is {found}; it must be float32, bfloat16 or float16 {tuple(rows)}")
        if self._helper is None:
            return combine_reference(experts_reference(x, slot_ids, self.weights, y), topk_weights, x.dtype)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._call(x, slot_ids, topk_weights, out, y)
        return out

    def _check(self, x: Tensor, slot_ids: Tensor, y: Tensor | None) -> torch.Size:
        """The shape of slot_ids. One pass over what is mostly right: a call costs microseconds, and so would more."""
        shape, rows = x.shape, slot_ids.shape
        fits = len(shape) == 2 and len(rows) == 2 and shape[0] == rows[0] and shape[1] == self._hidden
        if not (fits and x.dtype in KINDS and slot_ids.dtype in _INTEGERS):
            check_expert_input(x, slot_ids, self.weights)
        if not (x.is_cpu and slot_ids.is_cpu):
            raise ValueError(f"x is on {x.device}, slot_ids on {slot_ids.device}; CPU experts need both on cpu")
        if y is not None and (y.shape != (*rows, self._hidden) or y.dtype != torch.float32 or not y.is_contiguous()):
            raise ValueError(f"y is {y.dtype} {tuple(y.shape)}; it must be float32 {(*rows, self._hidden)}, contiguous")
        return rows

    def _call(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor | None, out: Tensor, y: Tensor | None) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        slot_ids = slot_ids.contiguous()
        weights_at = weights_kind = 0
        if topk_weights is not None:
            topk_weights = topk_weights.contiguous()
            weights_at, weights_kind = topk_weights.data_ptr(), KINDS[topk_weights.dtype]
        kind = KINDS[x.dtype]
        call = _CALL.pack(
            *(x.data_ptr(), x.stride(0) * (4 if kind == 0 else 2), kind, slot_ids.data_ptr()),
            *(_INTEGERS[slot_ids.dtype], weights_at, weights_kind, *slot_ids.shape, out.data_ptr()),
            *(0 if y is None else y.data_ptr(), torch.get_num_threads()),
        )
        status: int = self._run(self.packed, call, self._isa)
        if status < 0:
            raise MemoryError(f"no scratch memory, or no thread, for {tuple(slot_ids.shape)} rows of experts")
        if status:
            slot = int(slot_ids.view(-1)[status - 1])
            raise ValueError(bad_slot(slot, self._slots))
