"""A stage of Ray Data that answers prompts: offline batches of any size, read and written as Ray Data does.

    dataset.map_batches(Answers, fn_constructor_args=("model",), batch_size=64, concurrency=2)

Each of the `concurrency` actors has the whole model, with its experts in slots; a row depends on no other. Reading and
writing take cores too: where the actors have all that the cluster has (`num_cpus` each, 1 by default), nothing begins.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.config import EngineConfig
from moe.llm import LLM
from moe.params import SamplingParams

Columns = dict[str, NDArray[Any]]


class Answers:
    """settings: as `EngineConfig.load` takes them (`offload.budget=0.25`). column: of prompts, text or token
    ids. sampling: fields of SamplingParams, over what the model recommends.

    Adds the columns answer (text), answer_tokens (lists of ids), finish_reason, and error (None, or why this row has no
    answer: the others have theirs). Raises ValueError for a model or a setting that cannot be served.
    """

    def __init__(
        self, model: str | Path, settings: tuple[str, ...] = (), *, column: str = "prompt", **sampling: Any
    ) -> None:
        self.llm = LLM(model, EngineConfig.load(None, settings))
        self.column, self.params = column, SamplingParams(**{**self.llm.recommended, **sampling})

    def __call__(self, batch: Columns) -> Columns:
        if self.column not in batch:
            raise ValueError(f"no column {self.column!r} in {', '.join(batch)}; give the one of the prompts, column=")
        rows = [row if isinstance(row, str) else [int(token) for token in row] for row in batch[self.column]]
        errors = [self._why_not(row) for row in rows]
        good = [row for row, error in zip(rows, errors) if error is None]
        answers = iter(self.llm.generate(good, self.params, use_tqdm=False) if good else ())
        found = [None if error is not None else next(answers).outputs[0] for error in errors]
        return {
            **batch,
            "answer": _objects(["" if one is None else one.text for one in found]),
            "answer_tokens": _objects([[] if one is None else one.token_ids for one in found]),
            "finish_reason": _objects(["error" if one is None else one.finish_reason for one in found]),
            "error": _objects([error if one is None else one.error for one, error in zip(found, errors)]),
        }

    def _why_not(self, prompt: str | list[int]) -> str | None:
        try:
            self.llm.engine.check_request(self.llm.encode(prompt), self.params)
        except ValueError as error:
            return str(error)
        return None


def _objects(values: list[Any]) -> NDArray[Any]:
    """A column of any Python values: numpy would make lists of one length a table."""
    column = np.empty(len(values), object)
    column[:] = values
    return column
