"""`python -m moe`: the command `moe`."""

from moe.launch.cli import command

if __name__ == "__main__":
    command()
