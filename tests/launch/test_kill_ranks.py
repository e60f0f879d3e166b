"""A sample of the random kills; the whole table is in bench/results/kills.md."""

import pytest

from tests.launch import kill_ranks


@pytest.mark.heavy
def test_a_killed_rank_costs_no_finished_line(tmp_path):
    kill_ranks.write_requests(tmp_path / "in.jsonl")
    _, seconds = kill_ranks.run_whole(kill_ranks.Case(-1, 2, "all_to_all", "1.0", None, 1.0), tmp_path, "whole.jsonl")
    right, faults = kill_ranks.answers(tmp_path / "whole.jsonl")
    assert len(right) == kill_ranks.NUM_LINES
    assert faults == []
    seeds = (4, 11, 38)
    assert {kill_ranks.case_of(seed).dispatcher for seed in seeds} == {"all_to_all", "hierarchical", "coherent"}
    for seed in seeds:
        seen = kill_ranks.one_kill(kill_ranks.case_of(seed), tmp_path, right, seconds)
        assert seen.faults == (), seen
