"""Coherent decode says what one process says: for every plain family, plan, number of ranks and of slots."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_parallel import DEMO, PARAMS, ROOT, config_of, prompts_of, results_of, tokens_alone, write_plans
from transformers import AutoConfig

from moe.batch import run_batch
from moe.comm.membership import process_groups
from moe.config import EngineConfig
from moe.engine.coherent_choice import Costs, why_coherent, why_not_coherent
from moe.launch import torchrun
from moe.llm import LLM
from moe.params import SamplingParams, StructuredOutputsParams
from moe.placement.topology import Link
from tests.distributed import spawn
from tests.families import tiny_checkpoint

SHAPES = {
    "mixtral": (3, 7),
    "qwen2_moe": (2, 8),
    "qwen3_moe": (3, 8),
    "olmoe": (3, 8),
    "deepseek_v2": (2, 8),
    "deepseek_v3": (2, 8),
}


def serve(folder, config, prompts, params) -> tuple:
    """One rank: (answers of its share, what it is to be told about the run)."""
    with process_groups() as groups:
        share = slice(groups.rank, None, groups.world_size)
        with LLM(folder, config, groups=groups) as llm:
            outputs = llm.generate(prompts[share], params[share])
            engine = llm.engine
            engine.experts.cache.check()
            engine.scheduler.pool.check()
            assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_blocks
            assert not engine.place.mode.mirror._known
            moves = engine.coherent.dispatcher.traffic
            stats = {"calls": moves.calls, "sent": sum(moves.bytes_to), "steps": engine.stats.steps}
            stats |= {"preemptions": engine.stats.preemptions, "shared": engine.stats.shared_tokens}
            return [o.outputs for o in outputs], stats


def serve_plans(folder, cases, prompts) -> list:
    return [[o[0].token_ids for o in serve(folder, c, prompts, [PARAMS] * len(prompts))[0]] for c in cases]


def check_all(folder: Path, plans: list[str | None], world_size: int, budgets: list[str]) -> None:
    prompts = prompts_of(world_size)
    expected = tokens_alone(folder, prompts)
    cases = [config_of(b, p, "coherent") for b in budgets for p in plans]
    answers = spawn(world_size, serve_plans, str(folder), cases, prompts)
    for case, by_rank in zip(cases, zip(*answers)):
        for rank, own in enumerate(by_rank):
            assert own == expected[rank::world_size], (case, rank)


def on_two_ranks(folder, config, prompts, params) -> tuple[list, list]:
    """(outputs in the order of the prompts, the ranks' statistics)."""
    ranks = spawn(2, serve, str(folder), config, prompts, params)
    outputs: list = [None] * len(prompts)
    for rank, (own, _) in enumerate(ranks):
        outputs[rank::2] = own
    return outputs, [stats for _, stats in ranks]


@pytest.fixture(scope="module")
def qwen2_moe(tmp_path_factory) -> Path:
    return tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_two_ranks_say_what_one_says(family, tmp_path):
    """Layers without experts first (DeepSeek) and in between (Qwen2), shared experts, latent attention."""
    folder = tiny_checkpoint(family, tmp_path / "model")
    check_all(folder, write_plans(tmp_path, *SHAPES[family], 2)[-1:], 2, ["1 expert"])


def test_two_ranks_say_what_one_says_of_the_demo(tmp_path):
    check_all(DEMO, write_plans(tmp_path, 6, 16, 2)[:1], 2, ["0.25"])


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "demo"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_plans_and_slots(family, world_size, tmp_path):
    folder, shape = (DEMO, (6, 16)) if family == "demo" else (tmp_path / "model", SHAPES[family])
    if family != "demo":
        tiny_checkpoint(family, folder)
    check_all(folder, write_plans(tmp_path, *shape, world_size), world_size, ["1.0", "0.25", "4"])


def test_samples_end_at_different_times_and_are_those_of_one_process(qwen2_moe):
    """Random generators, penalties and log-probabilities, wherever a token is sampled; ends by length and by token."""
    prompts = prompts_of(2)
    params = [
        SamplingParams(max_tokens=4 + 5 * i, seed=i, temperature=0.8 * (i % 2), top_k=20, repetition_penalty=1.2)
        for i in range(len(prompts))
    ]
    params[1] = replace(params[1], n=3, logprobs=0)
    params[2] = replace(params[2], logprobs=4)
    params[6] = replace(params[6], stop_token_ids=tuple(range(0, 97, 8)))
    with LLM(qwen2_moe, config_of("1.0", None, "all_to_all")) as llm:
        expected = [o.outputs for o in llm.generate(prompts, params)]
    outputs, stats = on_two_ranks(qwen2_moe, config_of("3", None, "coherent"), prompts, params)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        assert [c.finish_reason for c in ours] == [c.finish_reason for c in theirs]
        for c, d in zip(ours, theirs):
            assert (c.logprobs is None) == (d.logprobs is None)
            for x, y in zip(c.logprobs or [], d.logprobs or [], strict=True):
                assert list(x) == list(y)
                assert [one.rank for one in x.values()] == [one.rank for one in y.values()]
                assert [p.logprob for p in x.values()] == pytest.approx([p.logprob for p in y.values()], abs=1e-5)
    assert {c.finish_reason for own in outputs for c in own} == {"length", "stop"}
    assert stats[0]["steps"] == stats[1]["steps"]
    assert stats[0]["calls"] == stats[1]["calls"] > 0
    assert stats[0]["sent"] > 0


def test_one_sequence_for_two_ranks(qwen2_moe):
    prompts = prompts_of(3)[:1]
    outputs, stats = on_two_ranks(qwen2_moe, config_of("3", None, "coherent"), prompts, [PARAMS])
    assert [o[0].token_ids for o in outputs] == tokens_alone(qwen2_moe, prompts)
    assert stats[1]["calls"] == 2 * (PARAMS.max_tokens - 1)  # two layers with experts; the first token is the prompt's


def test_prefixes_are_shared_and_sequences_put_back(qwen2_moe):
    """Blocks that other ranks' requests filled are reused, and a step without blocks pushes the youngest out."""
    prompts = prompts_of(4)
    prompts = [*prompts, prompts[5][:48] + [1, 2, 3], prompts[5][:33]]
    params = [replace(PARAMS, max_tokens=30)] * len(prompts)
    config = config_of("1.0", None, "coherent")
    with LLM(qwen2_moe, config_of("1.0", None, "all_to_all")) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    tight = replace(config, batch=replace(config.batch, kv_tokens=160))
    outputs, stats = on_two_ranks(qwen2_moe, tight, prompts, params)
    assert [o[0].token_ids for o in outputs] == expected
    assert sum(s["preemptions"] for s in stats) > 0
    assert sum(s["shared"] for s in stats) > 0


def stop_and_abort(folder: str, config: EngineConfig, prompts: list[list[int]]) -> list:
    """Rank 0 ends its second request after three tokens, rank 1 drops its second before it began."""
    with process_groups() as groups, LLM(folder, config, groups=groups) as llm:
        own = [llm.add(p, PARAMS) for p in prompts[groups.rank :: 2]]
        if groups.rank == 1:
            llm.abort(own[1:2])
        llm.engine.start()
        while llm.engine.has_work:
            llm.step()
            request = own[1].request
            if groups.rank == 0 and request.num_output == 3:
                llm.engine.finish(request, "stop")
        pool = llm.engine.scheduler.pool
        assert pool.num_available == pool.num_blocks
        assert not llm.engine.place.mode.mirror._known
        return [(g.request.tokens[g.request.num_prompt :], g.request.finish_reason) for g in own]


def test_what_one_rank_ends_all_end(qwen2_moe):
    prompts = prompts_of(5)[:5]
    expected = tokens_alone(qwen2_moe, prompts)
    first, second = spawn(2, stop_and_abort, str(qwen2_moe), config_of("1.0", None, "coherent"), prompts)
    assert [tokens for tokens, _ in first] == [expected[0], expected[2][:3], expected[4]]
    assert second == [(expected[1], "length"), ([], "abort")]
    assert [reason for _, reason in first] == ["length", "stop", "length"]


def test_a_batch_file_has_each_line_once(tmp_path):
    files = [ROOT / "examples" / "batch.jsonl", tmp_path / "two.jsonl"]
    settings = [f"--set={s}" for s in ("dtype=float32", "threads=1", "parallel.dispatcher=coherent")]
    words = [*map(str, [DEMO, *files]), "--experts-in-memory", "0.25", *settings]
    assert spawn(2, torchrun.main, words) == [0, 0]
    with LLM(DEMO, EngineConfig(dtype="float32")) as llm:
        run_batch(llm, ROOT / "examples" / "batch.jsonl", tmp_path / "one.jsonl")
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == len(results_of(tmp_path / "one.jsonl"))
    assert results_of(tmp_path / "two.jsonl") == results_of(tmp_path / "one.jsonl")


def test_a_model_whose_layers_are_not_plain_is_refused(tmp_path):
    folder = tiny_checkpoint("gpt_oss", tmp_path / "model")
    with process_groups() as groups:
        with pytest.raises(ValueError, match=r"layers of gpt_oss are not known to be plain; it works for mixtral"):
            LLM(folder, config_of("1.0", None, "coherent"), groups=groups)
        with pytest.raises(ValueError, match=r"one at a time \(batch.packed=false\)"):
            LLM(DEMO, config_of("1.0", None, "coherent", packed=False), groups=groups)
        with LLM(folder, config_of("1.0", None, "auto"), groups=groups) as llm:
            assert llm.engine.coherent is None
            assert "auto is all_to_all: layers of gpt_oss" in llm.engine.notes[-1]


def test_a_window_shorter_than_the_context_is_refused():
    config = AutoConfig.for_model("mixtral", sliding_window=16)
    assert "16 of 17 tokens" in why_not_coherent(config, 17, is_packed=True)
    assert why_not_coherent(config, 16, is_packed=True) is None
    config = AutoConfig.for_model("qwen2_moe", sliding_window=16, use_sliding_window=False)
    assert why_not_coherent(config, 17, is_packed=True) is None


def test_the_choice_follows_bytes_then_rounds():
    def no_link() -> Link:
        raise AssertionError("the links need not be measured")

    costs = Costs(kv_bytes=100, result_bytes=400, p=0.5, top_k=2, num_ranks=2)
    assert why_coherent(costs, 16, no_link) == (
        True,
        "K/V of a token for 1 other ranks 100 bytes a layer, results saved 200",
    )
    is_coherent, why = why_coherent(costs._replace(num_ranks=4), 16, no_link)
    assert not is_coherent
    assert "with 2 experts a token no round is saved" in why
    # One expert a token saves a round: 10 extra bytes for each of 10 tokens at 1 kB/s take 0.1 s.
    one = Costs(kv_bytes=70, result_bytes=400, p=0.5, top_k=1, num_ranks=4)
    assert why_coherent(one, 10, lambda: Link(1e3, 0.11))[0]
    assert not why_coherent(one, 10, lambda: Link(1e3, 0.09))[0]


def chosen(folder: str) -> str:
    with process_groups() as groups, LLM(folder, config_of("1.0", None, "auto"), groups=groups) as llm:
        assert (llm.engine.coherent is not None) == ("auto is coherent" in llm.engine.notes[-1])
        return llm.engine.notes[-1]


def test_auto_is_the_same_on_all_ranks_and_says_why(qwen2_moe):
    first, second = spawn(2, chosen, str(qwen2_moe))
    assert first == second
    assert "parallel.dispatcher=auto is all_to_all: K/V of a token for 1 other ranks 144 bytes a layer" in first


@pytest.mark.heavy
@pytest.mark.parametrize("dispatcher", ["coherent", "all_to_all"])
def test_answers_of_a_given_form_are_those_of_one_process(dispatcher):
    """A form's state is a function of the tokens: whichever rank draws the next one, all know where the answer ends."""
    forms = [
        StructuredOutputsParams(choice=["yes", "no, never", "perhaps"]),
        StructuredOutputsParams(regex="[A-Z][a-z]{2,6} (is|was) [0-9]{1,3}"),
        StructuredOutputsParams(json={"type": "array", "items": {"enum": [1, "two", None]}, "maxItems": 3}),
        None,
    ]
    params = [
        SamplingParams(max_tokens=24, temperature=1.0, seed=seed, structured_outputs=form)
        for seed, form in enumerate(forms)
    ]
    prompts = [[3, 4, 5], [7, 8], [9], [10, 11]]
    with LLM(DEMO, config_of("0.5", None, "all_to_all")) as llm:
        alone = [o.outputs[0] for o in llm.generate(prompts, params)]
    answers = spawn(2, answers_of, str(DEMO), config_of("0.5", None, dispatcher), prompts, params)
    for rank, own in enumerate(answers):
        expected = [(o.token_ids, o.text, o.finish_reason) for o in alone[rank::2]]
        assert own == expected
    assert [o.finish_reason for o in alone[:3]] == ["stop"] * 3


def answers_of(folder, config, prompts, params) -> list:
    """One rank: its share of the prompts."""
    with process_groups() as groups:
        share = slice(groups.rank, None, groups.world_size)
        with LLM(folder, config, groups=groups) as llm:
            outputs = [o.outputs[0] for o in llm.generate(prompts[share], params[share])]
            return [(o.token_ids, o.text, o.finish_reason) for o in outputs]
