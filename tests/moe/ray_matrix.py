"""Four, then three, then two actors of a Ray cluster say what one process says: by model, dispatcher and budget.

One set of actors a case; they join another generation for each number of hosts. `test_cluster.py` runs a sample; as a
program it runs all and writes the table:

    python -m tests.moe.ray_matrix bench/results/hosts_matrix.md
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe.llm import LLM
from tests.families import tiny_checkpoint
from tests.moe.ray_session import DEMO, config_of, two_nodes, until
from tests.moe.test_expert_hosts import params_of
from tests.moe.test_parallel import prompts_of

HOSTS = (4, 3, 2)
MODELS = ("demo", "deepseek_v3")
DISPATCHERS = ("all_to_all", "hierarchical", "coherent")
BUDGETS = ("1.0", "3")  # of a rank's share of the experts: all of it, or slots in a number


class Case(NamedTuple):
    model: str
    dispatcher: str
    budget: str


class Seen(NamedTuple):
    """hosts: that served; generation: their number; equal, answers: as one process's, of all."""

    hosts: int
    nodes: int
    generation: int
    equal: int
    answers: int


CASES = [Case(*one) for one in itertools.product(MODELS, DISPATCHERS, BUDGETS)]
# With the demo model's two dispatchers of test_cluster.py every two of model, dispatcher, budget meet once at least,
# but for the demo model's hierarchical one, which these tests have without Ray (test_expert_hosts.py).
SAMPLE = [Case("deepseek_v3", "hierarchical", "3"), Case("deepseek_v3", "coherent", "1.0")]


def folder_of(model: str, scratch: Path) -> Path:
    return DEMO if model == "demo" else tiny_checkpoint(model, scratch / model)


def run_case(case: Case, folder: Path) -> Iterator[Seen]:
    """On the Ray cluster that this process is connected to."""
    prompts = prompts_of(1)
    params = [params_of(number) for number in range(len(prompts))]

    def said(llm: LLM) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]

    batch = ["batch.max_tokens=48", "batch.kv_tokens=1024"]
    with LLM(folder, config_of(*batch, "offload.budget=1.0")) as alone:
        right = said(alone)
    settings = [*batch, f"offload.budget={case.budget}", f"parallel.dispatcher={case.dispatcher}"]
    with LLM(folder, config_of(*settings, "cluster.strategy=SPREAD"), hosts=HOSTS[0]) as llm:
        crew = llm.engine.crew
        for count in HOSTS:
            llm.engine.scale(count)
            until(llm.engine, lambda: len(crew.alive) == count)  # noqa: B023 - it is over before the next count
            found = said(llm)
            nodes = len({host.info.node for host in crew.alive})
            yield Seen(count, nodes, crew.generation, sum(map(list.__eq__, found, right)), len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, two_nodes():
        folders = {model: folder_of(model, Path(scratch)) for model in MODELS}
        for case in CASES:
            started = time.monotonic()
            seen = list(run_case(case, folders[case.model]))
            cells = [f"{one.equal} of {one.answers} ({one.nodes} nodes)" for one in seen]
            rows.append(f"| {' | '.join([*case, *cells])} |\n")
            print(f"{rows[-1].strip()} {time.monotonic() - started:.0f} s", flush=True)
    args.table.write_text(
        "# Hosts under Ray say what one process says\n\n"
        "    python -m tests.moe.ray_matrix bench/results/hosts_matrix.md\n\n"
        "Answers (greedy and sampled by turns) that are one process's with all experts in memory, token by token.\n"
        "A row is one set of actors on a Ray cluster of two nodes: four serve, then three, then two.\n"
        "Budget: all of a rank's share of the experts, or three slots, fewer than a layer's experts.\n\n"
        f"| model | dispatcher | budget | {' | '.join(f'{n} hosts' for n in HOSTS)} |\n|---|---|---|---|---|---|\n"
        + "".join(rows)
    )


if __name__ == "__main__":
    main()
