"""Reading ahead never changes a token: right or wrong guesses, one rank or two, with and without readers for misses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parallel import PARAMS, config_of, prompts_of, tokens_alone, write_plans

import moe.offload.cache as cache_module
from moe.comm.membership import process_groups
from moe.config import EngineConfig, OffloadConfig
from moe.layer.lookahead import router_guess, transition_guess
from moe.llm import LLM
from moe.offload.prefetch import LEAST_EXPECTED
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.families import tiny_checkpoint


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory) -> Path:
    return tiny_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))


def with_prefetch(config: EngineConfig, prefetch: str) -> EngineConfig:
    return replace(config, offload=replace(config.offload, prefetch=prefetch))


def always_on(llm: LLM) -> None:
    llm.engine.experts.lookahead.prefetcher._trial = None


def total(llm: LLM, name: str) -> int:
    return sum(getattr(s, name) for s in llm.engine.layer_stats())


@pytest.mark.parametrize("prefetch", ["transition", "router"])
@pytest.mark.parametrize("budget", ["0.25", "3", "1 expert", "0.75"])
@pytest.mark.parametrize("limit", [0, 1 << 18])
def test_tokens_do_not_change(mixtral, prefetch, budget, limit, monkeypatch):
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", limit)
    prompts = prompts_of(3)
    expected = tokens_alone(mixtral, prompts)
    with LLM(mixtral, with_prefetch(config_of(budget, None, "all_to_all"), prefetch)) as llm:
        always_on(llm)
        said = [o.outputs[0].token_ids for p in prompts for o in llm.generate([p], PARAMS)]
        llm.engine.experts.cache.check()
        if budget == "0.75":  # with fewer slots there may be none to spare
            assert total(llm, "prefetch_bytes") > 0
            assert total(llm, "useful_bytes") + total(llm, "late_bytes") > 0
    assert said == expected


def test_wrong_guesses_cost_bytes_and_no_token(mixtral):
    prompts = prompts_of(4)
    expected = tokens_alone(mixtral, prompts)
    with LLM(mixtral, with_prefetch(config_of("0.5", None, "all_to_all"), "router")) as llm:
        always_on(llm)
        lookahead = llm.engine.experts.lookahead
        right = lookahead.guess

        def wrong(layer, x, ids):
            counts = right(layer, x, ids)
            return None if counts is None else (counts == 0).astype(np.float32)

        lookahead.guess = wrong
        said = [o.outputs[0].token_ids for p in prompts for o in llm.generate([p], PARAMS)]
        assert total(llm, "prefetch_bytes") > 0
        assert total(llm, "wasted_bytes") > 0
        llm.engine.experts.cache.check()
    assert said == expected


def test_the_trial_ends_with_a_verdict(mixtral):
    with LLM(mixtral, with_prefetch(config_of("0.5", None, "all_to_all"), "transition")) as llm:
        for _ in range(3):
            llm.generate(prompts_of(1)[:1], replace(PARAMS, max_tokens=60))
        prefetcher = llm.engine.experts.lookahead.prefetcher
        assert prefetcher.verdict is not None
        assert "µs per expert" in prefetcher.verdict
        assert prefetcher.is_stopped == prefetcher.verdict.startswith("stopped")


@pytest.mark.parametrize(
    ("limit", "changes", "reads"),
    [
        (0, {"budget": "0.5"}, True),
        (0, {"budget": "1.0"}, False),
        (0, {"budget": "0.5", "store": "ram"}, False),
        (0, {"budget": "0.5", "readers": 0}, False),
        (0, {"budget": "0.5", "prefetch": "off"}, False),
        (1 << 18, {"budget": "0.5"}, False),  # experts so small that the calling thread reads them
    ],
)
def test_auto_reads_ahead_where_a_layer_waits_for_others(mixtral, limit, changes, reads, monkeypatch):
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", limit)
    with LLM(mixtral, EngineConfig(dtype="float32", offload=OffloadConfig(**changes))) as llm:
        lookahead = llm.engine.experts.lookahead
        assert (lookahead is not None) is reads
        assert lookahead is None or "router_guess" in lookahead.guess.__qualname__


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_router_guess_is_the_router(family, tmp_path):
    """On the next layer's own input it says what that layer chooses (bias and groups of DeepSeek-V3 left out)."""
    folder = tiny_checkpoint(family, tmp_path / "model")
    with LLM(folder, config_of("1.0", None, "all_to_all")) as llm:
        sites, model = llm.engine.blueprint.index.sites, llm.engine.model
        guess = router_guess(model, sites, 3)
        x = torch.randn(9, sites[0].hidden_size)
        for layer, site in enumerate(sites[1:]):
            weight = model.get_submodule(site.module.rpartition(".")[0]).gate.weight
            chosen = (x @ weight.T).sigmoid().topk(3).indices
            counts = np.array([int((chosen == e).sum()) for e in range(site.num_experts)])
            expected = guess(layer, x, np.zeros((9, 3), np.int64))
            assert (expected >= LEAST_EXPECTED * counts - 1e-6).all()
            assert (expected <= counts).all()
            one = guess(layer, x[:1], np.zeros((1, 3), np.int64))
            assert np.argsort(-one)[:3].tolist() == chosen[0].tolist()  # the surest first
        assert guess(len(sites) - 1, x, np.zeros((9, 3), np.int64)) is None
        assert guess(0, x[:0], np.zeros((0, 3), np.int64)).tolist() == [0] * sites[0].num_experts
        model.get_submodule(sites[1].module.rpartition(".")[0]).gate = torch.nn.Linear(3, 5)
        with pytest.raises(ValueError, match=r"finds 0 weights of .*; set offload\.prefetch=transition"):
            router_guess(model, sites, 3)


def serve(folder: str, prompts: list, cases: list[tuple], stopped_rank: int | None, only_rank: int | None) -> list:
    """One rank's answers under every case, and how many experts it was to read ahead, in time or not."""
    answers = []
    with process_groups() as groups:
        for budget, plan, dispatcher, prefetch in cases:
            own = prompts[groups.rank :: groups.world_size]
            if only_rank is not None:
                own = prompts if groups.rank == only_rank else []
            config = with_prefetch(config_of(budget, plan, dispatcher), prefetch)
            with LLM(folder, config, groups=groups) as llm:
                always_on(llm)
                prefetcher = llm.engine.experts.lookahead.prefetcher
                prefetcher.is_stopped = groups.rank == stopped_rank
                cache, asked = llm.engine.experts.cache, []
                prefetch = cache.prefetch
                cache.prefetch = lambda *ask, tell=asked, to=prefetch: (tell.append(len(ask[1])), to(*ask))
                said = [o.outputs[0].token_ids for o in llm.generate(own, PARAMS)]
                cache.check()
                answers.append((said, sum(asked)))
    return answers


def test_two_ranks_read_ahead_and_say_what_one_says(deepseek_v3, tmp_path):
    prompts = prompts_of(2)
    expected = tokens_alone(deepseek_v3, prompts)
    replicated = write_plans(tmp_path, 2, 8, 2)[-1]
    cases = [
        ("0.5", None, "all_to_all", "router"),
        ("3", replicated, "hierarchical", "transition"),
        ("0.5", None, "all_to_all", "learned"),  # ranks have seen unequally many tokens, and gather all the same
    ]
    answers = spawn(2, serve, str(deepseek_v3), prompts, cases, None, None, ranks_per_node=1)
    for rank, own in enumerate(answers):
        assert [said for said, _ in own] == [expected[rank::2]] * 3
    assert all(own[0][1] > 0 for own in answers)


def test_a_rank_that_stopped_and_one_without_prompts_keep_the_collective(deepseek_v3):
    prompts = prompts_of(5)
    expected = tokens_alone(deepseek_v3, prompts)
    case = [("0.5", None, "all_to_all", "router")]
    (none, _), (own, ahead) = (a[0] for a in spawn(2, serve, str(deepseek_v3), prompts, case, 1, 1))
    assert none == []
    assert own == expected
    assert ahead == 0
    (_, ahead), _ = (a[0] for a in spawn(2, serve, str(deepseek_v3), prompts, case, 1, 1))
    assert ahead > 0  # rank 0 has no token of its own: all that it reads is for rank 1's


def what_is_asked(plan: str) -> list:
    """Rank r expects 1 + r + e/8 tokens for expert e in every layer; returns what this rank was told to expect."""
    with process_groups() as groups:
        config = with_prefetch(config_of("0.5", plan, "all_to_all"), "transition")
        with LLM(Path(plan).parent / "model", config, groups=groups) as llm:
            lookahead = llm.engine.experts.lookahead
            told = []
            lookahead.guess = lambda layer, x, ids: None if layer else (1 + groups.rank + np.arange(8) / 8)
            lookahead.prefetcher.ask = lambda layer, expected: told.append((layer, expected.tolist()))
            llm.generate(prompts_of(1)[:1], replace(PARAMS, max_tokens=2))
            return told


def test_a_rank_is_told_what_all_ranks_will_ask_of_it(tmp_path):
    tiny_checkpoint("deepseek_v3", tmp_path / "model")
    hosted = np.zeros((2, 8, 2), bool)
    hosted[:, :5, 0] = hosted[:, 4:, 1] = True  # 4 is on both
    plan = Plan.from_hosted(hosted)
    plan.save(tmp_path / "plan.json")
    first, second = spawn(2, what_is_asked, str(tmp_path / "plan.json"))
    counts = [[1 + r + e / 8 for e in range(8)] for r in range(2)]
    both = [a + b for a, b in zip(*counts)]
    assert len(first) == len(second) > 0
    assert all(said == (1, [*both[:4], counts[0][4], 0, 0, 0]) for said in first)
    assert all(said == (1, [0, 0, 0, 0, counts[1][4], *both[5:]]) for said in second)


def refuse_coherent(folder: str) -> tuple[str, list[str]]:
    with process_groups() as groups:
        with pytest.raises(ValueError, match="coherent cannot serve") as error:
            LLM(folder, with_prefetch(config_of("0.5", None, "coherent"), "router"), groups=groups)
        with LLM(folder, with_prefetch(config_of("0.5", None, "auto"), "router"), groups=groups) as llm:
            return str(error.value), llm.engine.notes


def test_coherent_decode_refuses_it(deepseek_v3):
    said, notes = spawn(2, refuse_coherent, str(deepseek_v3))[0]
    assert "offload.prefetch=router is set, which follows tokens that stay on their rank" in said
    assert any("auto is all_to_all: offload.prefetch=router" in note for note in notes)


def test_prefetch_needs_readers():
    with pytest.raises(ValueError, match=r"offload\.prefetch=router needs a thread .* set offload\.readers=2"):
        OffloadConfig(prefetch="router", readers=0)
    assert transition_guess([4, 4], 2)(1, torch.zeros(0, 3), np.zeros((0, 2), np.int64)) is None
