"""Plans are always valid and survive storage; topologies say what is wrong with them; baselines keep their promises."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.placement.plan import Plan, check_capacity, even_capacities, merge_models
from moe.placement.solve.baselines import eplb_greedy, replicate_hottest
from moe.placement.topology import H200_NVLINK, ExpertCost, Link, Topology, fit_link, probe_link

PLAN_FIELDS = ("num_experts", "num_ranks", "model", "solver", "objective", "value", "bound")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_hosted_round_trip_and_derived_maps(experts, ranks, layers, seed):
    rng = np.random.default_rng(seed)
    hosted = rng.random((layers, experts, ranks)) < 0.4
    hosted[np.arange(layers)[:, None], np.arange(experts), rng.integers(0, ranks, (layers, experts))] = True
    plan = Plan.from_hosted(hosted)
    np.testing.assert_array_equal(plan.hosted, hosted)
    np.testing.assert_array_equal(plan.replicas, hosted.sum(axis=2))
    for layer in range(layers):
        for expert in range(experts):
            copies = [int(p) for p in plan.log2phy[layer, expert] if p >= 0]
            assert copies == np.flatnonzero(plan.phy2log[layer] == expert).tolist()
            assert sorted(plan.rank_of_physical()[copies]) == np.flatnonzero(hosted[layer, expert]).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 6), st.integers(0, 1000))
def test_eplb_fills_the_slots_and_keeps_replicas_apart(experts, ranks, spare, seed):
    load = np.random.default_rng(seed).random((2, experts)) ** 3
    slots = -(-experts // ranks) + spare
    plan = eplb_greedy(load, ranks, slots)
    assert (plan.hosted.sum(axis=1) <= slots).all()
    assert (plan.hosted.sum(axis=(1, 2)) == min(ranks * slots, experts * ranks)).all()
    assert (eplb_greedy(load, ranks).replicas == 1).all()


def test_eplb_balances_better_than_contiguous():
    load = np.random.default_rng(0).random((4, 32)) ** 4
    plans = [eplb_greedy(load, 4, 9), eplb_greedy(load, 4), Plan.contiguous(4, 32, 4)]
    busiest = [((p.hosted * (load / p.replicas)[:, :, None]).sum(axis=1).max(axis=1)).mean() for p in plans]
    assert busiest[0] < busiest[1] < busiest[2]
    assert replicate_hottest(np.array([4.0, 1, 1]), 3, 2).tolist() == [2, 2, 2]


@pytest.mark.parametrize("make", [Plan.contiguous, Plan.round_robin, Plan.random])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (7, 3), (2, 4)])
def test_plain_baselines_differ_by_at_most_one_expert(make, experts, ranks):
    plan = make(3, experts, ranks)
    assert sorted(plan.hosted[0].sum(axis=0)) == sorted(even_capacities(experts, ranks))
    assert (plan.replicas == 1).all()


def test_save_load(tmp_path):
    plan = Plan.random(2, 7, 3, seed=4).with_result(value=0.5, bound=0.4, seconds=1.0, objective="x", model="m")
    plan.save(tmp_path / "p.json")
    again = Plan.load(tmp_path / "p.json")
    np.testing.assert_array_equal(again.phy2log, plan.phy2log)
    for name in PLAN_FIELDS:
        assert getattr(again, name) == getattr(plan, name)
    assert again.gap == pytest.approx(0.2)
    former = json.loads((tmp_path / "p.json").read_text()) | {"fast_slots": None, "host_slots": [9]}
    (tmp_path / "former.json").write_text(json.dumps(former))
    np.testing.assert_array_equal(Plan.load(tmp_path / "former.json").phy2log, plan.phy2log)
    for text, message in (("{", "not JSON"), ("{}", "not a plan"), ('{"format": "moe-plan-1"}', "missing")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Plan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phy2log": [[0, 1, 2, 2]]}, "rank 1 holds expert 2 twice"),
        ({"phy2log": [[0, 1, 2, 0]]}, "expert 3 is on no rank"),
        ({"phy2log": [[0, 1, 2, 4]]}, "names experts 0..4"),
        ({"phy2log": [[0, 1, 2]]}, "not a multiple of 2"),
        ({"phy2log": [[0.5, 1, 2, 3]]}, "integers"),
        ({"value": 1.0, "bound": 2.0}, "exceeds"),
        ({"num_ranks": 0}, "at least 1"),
    ],
)
def test_invalid_plans_are_refused(fields, message):
    given_fields = {"num_experts": 4, "num_ranks": 2, "phy2log": [[0, 1, 2, 3]]} | fields
    with pytest.raises(ValueError, match=message):
        Plan(**given_fields | {"phy2log": np.array(given_fields["phy2log"])})


def test_ranks_without_any_expert_are_named():
    Plan.contiguous(3, 5, 4).check_ranks()
    with pytest.raises(ValueError, match="ranks 2, 3 of 4 would have none of the 2 experts of a layer"):
        Plan.contiguous(3, 2, 4).check_ranks()
    Plan.from_hosted(np.ones((3, 2, 4), np.bool_)).check_ranks()


def test_capacity_and_model_errors_have_the_numbers():
    check_capacity(8, 2, 4)
    with pytest.raises(ValueError, match="2 slots are missing, 20 bytes"):
        check_capacity(8, 2, 3, expert_bytes=10)
    assert merge_models(["a", "", "a"]) == "a"
    with pytest.raises(ValueError, match="a, b"):
        merge_models(["a", "b"])
    with pytest.raises(ValueError, match="have replicas"):
        _ = Plan.from_hosted(np.ones((1, 2, 2), bool)).assignment
    with pytest.raises(ValueError, match=r"ranks 0\.\.1"):
        Plan.from_assignment(np.array([[0, 2]]), 2)


def test_topology_presets_files_and_hosts(tmp_path):
    topology = Topology.preset("2xh200x4")
    assert (topology.num_ranks, topology.num_nodes) == (8, 2)
    cost = topology.link_cost()
    assert cost[0, 0] == 0
    assert cost[0, 1] == 1
    assert cost[0, 4] == pytest.approx(topology.intra.bandwidth / topology.inter.bandwidth)
    topology.save(tmp_path / "t.json")
    assert Topology.load(tmp_path / "t.json") == topology
    (tmp_path / "t.json").write_text('{"node_of_rank": [0], "speed": 3}')
    with pytest.raises(ValueError, match="speed"):
        Topology.load(tmp_path / "t.json")
    assert Topology.from_hosts(["a", "b", "a"]).node_of_rank == (0, 1, 0)
    with pytest.raises(ValueError, match="unknown topology"):
        Topology.preset("tpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"node_of_rank": ()}, "at least one rank"),
        ({"node_of_rank": (0, 2)}, "without holes"),
        ({"node_of_rank": (0, 0, 1), "intra": Link(0.0, 0.0)}, r"ranks \[0, 1\] are unreachable"),
        ({"node_of_rank": (0, 1), "inter": Link(float("inf"), 0.0)}, "unreachable: the inter"),
        ({"node_of_rank": (0, 1), "inter": Link(1.0, -1.0)}, "latency"),
        ({"node_of_rank": (0, 1), "fast_bytes": (1,)}, "must hold 2 numbers"),
        ({"node_of_rank": (0,), "experts": ExpertCost(0.0, 1.0, 0.0, 1.0)}, "three rates > 0"),
    ],
)
def test_broken_topologies_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Topology(**fields)


def test_links_are_recovered_from_timings():
    link = Link(5e9, 2e-5)
    found = probe_link(link.seconds, [1000, 10**6, 10**8])
    assert found.bandwidth == pytest.approx(5e9, rel=1e-6)
    assert found.latency == pytest.approx(2e-5, rel=1e-6)
    with pytest.raises(ValueError, match="two or more different sizes"):
        fit_link([5, 5], [1.0, 1.0])
    with pytest.raises(ValueError, match="do not grow"):
        fit_link([1, 10**6], [1.0, 1e-3])


def test_a_disturbed_probe_is_repeated():
    times = iter([9.0, 1.0, 1e-3, 2.0])  # at first something else ran: 1 kB took longer than 1 MB
    assert probe_link(lambda _: next(times), [1000, 10**6], repeats=1) == fit_link([1000, 10**6], [1e-3, 1.0])
    with pytest.raises(ValueError, match="do not grow"):
        probe_link(lambda num_bytes: 1 / num_bytes, [1000, 10**6], repeats=1)


def test_h200_preset_fits_the_recorded_all_to_all(shared_data):
    """Bytes that leave a rank, (G - 1) / G of the message; times within a factor 1.6 over six decades of size."""
    with (shared_data / "hardware" / "h200_nccl_2.29.2.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["op_name"] == "alltoall" and r["nccl_dtype"] == "half"]
    assert len(rows) > 50
    for row in rows:
        ranks = int(row["num_gpus"])
        sent = int(row["message_size"]) * 2 * (ranks - 1) / ranks
        assert 1 / 1.6 < H200_NVLINK.seconds(sent) / (float(row["latency"]) * 1e-3) < 1.6


def test_a_topology_of_too_many_ranks_is_refused_before_anything_of_its_size_is_made():
    for make in (lambda: Topology.preset("h200x99999999999"), lambda: Topology(node_of_rank=(0,) * 4097)):
        with pytest.raises(ValueError, match="ranks are more than a topology may have, 4096"):
            make()
    assert Topology.preset("8xh200x8").num_ranks == 64
