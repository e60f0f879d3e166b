"""Hosts without Ray: four, then three, then two of them serve one generation each, and say what one process says.

What actors carry is called here; the same hosts under Ray, and what happens to them there: test_cluster.py.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import moe.cluster.host as of_hosts
from moe.cluster.host import ExpertHost
from moe.cluster.lines import Lines
from moe.cluster.messages import Dealt, Serve, Where
from moe.cluster.plans import plan_for
from moe.comm.membership import connect, process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.engine import Engine
from moe.llm import LLM
from moe.offload.checkpoint import Checkpoint
from moe.offload.fingerprint import fingerprint
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.families import tiny_checkpoint
from tests.moe.test_parallel import DEMO, prompts_of
from tests.patience import PATIENCE_S

HOSTS = (4, 3, 2)
OTHERS = "0123456789abcdef"
SHAPES = {"demo": (6, 16), "deepseek_v3": (2, 8)}
DISPATCHERS = ("all_to_all", "hierarchical", "coherent")


def config_of(budget: str, dispatcher: str) -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=48, max_sequences=3, kv_tokens=1024),
        parallel=ParallelConfig(dispatcher=dispatcher),
    )


def params_of(number: int) -> SamplingParams:
    return SamplingParams(max_tokens=8 + number, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)


def serve_in_turn(folder: str, shape, budget: str, dispatcher: str, prompts) -> list[dict]:
    """One host. Returns what it said in each generation that it was in, by the number of the prompt."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    lines = Lines("127.0.0.1", "word")
    where = Where("127.0.0.1", lines.port, "word", f"{dispatcher}-{budget}")
    host = ExpertHost(folder, config_of(budget, dispatcher), rank, (rank, HOSTS[0]), where)
    store, plan, answers = connect("127.0.0.1", port), Plan.contiguous(*shape, HOSTS[0]), []
    for generation, num_hosts in enumerate(HOSTS, 1):
        if rank >= num_hosts:
            break
        if num_hosts < HOSTS[0]:
            plan = plan_for([plan.hosted[:, :, other] for other in range(num_hosts)], shape)
        own = range(rank, len(prompts), num_hosts)
        first = 100 * generation
        host.submit([Dealt(first + n, prompts[n], len(prompts[n]), params_of(n)) for n in own])
        said: dict[int, list[int]] = {n: [] for n in own}

        def listen(generation=generation, num_hosts=num_hosts, first=first, said=said) -> None:
            open_ones = set(said)
            try:
                while open_ones:
                    lines.wait(0.5)
                    for word in (one for _, words in lines.take_words() for one in words):
                        assert word.error is None, word
                        said[word.id - first] += word.tokens
                        open_ones -= {word.id - first} if word.finish else set()
                store.set(f"done-{generation}-{rank}", "")
                store.wait([f"done-{generation}-{other}" for other in range(num_hosts)])
            finally:
                host.leave(generation)

        with ThreadPoolExecutor(1) as threads:
            listening = threads.submit(listen)
            nodes = ("a", "a", "b", "b")[:num_hosts]
            ended = host.serve(Serve(generation, port, nodes, rank, plan))
            listening.result()
        assert ended.lost is None, ended
        assert lines.wait_for_words(rank, ended.said, PATIENCE_S)
        answers.append(said)
    host.engine.experts.cache.check()
    pool = host.engine.scheduler.pool
    assert pool.num_available == pool.num_blocks
    return answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {"demo": DEMO, "deepseek_v3": tiny_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))}


@pytest.mark.heavy
@pytest.mark.parametrize("budget", ["1.0", "3"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("model", SHAPES)
def test_four_three_and_two_hosts_say_what_one_process_says(folders, model, dispatcher, budget):
    folder, prompts = folders[model], prompts_of(1)
    with LLM(folder, config_of("1.0", "all_to_all")) as llm:
        outputs = llm.generate(prompts, [params_of(n) for n in range(len(prompts))], use_tqdm=False)
        right = {n: output.outputs[0].token_ids for n, output in enumerate(outputs)}
    arguments = (str(folder), SHAPES[model], budget, dispatcher, prompts)
    by_rank = spawn(HOSTS[0], serve_in_turn, *arguments)
    for turn, num_hosts in enumerate(HOSTS):
        said = {n: tokens for answers in by_rank[:num_hosts] for n, tokens in answers[turn].items()}
        assert said == right, num_hosts


def begin_with_other_weights() -> str:
    """In a process of its own: a host whose line closes ends it."""
    lines = Lines("127.0.0.1", "word")
    where = Where("127.0.0.1", lines.port, "word", "job", weights=OTHERS)
    of_hosts.Engine = lambda *_, **__: pytest.fail("it loads")  # of this process
    with pytest.raises(ValueError, match="other weights") as caught:
        ExpertHost(str(DEMO), config_of("1.0", "all_to_all"), 0, (0, 2), where)
    return str(caught.value)


def test_a_host_of_other_weights_is_refused_before_it_loads_any():
    """As one that replaces another after the folder was changed, or on a node with another revision."""
    (said,) = spawn(1, begin_with_other_weights)
    found = fingerprint(Checkpoint.open(DEMO))
    assert re.search(rf"tinymoe on \S+ holds other weights .*{found}\) than .*{OTHERS}\): give every", said), said


def ask_for_own_folder(folders: list[str]) -> str:
    with process_groups() as groups:
        try:
            Engine(folders[groups.rank], config_of("3", "all_to_all"), groups)
        except ValueError as error:
            return str(error)
        return "loads"


def test_ranks_of_other_weights_are_named_on_every_rank(tmp_path):
    other = shutil.copytree(DEMO, tmp_path / "tinymoe")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    said = spawn(3, ask_for_own_folder, [str(DEMO), str(other), str(DEMO)])
    for one in said:
        assert "tinymoe: rank 1 of 3 found other weights or another config.json there than rank 0; give" in one
