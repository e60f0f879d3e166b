"""The single launch over ranks says what one process says; all ranks choose alike; what cannot be is refused."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.comm.errors import CommError, LostPeer
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.kernels.crossover import CrossoverTable, LayerKey, Measured, machine_name
from moe.layer import single_launch
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.families import tiny_checkpoint

PROMPTS = [[5, 9, 30], [7], [1, 2, 3, 4, 5, 6]]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


def config_of(kernel: str, plan: str | None = None, budget: str = "1.0", table: str = "", **parallel) -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        kernel=kernel,
        crossover_table=table,
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
        parallel=ParallelConfig(plan=plan, **parallel),
    )


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS)]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def expected(mixtral) -> list[list[int]]:
    with LLM(mixtral, config_of("cpu")) as llm:
        return tokens_of(llm, PROMPTS)


class Counted:
    """A launch that counts its calls, and how many of them had no row here."""

    def __init__(self, launch):
        self.launch, self.calls, self.empty = launch, 0, 0

    def takes(self, layer, rows):
        return self.launch.takes(layer, rows)

    def run(self, layer, x, physical_ids, topk_weights):
        self.calls += 1
        self.empty += len(x) == 0
        return self.launch.run(layer, x, physical_ids, topk_weights)


def serve(folder: str, config: EngineConfig, table: str, only_rank: int | None) -> tuple:
    """One rank: its share of the prompts. table: where {rank} stands for this one."""
    with process_groups() as groups:
        config = replace(config, crossover_table=table.format(rank=groups.rank))
        with LLM(folder, config, groups=groups) as llm:
            parallel = llm.engine.parallel
            parallel.launch = counted = Counted(parallel.launch)
            own = PROMPTS[groups.rank :: groups.world_size]
            if only_rank is not None:
                own = PROMPTS if groups.rank == only_rank else []
            return tokens_of(llm, own), counted.calls, counted.empty, parallel.dispatcher.traffic.calls


class Deserting:
    """A launch whose rank is killed before its third step's layer 1."""

    def __init__(self, launch):
        self.launch, self.steps = launch, 0

    def takes(self, layer, rows):
        return self.launch.takes(layer, rows)

    def run(self, layer, x, physical_ids, topk_weights):
        self.steps += layer == 1
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.launch.run(layer, x, physical_ids, topk_weights)


LIMIT_S = 30  # longer than a step of three interpreted ranks on a busy machine, whose peers are slow and not lost


def serve_until_one_is_lost(folder: str, config: EngineConfig) -> tuple:
    """What a survivor says, and the fields of its error."""
    try:
        with process_groups(timeout_s=LIMIT_S) as groups:
            llm = LLM(folder, config, groups=groups)
            if groups.rank == 1:
                llm.engine.parallel.launch = Deserting(llm.engine.parallel.launch)
            tokens_of(llm, PROMPTS[groups.rank :: groups.world_size])
    except LostPeer as error:
        return str(error), error.peers, error.layer
    return "nothing was lost", (), -1


@pytest.mark.heavy
def test_a_lost_rank_is_named_with_the_layer(mixtral):
    config = config_of("single_launch")
    config = replace(config, parallel=replace(config.parallel, timeout_seconds=LIMIT_S))
    results = spawn(3, serve_until_one_is_lost, str(mixtral), config, may_die=[1])
    for rank in (0, 2):
        message, peers, layer = results[rank]
        assert message.startswith(f"rank {rank} of 3: lost rank 1 in the single launch of layer 1 with"), message
        assert (peers, layer) == ((1,), 1)


def write_replicated(path: Path) -> str:
    """Experts dealt in turn, the first two on both ranks."""
    hosted = np.zeros((3, 7, 2), dtype=bool)
    hosted[:, np.arange(7), np.arange(7) % 2] = True
    hosted[:, :2] = True
    Plan.from_hosted(hosted).save(path)
    return str(path)


def test_replicas_and_a_rank_without_tokens(mixtral, expected, tmp_path):
    config = config_of("single_launch", write_replicated(tmp_path / "plan.json"))
    (none, calls, empty, _), (answers, *_, dispatches) = spawn(2, serve, str(mixtral), config, "", 1)
    assert (none, answers) == ([], expected)
    assert calls == empty == 9  # three steps of three layers
    assert dispatches == 0


def write_table(path: Path, single_us: dict[int, float]) -> str:
    key = LayerKey(
        num_experts=7, top_k=3, hidden_size=36, intermediate_size=29, world_size=2, dtype="float32", stored="float32"
    )
    table = CrossoverTable(path, machine_name(torch.device("cpu")))
    table.replace(key, [Measured(layer=key, tokens=t, single_us=us, grouped_us=5.0) for t, us in single_us.items()])
    return str(path)


def test_all_ranks_choose_by_the_table_of_rank_0(mixtral, expected, tmp_path):
    """Seven experts on two ranks, so one place is empty; steps that rank 0's table gives the grouped path take it."""
    write_table(tmp_path / "0.json", {3: 1.0, 16: 9.0})
    write_table(tmp_path / "1.json", {3: 9.0, 16: 1.0})
    results = spawn(2, serve, str(mixtral), config_of("measured"), str(tmp_path / "{rank}.json"), None)
    assert [r[0] for r in results] == [expected[0::2], expected[1::2]]
    assert [r[1] for r in results] == [6, 6]  # two steps of at most two tokens a rank, three layers
    assert [r[3] for r in results] == [3, 3]  # the prefill: nine tokens on rank 0, one on rank 1


def measure(folder: str, table: str) -> tuple:
    """One rank: what it takes after measuring, briefly, what its table lacks."""
    single_launch.MEASURED_TOKENS, single_launch.REPEATS = (1,), 2
    with process_groups() as groups:
        config = config_of("measured", table=table.format(rank=groups.rank))
        with LLM(folder, config, groups=groups) as llm:
            parallel = llm.engine.parallel
            return [sorted(s) for s in parallel.launch.sizes], parallel.dispatcher.traffic.calls


@pytest.mark.heavy
def test_what_is_not_known_is_measured_by_all_and_stored_by_rank_0(mixtral, tmp_path):
    tables = str(tmp_path / "{rank}.json")
    first = spawn(2, measure, str(mixtral), tables)
    (rows,) = json.loads((tmp_path / "0.json").read_text()).values()
    assert [(row["layer"]["world_size"], row["tokens"]) for row in rows] == [(2, 1)]  # three layers of one shape
    assert not (tmp_path / "1.json").exists()
    wins = [0, 1] if rows[0]["single_us"] < rows[0]["grouped_us"] else []
    assert first == [([wins] * 3, 0)] * 2  # measuring leaves no trace in the traffic
    written = (tmp_path / "0.json").read_text()
    assert spawn(2, measure, str(mixtral), tables) == first
    assert (tmp_path / "0.json").read_text() == written


def refused(folder: str, plan: str) -> list[str]:
    said = []
    with process_groups() as groups:
        for config in (config_of("single_launch", budget="3"), config_of("single_launch", dispatcher="hierarchical")):
            with pytest.raises(ValueError, match="kernel=single_launch cannot serve 2 ranks") as error:
                LLM(folder, config, groups=groups)
            said.append(str(error.value))
        with LLM(folder, config_of("measured", budget="3"), groups=groups) as llm:
            assert llm.engine.parallel.launch is None
            said += llm.engine.notes
        with LLM(folder, config_of("single_launch"), groups=groups) as llm:
            parallel = llm.engine.parallel
            parallel.use(Plan.load(plan))  # as many places per rank, other experts in them
            assert parallel.launch is None  # they are in no slot yet
            said.append(str(tokens_of(llm, PROMPTS[groups.rank :: 2])))
        with LLM(folder, config_of("single_launch"), groups=groups) as llm:
            (launch,) = llm.engine.parallel.launch.launches.values()
            launch.fused.state[2] = 1
            with pytest.raises(CommError, match=f"rank {groups.rank} of 2: .*tokens of a peer did not arrive"):
                tokens_of(llm, PROMPTS)
    return said


def test_what_cannot_share_a_launch_says_so(mixtral, expected, tmp_path):
    hosted = np.zeros((3, 7, 2), dtype=bool)
    hosted[:, np.arange(7), np.arange(7) % 2] = True
    Plan.from_hosted(hosted).save(tmp_path / "dealt.json")
    for rank, said in enumerate(spawn(2, refused, str(mixtral), str(tmp_path / "dealt.json"))):
        short, hierarchical, dispatcher, note, answers = said
        assert "all experts of every rank must be in slots and a rank lacks 9; raise offload.budget" in short
        assert "it takes the place of parallel.dispatcher=all_to_all, this run has hierarchical" in hierarchical
        assert dispatcher.startswith("parallel.dispatcher=auto is all_to_all: ")
        assert note.startswith("kernel=measured is grouped over 2 ranks: all experts")
        assert answers == str(expected[rank::2])
