"""The probe measures what is there and writes a topology that placement reads."""

import pytest

from moe.comm.membership import process_groups
from moe.launch.probe import describe, probe
from moe.placement.topology import Topology
from tests.distributed import spawn


def run_probe() -> tuple:
    with process_groups() as groups:
        topology = probe(groups, (1 << 12, 1 << 23), 8)  # so that some of each size had a core
        return topology.node_of_rank, topology.intra, topology.inter, describe(topology)


def test_all_ranks_agree_on_the_measured_links(tmp_path):
    by_rank = spawn(4, run_probe, ranks_per_node=2)
    assert len(set(by_rank)) == 1
    nodes, intra, inter, text = by_rank[0]
    assert nodes == (0, 0, 1, 1)
    assert intra.bandwidth > 0
    assert inter.bandwidth > 0
    assert "4 ranks on 2 nodes" in text
    Topology(node_of_rank=nodes, intra=intra, inter=inter).save(tmp_path / "t.json")
    assert Topology.load(tmp_path / "t.json").intra == intra


def test_one_rank_has_no_links():
    with process_groups() as groups:
        with pytest.raises(ValueError, match="one rank has no links to measure"):
            probe(groups, (1, 2), 1)
