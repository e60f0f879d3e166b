"""`moe demo`: a small real model with a quarter of its experts in memory, beside the same model whole."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe.config import EngineConfig
from moe.engine.engine import Engine
from moe.launch.report import hit_rate
from moe.llm import LLM
from moe.metrics import shown
from moe.outputs import RequestOutput
from moe.params import SamplingParams
from moe.verify import answer, compare

PROMPTS = (
    "Once upon a time, there was a little girl named",
    "Once upon a time, there was a boy named Tom. He had a red ball.",
    "ROMEO:\nO, she doth teach",
    "    def read(self, size=-1):\n        if self.closed:\n            raise",
)


def run_demo(model: Path, config: EngineConfig, console: Console) -> int:
    """Prints the texts and the comparison. Returns 1 if a single token differs."""
    params = SamplingParams(max_tokens=64)
    whole = config.with_budget("1.0")
    runs = []
    for one in (config, whole):
        with LLM(model, one) as llm:
            runs.append((answer(llm, PROMPTS, params), _row(llm.engine)))
    (served, quarter), (full, everything) = runs
    for output in served.outputs:
        _print_text(output, console)
    result = compare(served, full)
    console.print(_table(quarter, everything))
    console.print(f"\n{result}", markup=False)
    return 0 if result.num_equal == result.num_tokens else 1


def _print_text(output: RequestOutput, console: Console) -> None:
    console.print(output.prompt, style="bold", end="", markup=False)
    console.print(output.outputs[0].text + "\n", markup=False)


def _row(engine: Engine) -> list[str]:
    state = engine.state()
    return [
        f"{state.slots} of {state.experts}",
        shown(state.slot_bytes, "bytes"),
        f"{hit_rate(engine):.1%}",
        shown(sum(s.bytes_read for s in engine.layer_stats()), "bytes"),
        f"{engine.stats.decode_rate:.0f}",
    ]


def _table(quarter: list[str], everything: list[str]) -> Table:
    table = Table("", "experts in slots", "slot memory", "hit rate", "read from disk", "decode tokens/s", box=None)
    table.add_row("a quarter in memory", *quarter)
    table.add_row("everything in memory", *everything)
    return table
