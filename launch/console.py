"""Where commands write: answers to standard output, everything about the run to standard error."""

import os
import sys

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader that has seen enough is no failure, whoever prints: the caller's rule, in place of exit status 1."""
        raise BrokenPipeError


# A process that was started with its output closed has none: what it prints goes nowhere.
sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
out = _Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = _Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, width=None if sys.stderr.isatty() else 120)


def say_who_measures() -> None:
    """What `measures_alone` is told to say."""
    err.print("another process measures this machine; waiting until it has …", style="dim", markup=False)
