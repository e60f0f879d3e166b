"""Several gloo ranks, each with fewer slots than its share of the experts, say what one process says."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from moe.batch import run_batch
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.migrate import plan_migration
from moe.placement.plan import Plan
from moe.placement.topology import Topology
from tests.distributed import spawn
from tests.families import tiny_checkpoint
from tests.family_configs import VOCAB_SIZE
from tests.patience import PATIENCE_S
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "tinymoe"
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


def prompts_of(seed: int, vocabulary: int = VOCAB_SIZE) -> list[list[int]]:
    """Seven prompts of odd lengths, so that ranks get unequal shares."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (5, 1, 37, 20, 3, 63, 8)]


def config_of(budget: str, plan: str | None, dispatcher: str, packed: bool = True) -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        offload=OffloadConfig(budget=budget),
        batch=BatchConfig(max_tokens=48, max_sequences=3, packed=packed, kv_tokens=1024),
        parallel=ParallelConfig(plan=plan, dispatcher=dispatcher),
    )


def tokens_alone(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    with LLM(folder, config_of("1.0", None, "all_to_all")) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS)]


def serve_cases(folder: str, prompts: list[list[int]], cases: list[tuple], only_rank: int | None) -> list:
    """One rank: its share of the prompts under every case."""
    answers = []
    with process_groups() as groups:
        for budget, plan, dispatcher, packed in cases:
            own = prompts[groups.rank :: groups.world_size]
            if only_rank is not None:
                own = prompts if groups.rank == only_rank else []
            with LLM(folder, config_of(budget, plan, dispatcher, packed), groups=groups) as llm:
                answers.append([o.outputs[0].token_ids for o in llm.generate(own, PARAMS)])
                llm.engine.experts.cache.check()
    return answers


def write_plans(folder: Path, num_layers: int, num_experts: int, world_size: int) -> list[str | None]:
    """Contiguous (None), random, and random with a replica of the first experts on every rank."""
    rng = np.random.default_rng(world_size)
    ranks = np.stack([rng.permutation(np.arange(num_experts) % world_size) for _ in range(num_layers)])
    hosted = ranks[:, :, None] == np.arange(world_size)
    plans: list[str | None] = [None]
    for name in ("random", "replicated"):
        Plan.from_hosted(hosted).save(folder / f"{name}{world_size}.json")
        plans.append(str(folder / f"{name}{world_size}.json"))
        hosted = hosted.copy()
        hosted[:, :2] = True
    return plans


def check_all(folder: Path, tmp_path: Path, world_size: int, shape: tuple[int, int], dispatchers, budgets, nodes=None):
    prompts = prompts_of(world_size)
    expected = tokens_alone(folder, prompts)
    plans = write_plans(tmp_path, *shape, world_size)
    cases = [(b, p, d, True) for b in budgets for p in plans for d in dispatchers]
    answers = spawn(world_size, serve_cases, str(folder), prompts, cases, None, ranks_per_node=nodes, time_limit_s=600)
    for case, by_rank in zip(cases, zip(*answers)):
        for rank, own in enumerate(by_rank):
            assert own == expected[rank::world_size], (case, rank)


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory) -> Path:
    return tiny_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))


def test_two_ranks_say_what_one_says(deepseek_v3, tmp_path):
    check_all(deepseek_v3, tmp_path, 2, (2, 8), ["all_to_all"], ["1.0", "1 expert"])


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_plans_dispatchers_and_slots(family, world_size, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "model")
    shape = {"mixtral": (3, 7), "qwen3_moe": (3, 8), "deepseek_v3": (2, 8)}[family]
    nodes = 2 if world_size == 4 else None
    check_all(folder, tmp_path, world_size, shape, ["all_to_all", "hierarchical"], ["1.0", "0.25", "3"], nodes)


def serve_from_host(folder: str, prompts: list[list[int]]) -> tuple[list, int, list[str]]:
    config = EngineConfig(dtype="float32", offload=OffloadConfig(budget="2", store="ram"))
    with process_groups() as groups:
        with LLM(folder, config, groups=groups) as llm:
            answers = [o.outputs[0].token_ids for o in llm.generate(prompts[groups.rank :: groups.world_size], PARAMS)]
            blob = llm.engine.experts.cache.store.blobs[0][0]
            maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/moe-experts" in line]
            return answers, int(blob.long().sum()), maps


def test_ranks_of_a_node_share_one_host_copy(deepseek_v3):
    prompts = prompts_of(8)
    expected = tokens_alone(deepseek_v3, prompts)
    (first, first_sum, first_maps), (second, second_sum, second_maps) = spawn(
        2, serve_from_host, str(deepseek_v3), prompts
    )
    assert [first, second] == [expected[0::2], expected[1::2]]
    assert first_sum == second_sum != 0

    def inodes(maps: list[str]) -> set[str]:
        return {line.split()[4] for line in maps}

    assert len(inodes(first_maps)) == 1
    assert inodes(first_maps) == inodes(second_maps)


def test_ranks_without_any_prompt_take_part(deepseek_v3):
    prompts = prompts_of(5)
    expected = tokens_alone(deepseek_v3, prompts)
    answers = spawn(2, serve_cases, str(deepseek_v3), prompts, [("2", None, "all_to_all", True)], 1)
    assert answers[0] == [[]]
    assert answers[1] == [expected]


def test_ranks_step_together_one_sequence_at_a_time(deepseek_v3):
    """Unequal numbers of forwards in a step, and sequences that end at different times."""
    prompts = prompts_of(6)[:5]
    expected = tokens_alone(deepseek_v3, prompts)
    answers = spawn(2, serve_cases, str(deepseek_v3), prompts, [("3", None, "all_to_all", False)], None)
    assert [answers[0][0], answers[1][0]] == [expected[0::2], expected[1::2]]


def migrate_while_running(folder: str, prompts: list[list[int]], plan: str) -> tuple[list, int]:
    with process_groups() as groups:
        with LLM(folder, config_of("2", None, "all_to_all"), groups=groups) as llm:
            own = [llm.add(p, PARAMS) for p in prompts[groups.rank :: groups.world_size]]
            parallel = llm.engine.parallel
            start, target = parallel.plan, Plan.load(plan)
            migration = plan_migration(
                start,
                target,
                Topology.preset("laptopx2"),
                expert_bytes=1,
                bytes_per_step=2,
                seconds_per_step=(1.0, 0.5),
            )
            llm.engine.start()
            steps = 0
            while llm.engine.has_work:
                llm.step()
                steps += 1
                if steps == 2:
                    parallel.migrate(migration.states())
            assert (parallel.plan.hosted == target.hosted).all()
            return [g.token_ids for g in own], len(migration.steps)


def test_experts_move_step_by_step_while_requests_run(deepseek_v3, tmp_path):
    prompts = prompts_of(7)
    expected = tokens_alone(deepseek_v3, prompts)
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(np.arange(8) % 2) for _ in range(2)])
    Plan.from_assignment(ranks, 2).save(tmp_path / "other.json")
    answers = spawn(2, migrate_while_running, str(deepseek_v3), prompts, str(tmp_path / "other.json"))
    assert [tokens for tokens, _ in answers] == [expected[0::2], expected[1::2]]
    assert answers[0][1] >= 2


def test_a_plan_of_another_model_or_world_is_refused(deepseek_v3, tmp_path):
    Plan.contiguous(2, 8, 3).save(tmp_path / "three.json")
    Plan.contiguous(5, 8, 1).save(tmp_path / "layers.json")
    with process_groups() as groups:
        with pytest.raises(ValueError, match="the plan is for 3 ranks, this run has 1"):
            LLM(deepseek_v3, config_of("1.0", str(tmp_path / "three.json"), "all_to_all"), groups=groups)
        with pytest.raises(ValueError, match=r"5 layers of 8 experts.*2 of 8"):
            LLM(deepseek_v3, config_of("1.0", str(tmp_path / "layers.json"), "all_to_all"), groups=groups)


def one_more_than_experts(folder: str) -> str:
    with process_groups() as groups:
        try:
            LLM(folder, config_of("1.0", None, "all_to_all"), groups=groups).close()
        except ValueError as error:
            return str(error)
    return ""


def test_more_ranks_than_experts_are_refused_by_all_of_them(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=1,
        num_experts_per_tok=1,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    for said in spawn(2, one_more_than_experts, str(tmp_path / "model")):
        assert said.startswith("rank 1 of 2 would have none of the 1 experts")


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def torchrun(output: Path, num_lines: int | None = None, launcher=TORCHRUN, program: tuple[str, ...] = ()):
    """The job, when it has ended, and what it printed. program: what runs `moe.launch.torchrun`."""
    source = ROOT / "examples" / "batch.jsonl"
    if num_lines is not None:
        lines = source.read_text().splitlines()
        source = output.with_suffix(".in")
        entries = [json.loads(lines[i % len(lines)]) | {"custom_id": f"c{i}"} for i in range(num_lines)]
        source.write_text("\n".join(json.dumps(e) for e in entries))
    command = [sys.executable, "-m", *launcher, *program, "moe.launch.torchrun"]
    command += [str(DEMO), str(source), str(output), "--experts-in-memory", "0.25"]
    command += [f"--set={s}" for s in ("dtype=float32", "threads=1")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    return process, process.communicate(timeout=PATIENCE_S)[0]


def results_of(path: Path) -> dict:
    return {
        (e := json.loads(line))["custom_id"]: e["response"]["body"] | {"created": 0}
        for line in path.read_text().splitlines()
    }


def deepspeed() -> list[str]:
    """Its launcher, of two ranks on this machine at a free port."""
    return ["deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank", "--module"]


WITH_DEEPSPEED = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="make test-deepspeed installs it"),
]


@pytest.mark.parametrize(
    "launcher", [lambda: TORCHRUN, pytest.param(deepspeed, marks=WITH_DEEPSPEED)], ids=["torchrun", "deepspeed"]
)
def test_launchers_write_the_batch_of_one_process(launcher, tmp_path):
    process, printed = torchrun(tmp_path / "two.jsonl", launcher=launcher())
    assert process.returncode == 0, printed
    with LLM(DEMO, EngineConfig(dtype="float32")) as llm:
        run_batch(llm, ROOT / "examples" / "batch.jsonl", tmp_path / "one.jsonl")
    assert results_of(tmp_path / "two.jsonl") == results_of(tmp_path / "one.jsonl")
    assert "peak rss" in printed


@pytest.mark.heavy
def test_a_killed_rank_stops_the_others_and_a_restart_resumes(tmp_path):
    output = tmp_path / "out.jsonl"
    process, printed = torchrun(output, 200, program=("tests.launch.ends_itself", "20", "1"))
    assert process.returncode != 0
    assert "rank 0 of 2" in printed or "SIGKILL" in printed.upper() or "Signal 9" in printed, printed
    before = output.read_bytes()
    assert 20 <= before[: before.rfind(b"\n")].count(b"\n") + 1 < 200
    again, printed = torchrun(output, 200)
    assert again.returncode == 0, printed
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(e["custom_id"] for e in lines) == sorted(f"c{i}" for i in range(200))
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
