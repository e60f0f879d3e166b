"""Where commands write: answers to standard output, everything about the run to standard error."""

import sys

from rich.console import Console

out = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, width=None if sys.stderr.isatty() else 120)
