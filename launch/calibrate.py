"""The run behind `moe pack --calibrate`."""

from collections.abc import Sequence
from pathlib import Path

from moe.calibrate import ExpertInputs
from moe.config import EngineConfig
from moe.fit import run_observed
from moe.llm import LLM
from moe.texts import read_windows

WINDOW, MOST_WINDOWS = 256, 128  # 32768 tokens: beyond, more text changes little


def expert_inputs(folder: str | Path, texts: Sequence[Path], *, trust_remote_code: bool = False) -> ExpertInputs:
    """Runs the model over the beginnings of all texts. Raises ValueError for a folder or a text that cannot be read."""
    with LLM(folder, EngineConfig(trust_remote_code=trust_remote_code)) as llm:
        if not llm.engine.blueprint.experts:
            raise ValueError(f"{folder} has no experts to calibrate")
        seen = ExpertInputs([found.activation for found in llm.engine.blueprint.experts])
        run_observed(llm, read_windows(llm, texts, WINDOW, MOST_WINDOWS), seen)
    return seen
