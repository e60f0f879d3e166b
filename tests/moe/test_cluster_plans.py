"""Which host keeps which expert when hosts come, go and are followed: plans, without Ray."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.cluster.messages import Placed
from moe.cluster.plans import Placements, first_plan, plan_for
from moe.placement.loop import PlacementStats
from moe.placement.plan import Plan
from moe.placement.trace import RoutingTrace


@given(st.integers(1, 6), st.integers(1, 17), st.data())
@settings(deadline=None, max_examples=60)
def test_everyone_keeps_what_it_has_and_nothing_is_lost(num_ranks, num_experts, data):
    shape = 2, num_experts
    held = [
        data.draw(st.one_of(st.none(), st.just(np.array(data.draw(st.lists(
            st.lists(st.booleans(), min_size=num_experts, max_size=num_experts), min_size=2, max_size=2))))))
        for _ in range(num_ranks)
    ]  # fmt: skip
    plan = plan_for(held, shape)
    assert (plan.num_layers, plan.num_experts, plan.num_ranks) == (*shape, num_ranks)
    load = plan.hosted.sum(axis=1)  # [L, G]
    assert (load.max(axis=1) - load.min(axis=1) <= 1).all()
    for rank, own in enumerate(held):
        if own is not None:  # a rank gives away only what is beyond its part, and never takes instead
            gone, come = own & ~plan.hosted[:, :, rank], plan.hosted[:, :, rank] & ~own
            assert not (gone.any(axis=1) & come.any(axis=1)).any()


def test_a_lost_ranks_experts_go_to_those_that_are_left():
    before = plan_for([None, None, None], (2, 9))
    after = plan_for([before.hosted[:, :, 0], before.hosted[:, :, 2]], (2, 9))
    for old, new in ((0, 0), (2, 1)):
        assert (after.hosted[:, :, new] | ~before.hosted[:, :, old]).all()


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_the_successor_of_a_controller_begins_with_the_plan_as_it_was(hosts):
    hosted = Plan.contiguous(2, 6, 3).hosted.copy()
    hosted[:, 0, 0], hosted[:, 0, 2] = False, True
    hosted[:, 5, 2], hosted[:, 5, 0] = False, True  # moved while it served
    served = Plan.from_hosted(hosted)
    plan = Placements(None, served).form(list(range(hosts)), (2, 6), ["a"] * hosts)
    assert plan.num_ranks == hosts
    assert plan.hosted.any(axis=2).all()
    if hosts == 3:
        assert (plan.hosted == served.hosted).all()
    if hosts == 2:
        assert (plan.hosted[:, :, :2] >= served.hosted[:, :, :2]).all(), "each keeps what its rank had"
    if hosts == 4:
        assert (plan.hosted[:, :, :3] <= served.hosted).all(), "the newcomer takes from the others"
    assert (Placements(None).form([0, 1, 2], (2, 6), ["a"] * 3).hosted != served.hosted).any()


def test_what_moved_is_what_the_next_generation_starts_from():
    """Three hosts, a plan that moves; host 8 is lost in the middle of the last move, when only some had taken it on."""
    places, shape = Placements(None), (2, 6)
    start = places.form([7, 8, 9], shape, ["a", "a", "b"])
    states = []
    hosted = start.hosted.copy()
    for expert, rank, to in ((0, 0, 2), (5, 2, 0)):
        hosted[:, expert, rank], hosted[:, expert, to] = False, True
        states.append(Plan.from_hosted(hosted))
    told = Placed(1, 1, states[0], PlacementStats(placement_turns=1, moved_experts=2), ("moves 2",))
    assert list(places.moved(told)) == ["moves 2"]
    assert (places.plan.hosted == states[0].hosted).all()
    again = replace(told, number=2, plan=states[1], notes=("moves 2", "moves 4"), stats=PlacementStats(2, 4))
    assert list(places.moved(again)) == ["moves 4"]
    places.left(7, 0, states[1])
    places.left(9, 2, states[0])
    after = places.form([7, 9], shape, ["a", "b"]).hosted
    assert after[:, 5, 0].all(), "host 7 had taken expert 5 on"
    assert after[:, 0, 1].all(), "host 9 has expert 0 since the first move"
    assert not after[:, 0, 0].any(), "which the plan of the start gave host 7"
    assert places.stats == again.stats
    places.moved(Placed(2, 3, Plan.from_hosted(after), PlacementStats(1, 1, placement_load=1.5), ("moves 1",)))
    assert places.stats == PlacementStats(3, 5, placement_load=1.5)
    places.left(7, 0, None)  # it never began: what it has is what the plan gave it
    assert (places.form([7], shape, ["a"]).hosted[:, :, 0]).all()


def test_a_trace_is_solved_for_the_nodes_that_came(tmp_path):
    """Tokens use experts {0, 2, 4, 6} or {1, 3, 5, 7} together: each lot belongs on one node."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(4)[:2] * 2 + n % 2 for n in range(400)])[:, None].repeat(2, 1).astype(np.int16)
    trace = RoutingTrace(expert_ids=ids, sequence_lengths=np.full(40, 10, np.int32), num_experts=8, model="m")
    trace.save(tmp_path / "trace.npz")
    nodes = ("a", "a", "b", "b")
    plan = first_plan(str(tmp_path / "trace.npz"), (2, 8), nodes)
    of_node = plan.hosted.reshape(2, 8, 2, 2).any(axis=3)  # [L, E, node]
    for layer in of_node:
        assert {tuple(layer[e]) for e in (0, 2, 4, 6)} | {tuple(layer[e]) for e in (1, 3, 5, 7)} == {
            (True, False),
            (False, True),
        }
        assert len({tuple(layer[e]) for e in (0, 2, 4, 6)}) == 1
    with pytest.raises(ValueError, match=r"this run has 3 of 8 on 4"):
        first_plan(str(tmp_path / "trace.npz"), (3, 8), nodes)
    with pytest.raises(ValueError, match="rank 3 of 4 would have none"):
        Placements(None).form([0, 1, 2, 3], (2, 3), nodes)
    with pytest.raises(ValueError, match="rank 2 of 3 would have none"):  # of another number of hosts before
        Placements(None, Plan.contiguous(1, 2, 2)).form([0, 1, 2], (1, 2), ["a", "a", "b"])
    assert (first_plan(None, (2, 8), nodes).hosted == Plan.contiguous(2, 8, 4).hosted).all()
