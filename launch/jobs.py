"""A batch file served with its progress shown: what `moe batch`, ranks under torchrun and hosts of Ray share."""

from pathlib import Path

from moe.batch import BatchProgress, finished_batch, run_batch
from moe.config import EngineConfig
from moe.launch.console import err
from moe.launch.progress import batch_progress
from moe.launch.report import progress_text
from moe.llm import LLM


def serve_file(llm: LLM, source: Path, target: Path, *, is_first: bool = True) -> BatchProgress:
    """Runs the file; the first rank shows how far it is and says how it ended. With ranks a collective."""
    with batch_progress(disable=not is_first) as progress:
        task = progress.add_task("", total=None, figures="")

        def show(state: BatchProgress) -> None:
            progress.update(task, total=state.total, completed=state.finished, figures=progress_text(llm.engine))

        state = run_batch(llm, source, target, show)
    if is_first:
        _print_end(state, target)
    return state


def is_served(model: Path, config: EngineConfig, source: Path, target: Path) -> bool:
    """Whether no line of the file is left, which is said then: nothing need be loaded."""
    state = finished_batch(model, config, source, target)
    if state is not None:
        _print_end(state, target)
    return state is not None


def _print_end(state: BatchProgress, target: Path) -> None:
    err.print(
        f"{state.finished} of {state.total} lines are in {target}"
        f" ({state.resumed} from an earlier run, {state.failed} with errors)",
        markup=False,
    )
