"""Measures the links of a running cluster and writes them as a topology for `moe place`.

    torchrun --nproc-per-node 4 -m moe.launch.probe topology.json

All ranks take part in all-to-alls of several sizes, first inside each node, then between nodes; latency and bandwidth
are fitted to the shortest times. Nodes are told apart by LOCAL_WORLD_SIZE, or --ranks-per-node.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from moe.comm.errors import CommError, Task
from moe.comm.groups import Groups, timed_all_to_all
from moe.comm.lost import in_collective
from moe.comm.membership import process_groups
from moe.launch.console import err, out
from moe.launch.options import add_overwrite_option, check_outputs, named_path, whole
from moe.offload.budget import format_bytes
from moe.placement.topology import Link, Topology, probe_link

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe.launch.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="topology", type=named_path, help="JSON file to write")
    parser.add_argument("--ranks-per-node", type=whole(1))
    add_overwrite_option(parser)
    parser.add_argument("--repeats", type=whole(1), default=7)
    args = parser.parse_args(arguments)
    try:
        check_outputs(args)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with process_groups(ranks_per_node=args.ranks_per_node, timeout_s=120, device=device) as groups:
            with in_collective(groups, Task("measuring the links")):
                topology = probe(groups, SIZES, args.repeats)
        if groups.rank == 0:
            topology.save(args.out)
            out.print(f"{args.out}: {describe(topology)}", markup=False)
    except (ValueError, OSError, CommError) as error:
        err.print(f"moe.launch.probe: {error}", markup=False)
        return 2
    return 0


def describe(topology: Topology) -> str:
    links = f"inside a node {_link(topology.intra)}"
    if topology.num_nodes > 1:
        links += f", between nodes {_link(topology.inter)}"
    return f"{topology.num_ranks} ranks on {topology.num_nodes} nodes, {links}"


def _link(link: Link) -> str:
    return f"{format_bytes(link.bandwidth)}/s and {link.latency * 1e6:.0f} µs"


def probe(groups: Groups, sizes: Sequence[int], repeats: int) -> Topology:
    """The measured topology, the same on every rank. A collective. Raises ValueError for a run of one rank."""
    if groups.world_size == 1:
        raise ValueError("one rank has no links to measure; start several with torchrun")
    fields: dict[str, Any] = {}
    if groups.local is not None:
        fields["intra"] = probe_link(timed_all_to_all(groups, groups.local, len(groups.local_ranks)), sizes, repeats)
    if groups.cross is not None:
        fields["inter"] = probe_link(timed_all_to_all(groups, groups.cross, groups.num_nodes), sizes, repeats)
    nodes = groups.nodes
    return Topology(node_of_rank=nodes, name="measured", **fields)


if __name__ == "__main__":
    sys.exit(main())
