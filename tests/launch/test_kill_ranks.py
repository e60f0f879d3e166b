"""A sample of the random kills of `python -m tests.launch.kill_ranks`."""

import pytest

from moe.config import EngineConfig
from moe.llm import LLM
from tests.launch import kill_ranks


@pytest.mark.heavy
def test_a_killed_rank_costs_no_finished_line(tmp_path):
    seeds = (4, 11, 38)
    assert {kill_ranks.case_of(seed).dispatcher for seed in seeds} == {"all_to_all", "hierarchical", "coherent"}
    kill_ranks.write_requests(tmp_path / "in.jsonl")
    with LLM(kill_ranks.DEMO, EngineConfig(dtype="float32")) as llm:
        right = kill_ranks.right_answers(llm, tmp_path)
        for seed in seeds:
            while True:  # until the kill was not too late
                seen = kill_ranks.one_kill(kill_ranks.case_of(seed), tmp_path, llm, right, 0.0, heard=True)
                assert seen.faults == (), seen
                if seen.victim >= 0:
                    break
            assert f"lost rank {seen.victim} in" in seen.sentence, seen
