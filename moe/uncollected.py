"""Modules are imported without the collector of cycles: it looks again and again at what they make, and finds nothing.

Of the seconds that torch and transformers' code of models take it is a quarter.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no cycles of objects are looked for in this process; afterwards they are as before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
