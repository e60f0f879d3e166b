"""The compiled helper of this folder (`serve.c`, `solve/*.c`): built at installation, loaded with ctypes."""

import ctypes
import logging
from functools import cache
from pathlib import Path
from struct import Struct

log = logging.getLogger(__name__)

SCHEDULE = "2q4dq"  # struct Schedule of solve/pace.h
ANNEAL = Struct(f"=7q{SCHEDULE}3d4q")  # struct Problem of solve/anneal.c
ASSIGN = Struct(f"=7q4d{SCHEDULE}7q")  # struct Assign of solve/assign.c
BEST_SWAPS = Struct("=7q3d8q")  # struct Swaps of solve/best_swaps.c
SERVE = Struct("=6q5q")  # struct Serve of serve.c
MOST_RANKS = 64
MOST_TOP = 64


@cache
def load_helper() -> ctypes.CDLL | None:
    """The library, or None where it is absent or of other sources; the reason is logged, once."""
    folder = Path(__file__).resolve().parent
    files = sorted(folder.glob("_placement*.so"))
    try:
        if not files:
            raise OSError(
                f"no _placement*.so in {folder}; it is compiled at installation (of a checkout: pip install -e .), "
                "which needs gcc or clang"
            )
        helper = ctypes.CDLL(str(files[0]))
        try:
            parts = (helper.moe_anneal_abi, helper.moe_assign_abi, helper.moe_best_swaps_abi, helper.moe_serve_abi)
            sizes = [part() for part in parts]
        except AttributeError:
            sizes = []
        if sizes != [ANNEAL.size, ASSIGN.size, BEST_SWAPS.size, SERVE.size]:
            raise OSError(f"{files[0].name} was compiled from other sources; reinstall")
    except OSError as error:
        log.warning("experts are placed and served in numpy, slower and with less gain: %s", error)
        return None
    helper.moe_assign.argtypes, helper.moe_assign.restype = [ctypes.c_char_p], ctypes.c_double
    helper.moe_anneal.argtypes, helper.moe_anneal.restype = [ctypes.c_char_p], ctypes.c_double
    helper.moe_best_swaps.argtypes, helper.moe_best_swaps.restype = [ctypes.c_char_p], ctypes.c_int64
    helper.moe_serve.argtypes, helper.moe_serve.restype = [ctypes.c_char_p], ctypes.c_int64
    return helper
