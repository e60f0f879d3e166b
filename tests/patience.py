"""How long a test waits for what must come: longer than any pause of a busy machine, so that only a hang takes it.

A limit that the product is to keep, or to run into, stands in the test; where one is *not* to be run into, it is longer
than this, so that the test ends by this one and asserts no time.
"""

import time
from collections.abc import Callable

PATIENCE_S = 600.0
NEVER_S = 100 * PATIENCE_S  # a limit of the product that is not to be run into


def until(
    condition: Callable[[], object],
    look: Callable[[], object] = lambda: time.sleep(0.01),
    told: Callable[[], object] = lambda: "it does not come",
) -> None:
    """Look until the condition holds. Raises AssertionError with `told()` after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, told()
        look()
