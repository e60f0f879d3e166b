"""Ranks of a node get cores of their own while they are together, and all of theirs again afterwards."""

import os
import threading

import pytest

from moe.comm.cores import allowed_cores, beside, from_text, run_on, share_of, to_text
from moe.comm.membership import leave_groups, start_groups
from tests.distributed import spawn
from tests.patience import PATIENCE_S


def cores(*numbers):
    return frozenset(numbers)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_equal_shares_cover_what_is_allowed_once(count):
    allowed = cores(*range(3, 11), 40)
    shares = [share_of([allowed] * count, i) for i in range(count)]
    assert sorted(core for share in shares for core in share) == sorted(allowed)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_cores_than_processes_are_not_divided():
    assert share_of([cores(0, 1)] * 3, 2) == cores(0, 1)


def test_who_was_put_on_cores_of_its_own_keeps_them():
    allowed = [cores(0, 1), cores(2, 3), cores(2, 3), cores()]
    assert [share_of(allowed, i) for i in range(4)] == [cores(0, 1), cores(2), cores(3), cores()]


def test_other_work_runs_where_ranks_have_more_cores_than_threads():
    assert beside([cores(0), cores(1, 2)], threads=1) == cores(1, 2)
    assert beside([cores(0, 1), cores(2, 3)], threads=1) == cores(0, 1, 2, 3)
    assert beside([cores(0), cores(1)], threads=1) == cores(0, 1)
    assert beside([cores(0, 1), cores(2, 3)], threads=2) == cores(0, 1, 2, 3)
    assert beside([], threads=1) == beside([cores(), cores()], threads=1) == cores()


def test_they_travel_as_text():
    assert from_text(to_text(cores(7, 0, 12))) == cores(0, 7, 12)
    assert from_text(to_text(cores())) == cores()


def test_where_threads_may_not_be_moved_they_stay_and_that_is_said(monkeypatch, caplog):
    def refuses(thread, where):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", refuses, raising=False)
    run_on({0, 1})
    assert "not on 0,1: not here" in caplog.text


def while_together():
    """Cores of a thread from before the groups, of this one, of one that begins later, and of this one at the end."""
    found, begin = [], threading.Event()

    def look():
        begin.wait(PATIENCE_S)
        found.append(os.sched_getaffinity(0))

    early = threading.Thread(target=look)
    early.start()
    before, groups = allowed_cores(), start_groups()
    begin.set()
    early.join()
    found.append(os.sched_getaffinity(0))
    late = threading.Thread(target=look)
    late.start()
    late.join()
    told = list(groups.cores)
    leave_groups(groups)
    return before, found, told, os.sched_getaffinity(0)


@pytest.mark.skipif(len(allowed_cores()) < 2, reason="needs two cores, and a system that says which")
def test_ranks_of_a_node_run_on_cores_of_their_own():
    answers = spawn(2, while_together)
    for rank, (before, found, told, after) in enumerate(answers):
        assert before == after == allowed_cores()
        assert found == [set(share_of([before] * 2, rank))] * 3
        assert told == [share_of([before] * 2, r) for r in range(2)]
    assert not answers[0][1][0] & answers[1][1][0]


def test_ranks_of_different_nodes_are_left_alone():
    for before, found, told, _ in spawn(2, while_together, ranks_per_node=1):
        assert found == [before] * 3
        assert told == [before]
