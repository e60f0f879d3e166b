"""`moe demo`: a small real model with a quarter of its experts in memory, beside the same model whole."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe.config import EngineConfig
from moe.launch.report import RunReport, run_report
from moe.llm import LLM
from moe.offload.budget import format_bytes
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
            runs.append((answer(llm, PROMPTS, params), run_report(llm.engine)))
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


def _table(quarter: RunReport, everything: RunReport) -> Table:
    table = Table("", "experts in slots", "slot memory", "hit rate", "read from disk", "decode tokens/s", box=None)
    for name, r in (("a quarter in memory", quarter), ("everything in memory", everything)):
        table.add_row(
            name,
            f"{r.slots} of {r.num_experts}",
            format_bytes(r.slot_bytes),
            f"{r.hit_rate:.1%}",
            format_bytes(r.bytes_read),
            f"{r.decode_rate:.0f}",
        )
    return table
