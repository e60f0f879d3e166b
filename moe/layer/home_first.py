"""Which of a layer's experts a rank computes before the results that others wait for go home, and which after.

    rows of others  ─┐                       ┌─▶ home ─── on the way ───┐
                     ├─ experts they ask for ┤                          ├─▶ Σ_k w·y
    own rows        ─┘                       └─ experts that only own rows ask for ─┘

An expert is computed once for all of its rows, so that nothing is read twice: own rows that share an expert with others
go with them. What is left over costs one more call of the kernel, and is worth it from `LATER_BYTES` of weights on.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LATER_BYTES = 2 << 20  # read in about 0.1 ms; a call costs 0.02 to 0.03

Ids = npt.NDArray[np.int64]


class HomeFirst(NamedTuple):
    """num_first: rows that others wait for, the first ones; least_later: experts that are worth a turn of their own."""

    num_first: int
    least_later: int

    def turns(self, asked: Ids) -> tuple[Ids, Ids]:
        """Distinct experts of the first rows, and those that only other rows ask for. asked: [T, K], -1 = none."""
        is_asked = np.zeros((2, int(asked.max(initial=-1)) + 2), np.bool_)  # id -1 is the last
        is_asked[0, asked[: self.num_first]] = True
        is_asked[1, asked[self.num_first :]] = True
        is_asked[1] &= ~is_asked[0]
        first, later = is_asked[:, :-1]
        return np.flatnonzero(first), np.flatnonzero(later)
