"""Simulation against a loop over tokens; pages and commands that work."""

import argparse
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from moe.launch.cli import _function
from moe.launch.place_options import add_parsers
from moe.placement.plan import Plan
from moe.placement.simulate import Workload, deal_evenly, simulate
from moe.placement.stats.affinity import heaviest_experts
from moe.placement.stats.report import (
    Picture,
    analyse,
    bars_svg,
    domain_distances,
    grid_svg,
    heatmap_svg,
    save_png,
)
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes, WireFormat
from tests.patience import PATIENCE_S
from tests.placement.instances import random_hosted, topic_trace

HIERARCHICAL = Workload(wire=WireFormat(dispatcher="hierarchical"))
PAIR = Topology.preset("2xh200x2")


@pytest.mark.parametrize("dispatcher", ["all_to_all", "hierarchical", "coherent"])
@pytest.mark.parametrize("combine", ["partial", "exact"])
@pytest.mark.parametrize("split", ["local", "even"])
def test_simulation_equals_a_loop_over_tokens(dispatcher, combine, split):
    trace = topic_trace(90, 3, 8, 3, seed=4, length=15)
    plan = Plan.random(3, 8, 4, seed=1)  # without replicas the choice is no choice, so the loop below needs none
    wire = WireFormat(dispatcher=dispatcher, combine=combine)
    work = Workload(
        batch=32, wire=wire, split=split, steps="decode" if dispatcher == "coherent" else "prefill", payload_bytes=3
    )
    row, result = 5 * 2 + 3 * (4 if combine == "exact" and dispatcher != "coherent" else 8), 5 * 2
    got = simulate(trace, plan, PAIR, work)
    owner, heavy = plan.assignment, heaviest_experts(trace)
    links, copies, nodes, load = np.zeros((4, 4), int), 0, 0, np.zeros((3, 4), int)

    def send(source: int, to: int, size: int) -> int:
        links[source, to] += size * (source != to)
        return int(source != to)

    at = -1
    for t in range(90):
        if t % 15 == 0 or (dispatcher == "coherent" and t % 3 == 0) or dispatcher != "coherent":  # pieces of 90 / 32
            at = (t // 15) % 4
        for layer in range(3):
            experts = [int(owner[layer, e]) for e in trace.expert_ids[t, layer]]
            ranks = set(experts)
            after = int(owner[layer, heavy[t, layer]]) if dispatcher == "coherent" else at
            nodes += len({r // 2 for r in ranks} - {at // 2})
            for node in {r // 2 for r in ranks} if dispatcher == "hierarchical" else ():
                relay = 2 * node + at % 2
                copies += send(at, relay, row)
                send(relay, at, result * (sum(r // 2 == node for r in experts) if combine == "exact" else 1))
            for r in ranks:
                source, to = (2 * (r // 2) + at % 2,) * 2 if dispatcher == "hierarchical" else (at, after)
                copies += send(source, r, row)
                send(r, to, result * (experts.count(r) if combine == "exact" else 1))
            for e in trace.expert_ids[t, layer]:
                load[layer, owner[layer, e]] += 1
            send(at, after, 3)
            at = after
    np.testing.assert_array_equal(got.link_bytes, links)
    np.testing.assert_array_equal(got.load, load)
    assert got.copies == pytest.approx(copies / 90 / 3)
    assert got.bytes == pytest.approx(links.sum() / 90 / 3)
    assert got.node_copies == pytest.approx(nodes / 90 / 3)
    assert got.num_steps == 3
    assert got.misses == 0
    assert got.step_seconds * 3 == pytest.approx(got.all_to_all_seconds + got.expert_seconds)


def test_misses_fall_with_slots_and_vanish_when_all_fit():
    trace = topic_trace(200, 3, 8, 2, seed=1)
    plan = Plan.contiguous(3, 8, 4)
    misses = [simulate(trace, plan, PAIR, Workload(batch=8, fast_slots=s)).misses for s in (1, 3, 5, 6)]
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] == 24  # every expert once
    assert simulate(trace, plan, PAIR, Workload(batch=8)).misses == 0


def test_replicas_cut_copies_and_load():
    trace = topic_trace(300, 2, 8, 2, seed=7)
    everywhere = Plan.from_hosted(np.ones((2, 8, 4), bool))
    assert simulate(trace, everywhere, PAIR).copies == 0
    even = simulate(trace, everywhere, PAIR, Workload(split="even"))
    assert even.copies > 1
    assert even.imbalance < 1.1


def test_even_dealing_gives_every_copy_the_same_share():
    plan = Plan.from_hosted(random_hosted(np.random.default_rng(3), layers=1, share=0.5))
    ids = topic_trace(101, 1, 8, 3, seed=2).expert_ids[:, 0].copy()
    ids[::7, 1] = -1
    physical = deal_evenly(ids, plan.log2phy[0])
    np.testing.assert_array_equal(np.where(physical >= 0, plan.phy2log[0][physical], -1), ids)
    for expert in range(8):
        copies = plan.log2phy[0, expert][plan.log2phy[0, expert] >= 0]
        counts = [int((physical == p).sum()) for p in copies]
        assert max(counts) - min(counts) <= 1


def test_mismatches_are_refused():
    trace = topic_trace(40, 2, 8, 2)
    with pytest.raises(ValueError, match="3 of 8"):
        simulate(trace, Plan.contiguous(3, 8, 4), PAIR)
    with pytest.raises(ValueError, match="4 ranks, the topology has 8"):
        simulate(trace, Plan.contiguous(2, 8, 4), Topology.preset("h200x8"))
    with pytest.raises(ValueError, match="different models: other, synthetic"):
        simulate(trace, Plan.contiguous(2, 8, 4).with_result(model="other"), PAIR)
    with pytest.raises(ValueError, match="empty"):
        simulate(trace.select([]), Plan.contiguous(2, 8, 4), PAIR)
    with pytest.raises(ValueError, match="nodes have 1, 3 ranks"):
        simulate(trace, Plan.contiguous(2, 8, 4), Topology(node_of_rank=(0, 1, 1, 1)), HIERARCHICAL)
    with pytest.raises(ValueError, match="fast_slots"):
        Workload(fast_slots=0)


def test_analysis_has_the_published_measures():
    trace = topic_trace(400, 3, 16, 3, seed=1, length=40)
    found = analyse(trace)
    assert 0 < found["srp"] < 1
    assert 0 < found["affinity"] < 1
    assert [c["slots"] for c in found["cache"]] == sorted(c["slots"] for c in found["cache"])
    assert all(c["oracle"] >= c["lru"] - 0.02 for c in found["cache"])
    distances = domain_distances([trace, topic_trace(400, 3, 16, 3, seed=9, length=40)])
    assert distances[0, 0] == 0
    assert distances[0, 1] > 0.1


def picture(values):
    return Picture(values, "layer", "expert", "tokens")


def test_pictures_have_axes_scales_and_legends():
    """Every text lies inside of the picture."""
    load = np.arange(12.0).reshape(3, 4) * 1000
    heat = heatmap_svg(picture(load), title="Load", cell=8)
    assert all(f">{text}</text>" in heat for text in ("layer 0", "0", "3", "expert", "11,000 tokens"))
    assert "Rows: layer; columns: expert; darker: more tokens, up to 11,000." in heat
    links = heatmap_svg(Picture(load, "sending rank", "receiving rank", "bytes"), title="Links", cell=24)
    assert ">sending rank 0<" not in links, "it would be cut"
    plan = Plan.contiguous(3, 64, 8)
    grid = grid_svg(plan, title="Experts", load=np.ones((3, 64)))
    assert ">rank 7</text>" in grid
    assert "busiest expert of the layer" in grid
    bars = bars_svg({"a & b": np.ones(3), "c": np.array([0.5, 2, 1])}, title="Copies", unit="copies per token")
    assert "copies per token: " in bars
    assert "a &amp; b" in bars
    assert ">2</text>" in bars
    for one in (heat, links, grid, bars):
        svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", one)[0])
        _, _, width, height = map(float, svg.get("viewBox").split())
        least = float(re.search(r"min-width:(\d+)px", svg.get("style"))[1])
        assert 11 * least / width >= 8.5, "on a phone its letters could not be read"
        for text in svg.iter("{http://www.w3.org/2000/svg}text"):
            x, y, wide = float(text.get("x")), float(text.get("y")), 6.2 * len(text.text)
            start = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
            assert start >= 0, text.text
            assert start + wide <= width, text.text
            assert 0 < y <= height, text.text


def test_pictures_without_matplotlib_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"moeflow\[bench\]"):
        save_png(tmp_path / "x.png", {"a": picture(np.eye(3))})


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    save_png(tmp_path / "x.png", {"a": picture(np.eye(3)), "b": picture(np.ones((2, 2)))})
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args([str(a) for a in arguments])
    return int(_function(args.run)(args))


@pytest.mark.parametrize("objective", ["bytes", "copies", "coherent", "transitions"])
def test_commands_from_trace_to_picture(tmp_path, capsys, objective):
    trace = topic_trace(400, 3, 16, 3, seed=1, length=20)
    trace.save(tmp_path / "t.npz")
    page, out = tmp_path / "p.html", tmp_path / "plan.json"
    assert run("analyze", tmp_path / "t.npz", "--html", page, "--against", tmp_path / "t.npz") == 0
    assert "<svg" in page.read_text()
    options = ["--topology", "laptopx4", "--seconds", 1, "--objective", objective, "--html", page]
    replicas = [] if objective == "transitions" else ["--replicas", 0.25]
    assert run("place", tmp_path / "t.npz", "--out", out, *options, *replicas) == 0
    plan = Plan.load(out)
    assert plan.model == "synthetic"
    assert plan.num_physical == (16 if objective == "transitions" else 20)
    assert page.read_text().count("<svg") == 3
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")  # needs no other file
    assert run("simulate", tmp_path / "t.npz", out, "--topology", "laptopx4", "--html", page, "--fast-slots", 4) == 0
    printed = capsys.readouterr().out
    assert "eplb greedy" in printed
    assert "distance of the load" in printed
    assert "what reading ahead can win" in printed
    assert ("gap" in printed) == (objective == "transitions")
    with pytest.raises(ValueError, match="4 ranks, the topology has 2"):
        run("simulate", tmp_path / "t.npz", out, "--topology", "laptopx2")


def test_place_from_a_running_plan_reports_the_migration(tmp_path, capsys):
    trace = topic_trace(800, 2, 16, 3, seed=1)
    trace.save(tmp_path / "t.safetensors")
    Plan.random(2, 16, 4).save(tmp_path / "old.json")
    options = ["--topology", "laptopx4", "--seconds", PATIENCE_S, "--rounds", 20, "--present", tmp_path / "old.json"]
    assert run("place", tmp_path / "t.safetensors", "--out", tmp_path / "n.json", *options) == 0
    assert "pays back after" in capsys.readouterr().out
    options[-1] = tmp_path / "n.json"  # the best that is found from there: no seconds, no search
    assert run("place", tmp_path / "t.safetensors", "--out", tmp_path / "m.json", *options, "--rounds", 0) == 0
    fit, _ = trace.split(0.8, 0)
    old, new = (simulate(fit, Plan.load(tmp_path / f"{n}.json"), Topology.preset("laptopx4")).bytes for n in "nm")
    assert new <= old


def test_more_replicas_than_ranks_have_places_for_are_refused(tmp_path):
    trace, out = tmp_path / "t.npz", tmp_path / "plan.json"
    topic_trace(100, 2, 16, 3).save(trace)
    options = ["--topology", "laptopx4", "--seconds", 1, "--out", out]
    assert run("place", trace, *options, "--replicas", 3) == 0
    assert Plan.load(out).num_physical == 64
    out.unlink()
    with pytest.raises(ValueError, match=r"3 puts all of them on each of 4 ranks; give 0\.0625 for each spare slot"):
        run("place", trace, *options, "--replicas", 8)
    assert not out.exists()


def test_memory_that_is_too_small_is_refused_with_the_bytes(tmp_path):
    topic_trace(100, 2, 16, 3).save(tmp_path / "t.npz")
    Topology.uniform(1, 2, fast_bytes=(5000, 5000), host_bytes=(10000,)).save(tmp_path / "t.json")
    options = ["--out", tmp_path / "p.json", "--topology", tmp_path / "t.json"]
    with pytest.raises(ValueError, match="32000 bytes, fast and host memory hold 20000: 12000 bytes are missing"):
        run("place", tmp_path / "t.npz", *options)


def test_traces_of_top_1_and_single_layer_work(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4, (60, 1, 1)).astype(np.int16)
    RoutingTrace(expert_ids=ids, sequence_lengths=np.full(6, 10, np.int32), num_experts=4, model="m").save(
        tmp_path / "t.npz"
    )
    sizes = ["--sizes", "8,bfloat16,100"]
    assert run("analyze", tmp_path / "t.npz") == 0
    assert (
        run(
            "place",
            tmp_path / "t.npz",
            "--out",
            tmp_path / "p.json",
            "--topology",
            "laptopx2",
            "--seconds",
            0.5,
            *sizes,
        )
        == 0
    )
    assert Plan.load(tmp_path / "p.json").sizes == ModelSizes(hidden_size=8, dtype="bfloat16", expert_bytes=100)
    assert run("simulate", tmp_path / "t.npz", tmp_path / "p.json", "--topology", "laptopx2") == 0


def test_without_sizes_a_plan_follows_copies_and_nothing_is_said_of_bytes(tmp_path, capsys):
    replace(topic_trace(), sizes=None).save(tmp_path / "t.npz")
    options = ("--topology", "laptopx2", "--seconds", 1, "--rounds", 1)
    assert run("place", tmp_path / "t.npz", "--out", tmp_path / "p.json", *options) == 0
    said = capsys.readouterr()
    assert "does not say the model's sizes: placed by copies" in said.err
    row = next(line for line in said.out.splitlines() if "this plan" in line)
    assert row.count("?") == 4  # bytes, across nodes, both times
    assert "copies per token and layer; " in said.out
    plan = Plan.load(tmp_path / "p.json")
    assert (plan.sizes, plan.objective[:5]) == (None, "ranks")
    unknown = "record it again, or state them once with --sizes"
    with pytest.raises(ValueError, match=unknown):
        run("place", tmp_path / "t.npz", "--out", tmp_path / "q.json", *options, "--objective", "bytes")
    with pytest.raises(ValueError, match=unknown):
        run("place", tmp_path / "t.npz", "--out", tmp_path / "q.json", *options, "--present", tmp_path / "p.json")
    with pytest.raises(ValueError, match=unknown):
        run("simulate", tmp_path / "t.npz", tmp_path / "p.json", "--topology", "laptopx2")


def test_one_turn_of_the_loop_by_hand(tmp_path, capsys):
    """Tokens that all take two experts of rank 0: one of them goes elsewhere; even ones: the plan stays as it is."""
    rng = np.random.default_rng(3)
    even = np.stack([rng.permuted(np.tile(np.arange(16), (400, 1)), axis=1)[:, :2] for _ in range(2)], axis=1)
    skewed = np.where(rng.random((400, 2, 1)) < 0.8, np.array([0, 1]), even)
    lengths = np.full(20, 20, np.int32)
    sizes = ModelSizes(hidden_size=64, dtype="bfloat16", expert_bytes=1000)
    Plan.contiguous(2, 16, 4).save(tmp_path / "old.json")
    options = ["--topology", "laptopx4", "--present", tmp_path / "old.json", "--out", tmp_path / "new.json"]
    for name, ids in (("even", even), ("skewed", skewed)):
        RoutingTrace(
            expert_ids=ids.astype(np.int16), sequence_lengths=lengths, num_experts=16, model="m", sizes=sizes
        ).save(tmp_path / f"{name}.npz")
        assert run("place", tmp_path / f"{name}.npz", "--window", 256, *options) == 0
        printed, new = capsys.readouterr().out, Plan.load(tmp_path / "new.json")
        moved = (new.hosted & ~Plan.contiguous(2, 16, 4).hosted).sum()
        if name == "even":
            assert "the present plan stays: on tokens that they were not found on" in printed
            assert moved == 0
        else:
            assert "copies move" in printed
            assert 0 < moved <= 0.15 * new.hosted.sum()
            assert (new.hosted.sum(axis=2) == 1).all()
    with pytest.raises(ValueError, match="name it with --present PLAN"):
        run("place", tmp_path / "even.npz", "--window", 256, *options[:2], *options[4:])
    with pytest.raises(ValueError, match="leave out --objective"):
        run("place", tmp_path / "even.npz", "--window", 256, "--replicas", 0.5, *options)
    with pytest.raises(ValueError, match=r"window \(4\) must be >= 8"):
        run("place", tmp_path / "even.npz", "--window", 4, *options)
