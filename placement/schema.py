"""Checks what a JSON file holds at the border, so that a damaged one is one sentence and never a crash further in."""

import math
from collections.abc import Mapping
from typing import Any

Kinds = tuple[type, ...]
NUMBER: Kinds = (int, float)


def checked(where: str, fields: Any, kinds: Mapping[str, Kinds]) -> dict[str, Any]:
    """`fields` as a dictionary that has exactly these names, each of one of its kinds.

    A bool is no number. Raises ValueError that names the file, the field and what was found.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds a {type(fields).__name__}, not an object with fields")
    missing, unknown = sorted(kinds.keys() - fields.keys()), sorted(map(str, fields.keys() - kinds.keys()))
    if missing or unknown:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    for name, wanted in kinds.items():
        value = fields[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in wanted)
            raise ValueError(f"{where}: {name} is a {type(value).__name__}, it must be {names}")
    return dict(fields)


def integers(where: str, name: str, value: list[Any], *, axes: int = 1) -> list[Any]:
    """`value`, a list of integers, or with axes=2 of equally long lists of them. Raises ValueError for others."""
    rows = value if axes == 2 else [value]
    if any(not isinstance(row, list) for row in rows) or len({len(row) for row in rows}) > 1:
        raise ValueError(f"{where}: {name} must be rows of one length")
    if any(not isinstance(n, int) or isinstance(n, bool) or abs(n) >= 1 << 63 for row in rows for n in row):
        raise ValueError(f"{where}: {name} must hold integers")
    return value


def numbers(where: str, name: str, value: list[Any], count: int) -> list[float]:
    """So many finite numbers. Raises ValueError for anything else."""
    found = [float(n) for n in value if isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n)]
    if len(found) != count or len(value) != count:
        raise ValueError(f"{where}: {name} must be {count} numbers, it is {str(value)[:80]}")
    return found
