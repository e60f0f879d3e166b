"""`placement.online` on real ranks: experts move while requests run, and nothing of the answers changes."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig, PlacementConfig
from moe.engine.online import LatestIds
from moe.layer.routing import Routing, StepContext
from moe.llm import LLM
from moe.metrics import totals
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.families import tiny_checkpoint
from tests.family_configs import VOCAB_SIZE

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)
EAGER = PlacementConfig(
    online=True, window=96, imbalance=1.0, calm=1.0, most_moved=0.5, bytes_per_step=3 << 13, share=1.0
)


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory) -> Path:
    return tiny_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))


def test_the_newest_tokens_of_whole_forwards_are_kept():
    """Rows of a forward are tokens `first`, ... in three layers of K = 2; an id says its token, layer and place."""
    latest, step = LatestIds(3, 10), StepContext()

    def forward(first: int, rows: int, layers: int = 3) -> None:
        latest.begin(step)
        for layer in range(layers):
            ids = 10 * (first + torch.arange(rows))[:, None] + 2 * layer + torch.arange(2)
            latest.routed(torch.zeros(rows, 4), Routing(layer, ids, torch.ones(rows, 2)), step)

    assert latest.take(5).shape == (0, 3, 0)
    for first, rows in ((0, 7), (7, 4), (11, 0), (11, 3), (14, 1)):
        forward(50, 5, layers=2)  # it is interrupted
        forward(first, rows)
    assert (latest.num_tokens, latest.num_seen) == (15, 15), "the oldest forward has some of the ten"
    forward(15, 2)
    assert (latest.num_tokens, latest.num_seen) == (10, 17)
    ids = latest.take(9)
    assert ids.dtype == np.int16
    assert ids.tolist() == [[[10 * t + 2 * layer + k for k in range(2)] for layer in range(3)] for t in range(8, 17)]
    assert latest.take(9).size == latest.num_tokens == latest.num_seen == 0


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB_SIZE, 1 + 5 * n % 23).tolist() for n in range(count)]


def config_of(placement: PlacementConfig, plan: str | None = None, budget: str = "1.0") -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=48, max_sequences=3, kv_tokens=1024),
        parallel=ParallelConfig(plan=plan),
        placement=placement,
    )


def uneven_plan(folder: Path, path: Path, num_ranks: int) -> None:
    """Every layer's most used experts on rank 0, by what the model chooses for these prompts."""
    with LLM(folder, config_of(PlacementConfig())) as llm:
        recorder = llm.engine.record()
        llm.generate(prompts_of(9), PARAMS)
        ids = recorder.trace().expert_ids
    assignment = np.empty((ids.shape[1], 8), np.int64)
    for layer in range(ids.shape[1]):
        order = np.argsort(-np.bincount(ids[:, layer].ravel(), minlength=8), kind="stable")
        assignment[layer, order] = np.arange(8) * num_ranks // 8
    Plan.from_assignment(assignment, num_ranks).save(path)


class Told(NamedTuple):
    """turns: load before and after each that moved; read: experts that came into slots, by step."""

    answers: list[list[int]]
    has_changed: bool
    turns: list[tuple[float, float]]
    is_whole: bool
    read: list[int]
    metrics: dict[str, float]


def serve(folder: str, plan: str, placement: PlacementConfig, budget: str, until_moved: bool) -> Told:
    """What this rank says of its share. until_moved: rank 0 has more requests, one after another, until experts have
    moved and one after it: the solver takes time of its own."""
    with process_groups() as groups:
        with LLM(folder, config_of(placement, plan, budget), groups=groups) as llm:
            own, engine = prompts_of(9)[groups.rank :: groups.world_size], llm.engine
            asked = [llm.add(prompt, PARAMS) for prompt in own]
            engine.start()
            fills, is_more = [engine.experts.cache.map.num_fills], True
            while engine.has_work:
                llm.step()
                fills.append(engine.experts.cache.map.num_fills)
                loop = None if engine.online is None else engine.online.loop
                if until_moved and loop is not None and not engine.scheduler.has_work and is_more:
                    is_more = not loop.stats.moved_experts or loop._moving > 0
                    llm.add(prompts_of(9)[5], PARAMS)
            history = [] if engine.online is None or engine.online.loop is None else engine.online.loop.history
            turns = [(t.before.imbalance, t.after.imbalance) for t, _, _ in history if t.migration is not None]
            return Told(
                [one.token_ids for one in asked],
                bool((engine.parallel.plan.hosted != Plan.load(plan).hosted).any()),
                turns,
                engine.why_not_whole() is None,
                np.diff(fills).tolist(),
                {metric.name: value for metric, value in totals(engine.metric_sources()).items()},
            )


@pytest.mark.parametrize(("ranks", "budget"), [(2, "1.0"), pytest.param(3, "2", marks=pytest.mark.heavy)])
def test_experts_move_by_themselves_and_no_token_changes(deepseek_v3, tmp_path, ranks, budget):
    with LLM(deepseek_v3, config_of(PlacementConfig())) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts_of(9), PARAMS)]
    uneven_plan(deepseek_v3, tmp_path / "uneven.json", ranks)
    told = spawn(ranks, serve, str(deepseek_v3), str(tmp_path / "uneven.json"), EAGER, budget, True)
    assert [one.answers for one in told] == [expected[rank::ranks] for rank in range(ranks)]
    assert all(one.has_changed for one in told), "all ranks took on another plan"
    assert all(before > after for before, after in told[0].turns)
    assert told[0].turns
    assert all(one.is_whole for one in told)
    assert told[0].metrics["moved_experts"] > 0
    assert told[0].metrics["placement_turns"] >= len(told[0].turns)
    if budget == "1.0":  # all experts are in slots: what comes later is what moves
        moved = np.sum([one.read for one in told], axis=0)
        assert moved.sum() == told[0].metrics["moved_experts"]
        expert_bytes = told[0].metrics["moved_bytes"] / told[0].metrics["moved_experts"]
        assert moved.max() * expert_bytes <= EAGER.bytes_per_step < 4 * expert_bytes, "and the budget binds"


def test_an_even_run_moves_nothing(deepseek_v3, tmp_path):
    Plan.contiguous(2, 8, 2).save(tmp_path / "even.json")
    calm = PlacementConfig(online=True, window=32, imbalance=1.9, calm=1.5, share=1.0)
    told = spawn(2, serve, str(deepseek_v3), str(tmp_path / "even.json"), calm, "1.0", False)
    assert not any(one.has_changed for one in told)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"placement: calm \(1.5\) must lie between 1 and imbalance"):
        EngineConfig.load(settings=["placement.calm=1.5"])
    with pytest.raises(ValueError, match=r"placement: share \(0.0\) must lie in \(0, 1\]"):
        EngineConfig.load(settings=["placement.share=0"])
    with pytest.raises(ValueError, match=r"which parallel.dispatcher=coherent does not let them; set parallel.disp"):
        EngineConfig.load(settings=["placement.online=true", "parallel.dispatcher=coherent"])
    assert EngineConfig.load(settings=["placement.online=true"]).placement.window == 896
