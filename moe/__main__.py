"""`python -m moe`: the command `moe`."""

import sys

from moe.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
