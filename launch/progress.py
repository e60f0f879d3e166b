"""The bar of commands that take long."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe.launch.console import err


def batch_progress(disable: bool = False) -> Progress:
    """A bar with lines done, time left, and what is told beside them as the task's field `figures`."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, console=err, disable=disable)
