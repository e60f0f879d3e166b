"""The first run on a machine, or on a disk, measures for some seconds what its automatic choices start from."""

import os
from pathlib import Path

from moe.config import EngineConfig
from moe.engine.known import probed
from moe.kernels.cpu import instruction_sets
from moe.launch.console import err, say_who_measures
from moe.models.blueprint import read_blueprint
from moe.placement.machine import disk_of, lacks, measures_alone, save_machine

LEAST_BYTES = 256 << 20  # of experts: nobody waits for the reads of smaller models


def measure_first_run(model: Path, config: EngineConfig) -> None:
    """Measures and keeps figures where nothing is known of this machine, or of the disk that `model` lies on.

    Does nothing with `probe_first_run=false`, for models of less than 256 MiB of experts, without the compiled kernels,
    or where experts are not read from files. Raises ValueError for a folder that cannot be served.
    """
    if not config.probe_first_run or config.offload.store != "file" or not instruction_sets():
        return
    if not lacks(probed(config), disk_of(model)):
        return
    blueprint = read_blueprint(model, trust_remote_code=config.trust_remote_code)
    if blueprint.expert_bytes < LEAST_BYTES:
        return
    from moe.launch.measure import probe_first  # loads the engine's parts that no other run measures

    where = config.probe_path
    said = "measuring this machine once, for some seconds (`moe probe` does it whole; probe_first_run=false: never) …"
    err.print(said, style="dim", markup=False)
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(where.parent, os.W_OK):
            raise PermissionError(f"{where.parent} cannot be written")
        largest = max(blueprint.index.files(), key=lambda file: file.stat().st_size)
        nbytes = max(layout.nbytes for layout in blueprint.index.layouts)
        with measures_alone(where, say_who_measures):
            if lacks(probed(config), disk_of(model)):  # still
                save_machine(where, probe_first(largest, nbytes, probed(config)))
    except OSError as error:
        err.print(f"note: nothing was measured, defaults stand: {error}", style="yellow", markup=False)
