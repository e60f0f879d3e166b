"""HiGHS with one thread, silent, and ended by a deadline."""

from math import inf

import highspy

from moe.placement.deadline import Deadline


class _Silent(highspy.Highs):  # type: ignore[misc]
    def enableCallbacks(self) -> None:  # highspy's own, which its constructor calls, and which says hello
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


def quiet_highs(deadline: Deadline) -> highspy.Highs:
    """A new instance. It looks at the deadline where it can be interrupted, and has the time left as its own limit."""
    highs = _Silent()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    if deadline.until < inf:
        highs.setOptionValue("time_limit", max(deadline.left(), 0.0))
        for looks in (highs.cbMipInterrupt, highs.cbSimplexInterrupt, highs.cbIpmInterrupt):
            looks.subscribe(lambda event: event.interrupt() if deadline.is_over() else None)
    return highs
