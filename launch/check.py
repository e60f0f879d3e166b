"""`moe info --check`: reads everything and says what is damaged."""

from pathlib import Path

from moe.launch.console import err, out
from moe.launch.progress import batch_progress
from moe.models.blueprint import read_blueprint
from moe.offload.check import check_folder


def check(model: Path, *, trust_remote_code: bool) -> int:
    """Prints what is damaged; 1 if anything is. Raises ValueError for a folder that cannot be served."""
    blueprint = read_blueprint(model, trust_remote_code=trust_remote_code)
    with batch_progress() as progress:
        task = progress.add_task("", total=blueprint.num_experts, figures="experts read")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = list(check_folder(blueprint.checkpoint, blueprint.index, show))
    for sentence in found:
        err.print(sentence, style="red", markup=False)
    kind = "against their checksums" if blueprint.checkpoint.packed else "and could be read"
    out.print(
        f"{blueprint.folder}: {len(found)} faults; {blueprint.num_experts} experts were read {kind}", markup=False
    )
    return 1 if found else 0
