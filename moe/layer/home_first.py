"""Which of a layer's experts a rank computes before the results that others wait for go home, and which after.

    rows of others  ─┐                       ┌─▶ home ─── on the way ───┐
                     ├─ experts they ask for ┤                          ├─▶ Σ_k w·y
    own rows        ─┘                       └─ experts that only own rows ask for ─┘

An expert is computed once for all of its rows, so that no weight is read twice: own rows that share an expert with
others go with them. What is left over costs one more call of the kernel. It pays where results travel between nodes:
what a link takes is then computed through, up to the time of those experts. It does not where all ranks are of one
node, through whose memory results are there at once: what one rank waits for, it leaves of the memory's speed to the
other. Measured in docs/comm.md.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LATER_BYTES = 2 << 20  # of weights, from which on they are worth a call: below, a link of 1 ms did not make up for it

Ids = npt.NDArray[np.int64]


class HomeFirst(NamedTuple):
    """num_first: rows that others wait for, which are the first; least_later: experts that are worth another call."""

    num_first: int
    least_later: float

    def turns(self, asked: Ids) -> tuple[Ids, Ids]:
        """Distinct experts of the first rows, and those that only other rows ask for. asked: [T, K], -1 = none."""
        is_asked = np.zeros((2, int(asked.max(initial=-1)) + 2), np.bool_)  # id -1 is the last
        is_asked[0, asked[: self.num_first]] = True
        is_asked[1, asked[self.num_first :]] = True
        is_asked[1] &= ~is_asked[0]
        first, later = is_asked[:, :-1]
        return np.flatnonzero(first), np.flatnonzero(later)
