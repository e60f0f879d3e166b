"""One load, many generations: ranks are lost and the others go on in one process, and say what one process says."""

import gc
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from moe.comm.errors import LostPeer
from moe.comm.groups import Groups
from moe.comm.membership import Generation, connect, join_groups, leave_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.engine import Engine
from moe.engine.join import Decisions
from moe.engine.requests import Request
from moe.engine.share import Share
from moe.layer.routing import RoutingSeam
from moe.llm import LLM
from moe.models.load import return_freed
from moe.offload.cache import ExpertCache
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.patience import PATIENCE_S

DEMO = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"
SHAPE = 6, 16  # layers, experts
MORE = [[5 * i + 1, 40 + i, 7] for i in range(3)]


def config_of(dispatcher: str, prefetch: str = "off", store: str = "file") -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        offload=OffloadConfig(budget="20", prefetch=prefetch, store=store),
        batch=BatchConfig(max_tokens=48, max_sequences=3, kv_tokens=1024),
        parallel=ParallelConfig(dispatcher=dispatcher),
    )


def params_of(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=12 + i, ignore_eos=True, temperature=0.8 * (i % 2), seed=i)


def prompts_of() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 2000, (n,), generator=generator).tolist() for n in (5, 1, 37, 20, 3, 40)]


def tokens_alone() -> list[list[int]]:
    with LLM(DEMO, config_of("all_to_all")) as llm:
        prompts = [*prompts_of(), *MORE]
        outputs = llm.generate(prompts, [params_of(i) for i in range(len(prompts))])
        return [o.outputs[0].token_ids for o in outputs]


def run(engine: Engine, steps: int | None = None) -> None:
    engine.start()
    while engine.has_work and (steps is None or steps > 0):
        engine.step()
        steps = None if steps is None else steps - 1


def answers(requests: dict[int, Request]) -> dict[int, list[int]]:
    return {i: r.tokens[r.num_prompt :] for i, r in requests.items()}


def lives_on(dispatcher: str, prefetch: str) -> dict[int, list[int]] | None:
    """Loads alone; generation 1 of 3 ranks, one of which is killed in a step; 2 with two ranks and another plan; then
    3 with the same ranks after a clean end; alone at last."""
    rank, store = int(os.environ["RANK"]), connect("127.0.0.1", int(os.environ["MASTER_PORT"]), PATIENCE_S)
    engine = Engine(DEMO, config_of(dispatcher, prefetch), share=Share(Plan.contiguous(*SHAPE, 3), rank))
    reads = engine.loaded
    prompts = prompts_of()
    own = {i: engine.add_request(prompts[i], params_of(i)) for i in range(rank, len(prompts), 3)}
    groups = join_groups(store, Generation(1, ("a",) * 3), rank, meet_s=PATIENCE_S)
    engine.join(groups, Plan.contiguous(*SHAPE, 3))
    run(engine, steps=5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LostPeer) as caught:
        run(engine)
    assert caught.value.generation == 1
    leave_groups(groups, wait=False)
    # What the lost rank had is asked again by a survivor, with what it had said so far.
    expected = [None if line == "" else [int(t) for t in line.split()] for line in os.environ["SAID"].split("\n")]
    if rank == 0:
        for i in (1, 4):
            so_far = expected[i][:4]
            own[i] = engine.add_request([*prompts[i], *so_far], params_of(i), num_prompt=len(prompts[i]))
    groups = join_groups(store, Generation(2, ("a", "b")), rank // 2, meet_s=PATIENCE_S)
    engine.join(groups, Plan.round_robin(*SHAPE, 2))
    run(engine, steps=3)
    leave_groups(groups)
    groups = join_groups(store, Generation(3, ("a", "a")), 1 - rank // 2, meet_s=PATIENCE_S)
    engine.join(groups, Plan.random(*SHAPE, 2, seed=4))
    own[6 + rank] = engine.add_request(MORE[rank], params_of(6 + rank))
    run(engine)
    leave_groups(groups)
    engine.join(None)
    if rank == 0:
        own[7] = engine.add_request(MORE[1], params_of(7))
        run(engine)
    assert engine.loaded is reads
    pool = engine.scheduler.pool
    pool.check()
    assert pool.num_available == pool.num_blocks
    assert engine.experts is not None
    engine.experts.cache.check()
    engine.close()
    return answers(own)


def lives_on_knowing(said: str, dispatcher: str, prefetch: str) -> Any:
    os.environ["SAID"] = said
    return lives_on(dispatcher, prefetch)


@pytest.mark.parametrize(
    ("dispatcher", "prefetch"),
    [("all_to_all", "off"), ("all_to_all", "transition"), ("hierarchical", "off"), ("coherent", "off")],
)
def test_survivors_go_on_in_another_generation_without_a_reload(dispatcher, prefetch):
    expected = tokens_alone()
    said = "\n".join(" ".join(map(str, tokens)) for tokens in expected)
    first, _, third = spawn(3, lives_on_knowing, said, dispatcher, prefetch, may_die=[1])
    assert set(first) | set(third) == set(range(9))
    for i, tokens in (first | third).items():
        assert tokens == expected[i], i


def decides_nothing() -> tuple:
    """Decisions of a controller: the ranks ask each other nothing while they join."""
    rank, store = int(os.environ["RANK"]), connect("127.0.0.1", int(os.environ["MASTER_PORT"]), PATIENCE_S)
    engine = Engine(DEMO, config_of("auto"), share=Share(Plan.contiguous(*SHAPE, 2), rank))
    groups = join_groups(store, Generation(1, ("a", "a")), rank, meet_s=PATIENCE_S)
    engine.join(groups, None, Decisions(is_coherent=True, num_blocks=60))
    request = engine.add_request(prompts_of()[0], params_of(0))
    run(engine)
    leave_groups(groups)
    with pytest.raises(ValueError, match="on 2 ranks, this generation needs 6 of 16 on 1"):
        engine.join(join_groups(store, Generation(2, ("a",)), 0), Plan.contiguous(*SHAPE, 2))
    engine.close()
    return engine.coherent is None, request.tokens[request.num_prompt :]


def test_a_controller_may_decide():
    assert spawn(2, decides_nothing) == [(True, tokens_alone()[0])] * 2


PLANS = [Plan.contiguous(*SHAPE, 3), Plan.random(*SHAPE, 2, seed=1), Plan.round_robin(*SHAPE, 3)]


def grows(budget: str) -> tuple[list[int], list[bool], list[list[int]]]:
    """Three ranks, two of them, three again: slots, whether all are resident, and what is said, by generation."""
    rank, store = int(os.environ["RANK"]), connect("127.0.0.1", int(os.environ["MASTER_PORT"]), PATIENCE_S)
    config = replace(config_of("all_to_all"), offload=OffloadConfig(budget=budget))
    engine = Engine(DEMO, config, share=Share(Plan.contiguous(*SHAPE, 3), rank))
    slots, resident, said = [], [], []
    for number, plan in enumerate(PLANS, 1):
        if rank >= plan.num_ranks:
            continue
        groups = join_groups(store, Generation(number, ("a",) * plan.num_ranks), rank, meet_s=PATIENCE_S)
        engine.join(groups, plan)
        cache = engine.experts.cache
        reads = sum(s.misses for s in cache.stats)
        request = engine.add_request(prompts_of()[rank], params_of(rank))
        run(engine)
        leave_groups(groups)
        cache.check()
        slots.append(cache.num_slots)
        resident.append(cache.pinned is not None)
        assert resident[-1] == (sum(s.misses for s in cache.stats) == reads)
        said.append(request.tokens[request.num_prompt :])
    engine.join(None)
    request = engine.add_request(prompts_of()[rank], params_of(rank))
    run(engine)
    said.append(request.tokens[request.num_prompt :])
    assert engine.experts.cache.pinned is None
    engine.close()
    return slots, resident, said


@pytest.mark.parametrize("budget", ["1.0", "0.5"])
def test_a_larger_share_gets_more_slots(budget):
    """Never fewer than before: slots that are there stay."""
    expected = tokens_alone()
    answers = spawn(3, grows, budget)
    for rank, (slots, resident, said) in enumerate(answers):
        shares = [int(plan.hosted[:, :, rank].sum() * float(budget)) for plan in PLANS if rank < plan.num_ranks]
        assert slots == [max(shares[: n + 1]) for n in range(len(shares))]
        assert (len(shares) == 3) == (shares[1] > shares[0])
        assert resident == [budget == "1.0"] * len(shares)
        assert said == [expected[rank]] * (len(shares) + 1)


class Broken(Exception):
    """What a stage fails with."""


def broken_job() -> str:
    return f"broken-{os.getpid()}"


STAGES = {  # where each stage has done all but its last line
    "read": "assemble.lossy_modes",
    "dense": "assemble.Dense",
    "memory": "assemble.Memory",
    "slots": "assemble.layer_kernels",
    "experts": "assemble.Experts",
    "loaded": "assemble.Loaded",
    "alone": "engine.stay_alone",
    "ranks": "join.Place",
}


@pytest.fixture(scope="module")
def frozen():
    """What modules hold is not looked at again each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def open_things() -> dict[str, int]:
    """Of this process, after everything unreachable is gone. Slabs and layers: of models, by what holds them."""
    gc.collect()
    alive = [type(each) for each in gc.get_objects()]
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("ThreadPoolExecutor")]
    return {
        "threads": len(threads),  # without transformers', which loads by some and does not wait for their end
        "files": psutil.Process().num_fds(),
        "shared memory": len(
            list(Path("/dev/shm").glob(f"moe-experts-{broken_job()}*"))
        ),  # other tests run beside this one
        "slabs": alive.count(ExpertCache),
        "seams": alive.count(RoutingSeam),
    }


def resident_bytes() -> int:
    """Of this process, without what is free and waits in the allocator."""
    return_freed()
    return int(psutil.Process().memory_info().rss)


def fail(where: str, config: EngineConfig) -> None:
    """Once: an engine whose stage `where` breaks at its end."""
    module, name = where.split(".")
    groups = Groups(device=torch.device("cpu"), generation=1) if module == "join" else None
    original = getattr(sys.modules[f"moe.engine.{module}"], name)

    def breaks(*args: Any, **kwargs: Any) -> None:
        if name != "Place" or args[1] is not None:  # being alone is the stage before
            raise Broken

        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"moe.engine.{where}", breaks)
        try:
            Engine(DEMO, config, groups, share=None if groups else Share(Plan.contiguous(*SHAPE, 1), 0, broken_job()))
        except Broken:
            return
    raise AssertionError(f"{where} was not reached")


@pytest.mark.parametrize("store", ["file", "ram"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_stage_leaves_nothing_behind(frozen, stage, store):
    """Several times in one process: no thread, no file, none in shared memory, no model, and no memory that adds up."""
    offload = OffloadConfig(budget="1.0", readers=3, store=store)
    config = EngineConfig(dtype="float32", offload=offload, batch=BatchConfig(kv_tokens=1024))
    fail(STAGES[stage], config)  # what is made once for a process
    before, memory = open_things(), resident_bytes()
    for _ in range(2):
        fail(STAGES[stage], config)
    assert open_things() == before
    slab = 96 * (144 << 10)
    assert resident_bytes() - memory < slab, "two models' slots, or their host copies"


def test_what_fails_while_ranks_are_joined_leaves_the_model_alone(monkeypatch):
    config = EngineConfig(dtype="float32", offload=OffloadConfig(budget="1.0"))
    with LLM(DEMO, config) as llm:
        engine, expected = llm.engine, tokens_alone()[0]
        request = engine.add_request(prompts_of()[0], params_of(0))
        engine.step()
        monkeypatch.setattr("moe.engine.join._offer_single_launch", lambda *_: {}[0])
        with pytest.raises(KeyError):
            engine.join(Groups(device=torch.device("cpu"), generation=1))
        assert (engine.parallel, engine.experts.parallel) == (None, None)
        run(engine)
        assert request.tokens[request.num_prompt :] == expected


def test_experts_of_a_plan_are_known_before_any_peer_is():
    from moe.layer.parallel import experts_of_rank

    plan = Plan.random(*SHAPE, 3, seed=2)
    own = [experts_of_rank(plan, rank) for rank in range(3)]
    for layer in range(SHAPE[0]):
        assert sorted(np.concatenate([own[r][layer] for r in range(3)]).tolist()) == list(range(SHAPE[1]))
