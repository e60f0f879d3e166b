"""Modules are imported without the collector of cycles: it looks again and again at what they make, and finds nothing.

Of the seconds that torch and transformers' code of models take it is a quarter. The first look afterwards would take
another half of a second, and so would every full one while a model runs.
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no cycles of objects are looked for in this process.

    Where torch was not imported before, what is alive at the end of the block, modules above all, is not looked at
    later either, but at the process's end; otherwise a model may be alive, which must not outlive its use.
    """
    was_on, is_first = gc.isenabled(), "torch" not in sys.modules
    if is_first:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if is_first and "torch" in sys.modules:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or C++ that counts its objects would call all these lost
        if was_on:
            gc.enable()
