"""How many expert slots a budget buys."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from moe.offload.slot_runs import slab_bytes

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
_EXPERTS = re.compile(r"(\d+)( *experts?)?", re.IGNORECASE)


class Budget(NamedTuple):
    kind: Literal["bytes", "experts", "fraction"]
    value: float


def parse_budget(text: str | int | float, name: str = "offload.budget") -> Budget:
    """ "6GiB" or "800 MB" are bytes (MB = 10^6), "64" or "64 experts" experts, "0.25" or "25%" a fraction of them all.

    Numbers mean the same as their text: 64 experts, 0.25 a fraction, 1.0 all of them. A bare 1 is refused: it reads as
    one expert and as all of them; "1 expert" and 1.0 do not. Raises ValueError for anything else, too, which names the
    option or setting `name`.
    """
    written = str(text).strip()
    if match := _BYTES.fullmatch(written):
        number, unit, binary = match[1], match[2].upper(), match[3]
        power = "KMGT".find(unit) + 1 if unit else 0
        return Budget("bytes", float(number) * (_UNITS[unit] if binary or not unit else 1000**power))
    if match := _EXPERTS.fullmatch(written):
        if float(match[1]) == 1 and not match[2]:
            raise ValueError(
                f"{name} {written} could be one expert or all of them: a whole number is a number of experts, "
                "a fraction needs a point or a %; give 1.0 or 100% for all, '1 expert' for one"
            )
        return Budget("experts", float(match[1]))
    percent = written.removesuffix("%")
    try:
        value = float(percent) / (100 if percent != written else 1)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:
        return Budget("fraction", value)
    raise ValueError(
        f"{name} {written[:40]!r} is not understood; give bytes (6GiB), a number of experts (64) or a fraction "
        "of them (0.25 or 25%, at most 1.0)"
    )


def format_bytes(nbytes: float) -> str:
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    power = next((p for p in (1, 2, 3) if nbytes < 1024 ** (p + 1)), 4)
    return f"{nbytes / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def resolve_slots(
    budget: str | int | float | None,
    *,
    sizes: Sequence[int],
    counts: Sequence[int],
    available_bytes: int | None = None,
) -> int:
    """Number of expert slots that `budget` buys, never above the number of experts.

    sizes: bytes of an expert, counts: experts, both by layer; slots of several sizes share the budget as `slot_runs`
    says. available_bytes: what is free after dense weights and KV cache; it is the budget when `budget` is None, and
    then required. A fraction is rounded down to whole experts, but a fraction > 0 buys one at least. Raises ValueError
    for a budget below the largest expert, or one that is larger than `available_bytes`.
    """
    assert min(sizes) > 0, sizes
    total, largest = sum(counts), max(sizes)
    assert total > 0, counts
    one = f"1 expert ({format_bytes(largest)})"
    if budget is None:
        if available_bytes is None:
            raise ValueError("the available memory is not known; set offload.budget")
        if available_bytes < largest:
            raise ValueError(
                "the memory left for experts after dense weights and KV cache "
                f"({format_bytes(max(0, available_bytes))}) must be >= {one}; lower batch.kv_tokens or free memory"
            )
        return slots_within(available_bytes, sizes, counts)
    kind, value = parse_budget(budget)
    if kind == "bytes":
        slots = slots_within(value, sizes, counts)
    elif kind == "fraction":
        slots = max(int(value * total + 1e-9), 1 if value > 0 else 0)
    else:
        slots = int(min(value, total))
    if slots < 1:
        raise ValueError(f"the memory for experts ({budget}) must be >= {one}; raise offload.budget")
    nbytes = slab_bytes(sizes, counts, slots)
    if available_bytes is not None and nbytes > available_bytes:
        raise ValueError(
            f"offload.budget ({budget} = {format_bytes(nbytes)}) is more than the memory left after dense "
            f"weights and KV cache ({format_bytes(max(0, available_bytes))}); lower it, or batch.kv_tokens"
        )
    return slots


def slots_within(nbytes: float, sizes: Sequence[int], counts: Sequence[int]) -> int:
    """The most slots whose slab is no larger; 0 where one is. sizes, counts: by layer, as of `resolve_slots`."""
    total = sum(counts)
    mean = sum(size * count for size, count in zip(sizes, counts)) / total
    slots = int(min((nbytes + sum(set(sizes))) / mean, total))  # a share is rounded by less than a slot of each size
    while slots and slab_bytes(sizes, counts, slots) > nbytes:
        slots -= 1
    return slots
