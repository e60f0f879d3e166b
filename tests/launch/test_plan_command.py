"""`moe plan` in words: what a model would do, from stored figures, here or with another disk, memory or link."""

from pathlib import Path

import pytest

from moe.engine.choices import this_machine
from moe.launch.cli import main
from moe.launch.plan import even_routing, replay, settled, sizes_of
from moe.models.blueprint import read_blueprint
from moe.offload.policy import Access, Lfu, misses_of, simulate
from moe.placement.cost import Use
from moe.placement.machine import Attention, Machine, Overhead, Rate, Reads, disk_of, save_machine

TINYMOE = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"


@pytest.fixture
def probe_file(tmp_path):
    rates = [Rate(work, "bfloat16", 1, 1, 1e-10) for work in ("expert", "dense")]
    reads = [Reads(how, 1 << 18, depth, 1e9) for how in ("direct", "cached") for depth in (1, 2)]
    machine = Machine(
        name=this_machine(),
        when="today",
        cores=2,
        memory={1: 1e10},
        rates=tuple(rates),
        attention=Attention(1e9, 1e10),
        overhead=Overhead(*[1e-4] * 9),
        copy_bytes_per_s=1e9,
        disks={disk_of(TINYMOE): tuple(reads)},
    )
    save_machine(tmp_path / "probe.json", machine)
    return str(tmp_path / "probe.json")


def plan(capfd, *words):
    status = main(["plan", str(TINYMOE), *map(str, words)])
    out, err = capfd.readouterr()
    return status, out, err


def test_a_slower_disk_makes_reads_bind(capfd, probe_file):
    status, out, _ = plan(capfd, "--probe-file", probe_file, "--slots", 0.25, "--against", 10)
    assert status == 0
    for words in ("24 of 96", "even routing is assumed", "reading ahead hides", "measured 10.0 tokens/s:"):
        assert words in " ".join(out.split()), out
    _, slow, _ = plan(capfd, "--probe-file", probe_file, "--slots", 0.25, "--nvme", "1MB/s")
    assert "waiting" in slow


def test_more_ranks_or_replicas(capfd, probe_file):
    status, out, _ = plan(
        capfd, "--probe-file", probe_file, "--ram", "1GiB", "--ranks", 1, 2, "--sequences", 4, "--link", "1GB,1e-4"
    )
    assert status == 0
    assert "exchange" in out
    assert "replica" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--slots", "2"), "a share of the experts"),
        (("--ram", "1MB"), "hold no expert"),
        (("--ram", "many"), "not understood"),
        (("--ranks", "2", "--slots", "1"), "2 ranks need a link"),
        (("--link", "fast"), "must be BYTES/s,SECONDS"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capfd, probe_file, words, said):
    status, _, err = plan(capfd, "--probe-file", probe_file, *words)
    assert status == 2
    assert said in err


def test_without_figures_it_says_what_to_do(capfd, tmp_path):
    status, _, err = plan(capfd, "--probe-file", tmp_path / "none.json")
    assert status == 2
    assert "run `moe probe" in err


def test_sizes_and_replay():
    sizes = sizes_of(read_blueprint(TINYMOE))
    assert (sizes.num_layers, sizes.num_experts, sizes.top_k) == (6, 16, 2)
    assert sizes.expert_weights == 3 * 192 * 128
    trace = even_routing(sizes, 3)
    for ranks in (1, 2):
        found = settled(replay(trace, Use(sequences=3, context=1, slots=24, ranks=ranks)))
        assert found.distinct.shape == (ranks, 64 * 6)
        assert found.pairs.sum() == 64 * 3 * 6 * 2
        assert (found.misses <= found.distinct).all()
        assert found.misses.sum() > 0
    assert not replay(trace, Use(sequences=3, context=1, slots=96)).misses.any()


def test_misses_of_each_access_add_up():
    import numpy as np

    accesses = [Access(0, np.array(keys)) for keys in ([0, 1], [1, 2], [0, 1], [3])]
    each = misses_of(Lfu([4]), accesses, 2)
    assert each == [2, 1, 1, 1]
    assert sum(each) == simulate(Lfu([4]), accesses, 2)
