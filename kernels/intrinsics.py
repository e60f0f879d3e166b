"""What differs between Triton's versions, backends and interpreter, in one place; every kernel is written on these.

The interpreter (TRITON_INTERPRET=1, set before triton is imported) multiplies bfloat16 bit patterns in `tl.dot` and
truncates float32 to bfloat16; `dot` and `cast` repair both, so that interpreted results round like torch's.
Compiled for NVIDIA by Triton 3.6 and 3.7, a release orders only thread 0's stores and an acquire whose result is unused
disappears; `release_*` therefore begin with a barrier and `wait_*` acquire inside the loop's condition.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Functions that kernels call. Interpreted, a nested triton.jit function would patch triton.language again at every call
# (3 ms); a plain function sees the same patched operations.
device_function = (lambda fn: fn) if INTERPRETED.value else triton.jit

_TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def tl_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a torch dtype; `ValueError` for what the expert kernels do not compute in."""
    if dtype not in _TL_DTYPES:
        raise ValueError(f"expert kernels compute in float32, float16 or bfloat16, not {dtype}; convert the tensor")
    return _TL_DTYPES[dtype]


def is_interpreted() -> bool:
    """Whether this process interprets kernels on the CPU instead of compiling them."""
    return bool(INTERPRETED.value)


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Compile options of a launch; contraction of a*b+c is off so that sums round as torch's do."""
    if is_interpreted():
        return {}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}


def check_device(tensor: torch.Tensor) -> None:
    """`ValueError` unless kernels can run on this tensor: a GPU, or the CPU under the interpreter."""
    if tensor.device.type != ("cpu" if is_interpreted() else compiled_device()):
        mode = "interprets" if is_interpreted() else "compiles"
        raise ValueError(
            f"this process {mode} Triton kernels but the tensor is on {tensor.device}; "
            "set TRITON_INTERPRET=1 before importing triton for the CPU, unset it for a GPU"
        )


def compiled_device() -> str:
    """The type of device that compiled kernels run on: as Triton's driver says, "cuda" where there is none.

    The compile gate puts a driver there that launches nothing, whose tensors lie on the CPU.
    """
    try:
        return str(driver.active.get_active_torch_device().type)
    except RuntimeError:  # no GPU: any tensor is refused, with the remedy
        return "cuda"


@device_function
def dot(a, b, acc):
    """acc + a @ b in float32. Both operands have one dtype; float32 is multiplied without tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        if a.dtype == tl.float32:
            return tl.dot(a, b, acc, input_precision="ieee")
        else:
            return tl.dot(a, b, acc)


@device_function
def cast(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        quiet = (bits >> 16).to(tl.uint16) | 0x40  # rounding must not carry a NaN into infinity
        return tl.where(x != x, quiet, rounded).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@device_function
def same_dtype(a, b):
    """Both tiles in one dtype: their own when equal, that of `a` when b is of 8 bits (exact), else float32."""
    if a.dtype == b.dtype:
        return a, b
    elif b.dtype.primitive_bitwidth == 8:
        if INTERPRETED:  # `dot` widens there anyway
            return a, b.to(tl.float32)
        else:
            return a, b.to(a.dtype)
    else:
        return a.to(tl.float32), b.to(tl.float32)


@device_function
def peer_pointer(bases, rank, offset, DTYPE: tl.constexpr):
    """Pointer(s) to `offset` bytes (int64) inside the heap of `rank` (scalar or block)."""
    return (tl.load(bases + rank) + offset).to(tl.pointer_type(DTYPE))


@device_function
def wait_at_least(ptr, want, error, code, limit, SCOPE: tl.constexpr):
    """Acquire *ptr once it has reached `want` (int32, wrap-around safe).

    After `limit` polls, or at once when an error is already set, `code` is or-ed into *error and the wait ends.
    """
    polls = tl.where(tl.load(error) == 0, 0, limit)
    while ((tl.atomic_add(ptr, 0, sem="acquire", scope=SCOPE) - want) < 0) & (polls <= limit):
        polls += 1
    if polls > limit:
        tl.atomic_or(error, code, sem="relaxed", scope="gpu")


@device_function
def wait_all(ptrs, want, mask, error, code, limit, EXACT: tl.constexpr, N: tl.constexpr, SCOPE: tl.constexpr):
    """`wait_at_least` for a block of N pointers at once; EXACT: until they equal `want`."""
    zero = tl.zeros((N,), tl.int32)
    polls = tl.where(tl.load(error) == 0, 0, limit)
    while (_num_unready(tl.atomic_add(ptrs, zero, mask=mask, sem="acquire", scope=SCOPE), want, mask, EXACT) > 0) & (
        polls <= limit
    ):
        polls += 1
    if polls > limit:
        tl.atomic_or(error, code, sem="relaxed", scope="gpu")
    tl.debug_barrier()


@device_function
def _num_unready(value, want, mask, EXACT: tl.constexpr):
    if EXACT:
        return tl.sum(((value != want) & mask).to(tl.int32), 0)
    else:
        return tl.sum((((value - want) < 0) & mask).to(tl.int32), 0)


@device_function
def release_add(ptrs, value, mask, SCOPE: tl.constexpr):
    """Add `value` where `mask`, after every store that this program has made."""
    tl.debug_barrier()
    tl.atomic_add(ptrs, value, mask=mask, sem="release", scope=SCOPE)


@device_function
def release_set(ptrs, value, mask, SCOPE: tl.constexpr):
    """Store `value` where `mask`, after every store that this program has made."""
    tl.debug_barrier()
    tl.atomic_xchg(ptrs, value, mask=mask, sem="release", scope=SCOPE)


@device_function
def activate(gate, up, KIND: tl.constexpr, GATED: tl.constexpr, alpha, limit):
    """`Activation` in float32; `gate` is ignored unless GATED."""
    if KIND == "gpt_oss":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * (gate * tl.sigmoid(alpha * gate))
    else:
        if GATED:
            return _nonlinear(gate, KIND) * up
        else:
            return _nonlinear(up, KIND)


@device_function
def _nonlinear(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh z) / 2 = sigmoid(2 z)
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(KIND == "relu2", "unknown activation")
        positive = tl.maximum(x, 0.0)
        return positive * positive
