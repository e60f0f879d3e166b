"""Dispatch and combine over gloo ranks: bit for bit the result of one process, and the bytes of a formula exactly."""

import pytest
import torch
from comm_cases import Case, draw, expert_values, physical_of

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.dispatcher import LocalDispatcher, local_pairs
from moe.comm.groups import Groups
from moe.comm.membership import process_groups
from tests.distributed import spawn

# World size, ranks per node, and the largest message without a handshake: 96 holds the counts and few rows.
UNITS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of rounding what travels
MESHES = [(1, 1, 0), (2, 2, 0), (3, 3, 65536), (4, 4, 96), (4, 2, 0), (4, 2, 65536), (2, 1, 96)]


def cases(world_size):
    """Odd sizes, every K, idle ranks, skew, holes, uneven and absent experts; ranks numbered modulo the world."""
    spread = tuple(p % world_size for p in range(13))
    lumps = tuple(sorted(p % world_size if p < 9 else 0 for p in range(12)))
    last_only = (world_size - 1,) * 8
    some_idle = tuple(0 if r % 2 else 5 + r for r in range(world_size))
    last_idle = (7,) * (world_size - 1) + (0,) if world_size > 1 else (0,)
    busy = tuple(range(3, 3 + world_size))
    return [
        *[Case(busy, 6, k, spread, seed=k) for k in range(1, 9)],
        Case(some_idle, 5, 4, lumps, "holes"),
        Case(last_idle, 3, 3, lumps),
        Case((0,) * world_size, 4, 2, spread),
        Case(busy, 4, 3, spread, "one"),
        Case(busy, 7, 3, spread, "none"),
        Case(some_idle, 8, 3, last_only),
        Case(busy, 5, 4, spread, "holes", torch.bfloat16),  # 10-byte rows: ids are unaligned on the wire
        Case((63,) * world_size, 33, 5, lumps, "random", torch.float16),
    ]


def local_result(case, value=expert_values):
    """All ranks' tokens through the dispatcher of one process."""
    tokens = draw(case)
    dispatcher = LocalDispatcher(Groups(device=torch.device("cpu")), torch.zeros(len(case.rank_of)))
    sent = dispatcher.dispatch(*tokens)
    return dispatcher.combine(value(sent.rows, sent.local_ids), sent.handle)


def one_layer(dispatcher, case, groups, *, broadcast=False, pairs=False, value=expert_values):
    """This rank's part of the layer. Returns (out, what one process says)."""
    mine = draw(case).of_rank(case, groups.rank)
    sent = dispatcher.dispatch(*mine, layer=3, tokens_per_rank=case.tokens_of if broadcast else None)
    assert sent.rows.dtype == case.dtype
    assert sent.rows.is_contiguous()
    physical = physical_of(case.rank_of, groups.rank)[sent.local_ids]
    if pairs:
        at = local_pairs(sent.local_ids)
        row = at // case.top_k
        y = value(sent.rows[row], physical.flatten()[at][:, None])[:, 0]
    else:
        y = value(sent.rows, physical)
    begin = sum(case.tokens_of[: groups.rank])
    return dispatcher.combine(y, sent.handle), local_result(case, value)[begin : begin + len(mine.x)]


def identity(x, ids):
    return torch.where(ids.unsqueeze(-1) >= 0, x.float().unsqueeze(1), 0.0)


def expected_bytes(case, groups, kind, *, partial, broadcast):
    """Bytes to every rank, from sets in plain Python: what the token's ids and weights take, and what comes back."""
    world, ranks_per_node = groups.world_size, len(groups.local_ranks)
    row = case.hidden * case.dtype.itemsize + case.top_k * 4 * (2 if partial else 1)
    result = case.hidden * case.dtype.itemsize
    bytes_to = [0] * world

    def add(source, target, size):
        if source == groups.rank and source != target:
            bytes_to[target] += size

    ids = draw(case).ids.tolist()
    token = 0
    for home, count in enumerate(case.tokens_of):
        for _ in range(count):
            experts_on = [case.rank_of[p] for p in ids[token] if p >= 0]
            token += 1
            everyone = range(world) if broadcast else set(experts_on)
            if kind is AllToAllDispatcher:
                for target in everyone:
                    add(home, target, row)
                for target in set(experts_on) if partial else experts_on:
                    add(target, home, result)
                continue
            for node in {r // ranks_per_node for r in everyone}:
                relay = node * ranks_per_node + home % ranks_per_node
                on_node = [r for r in experts_on if r // ranks_per_node == node]
                add(home, relay, row)
                for target in {r for r in everyone if r // ranks_per_node == node}:
                    add(relay, target, row)
                for target in set(on_node) if partial else on_node:
                    add(target, relay, result)
                for _ in on_node[:1] if partial else on_node:
                    add(relay, home, result)
    return bytes_to


def rank_exact(world_size, eager_bytes):
    with process_groups(eager_bytes=eager_bytes) as groups:
        for case in cases(world_size):
            for kind in (AllToAllDispatcher, HierarchicalDispatcher):
                for limit in (0, 64):
                    dispatcher = kind(groups, torch.tensor(case.rank_of), broadcast_tokens=limit)
                    options = {"broadcast": True, "pairs": limit == 0}
                    out, expected = one_layer(dispatcher, case, groups, **options)
                    assert torch.equal(out, expected), (kind, limit, case)
                    assert out.dtype == case.dtype
                    expected_to = expected_bytes(case, groups, kind, partial=False, broadcast=limit > 0)
                    assert dispatcher.traffic.bytes_to == expected_to, (kind, limit, case)


def rank_partial(world_size):
    with process_groups() as groups:
        differs = 0
        every = cases(world_size)
        for case in [c._replace(dtype=d) for c in every[::2] for d in UNITS]:
            tokens = draw(case)
            y = expert_values(tokens.x, tokens.ids).to(case.dtype).float()
            size = (y * tokens.weights.unsqueeze(-1)).abs().sum(1)
            begin = sum(case.tokens_of[: groups.rank])
            size = size[begin : begin + case.tokens_of[groups.rank]]
            unit = UNITS[case.dtype]
            for steps, kind in enumerate((AllToAllDispatcher, HierarchicalDispatcher), 1):
                # Two orders of K roundings each, one of each sum that travels and step, and that of both results.
                bound = (2 * (case.top_k + 1) * 2.0**-24 + (steps + 2) * unit) * (1 + unit) ** 2 * size
                for limit in (0, 64):
                    rank_of = torch.tensor(case.rank_of)
                    dispatcher = kind(groups, rank_of, combine="partial", broadcast_tokens=limit)
                    out, expected = one_layer(dispatcher, case, groups, broadcast=True, pairs=limit == 0)
                    assert ((out.float() - expected.float()).abs() <= bound).all(), (kind, limit, case)
                    differs += not torch.equal(out, expected)
                    expected_to = expected_bytes(case, groups, kind, partial=True, broadcast=limit > 0)
                    assert dispatcher.traffic.bytes_to == expected_to, (kind, limit, case)
        return differs


def rank_identity(world_size):
    with process_groups() as groups:
        for case in cases(world_size):
            mine = draw(case).of_rank(case, groups.rank)
            x = (mine.x * 8).round()  # whole numbers and weights of 1/8: nothing is rounded
            weights = torch.full(mine.weights.shape, 2.0**-3)
            for kind in (AllToAllDispatcher, HierarchicalDispatcher):
                dispatcher = kind(groups, torch.tensor(case.rank_of))
                sent = dispatcher.dispatch(x, mine.ids, weights)
                out = dispatcher.combine(identity(sent.rows, sent.local_ids), sent.handle)
                assert torch.equal(out * 8, x * (mine.ids >= 0).sum(1, keepdim=True)), (kind, case)


@pytest.mark.parametrize(("world_size", "ranks_per_node", "eager_bytes"), MESHES)
def test_exact_combine_is_the_single_process_bit_for_bit(world_size, ranks_per_node, eager_bytes):
    spawn(world_size, rank_exact, world_size, eager_bytes, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(3, 3), (4, 2)])
def test_partial_combine_stays_within_its_bound_and_saves_its_bytes(world_size, ranks_per_node):
    differs = spawn(world_size, rank_partial, world_size, ranks_per_node=ranks_per_node)
    assert sum(differs) > 0  # otherwise the two modes would be one


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 2), (4, 2)])
def test_identity_experts_give_the_identity(world_size, ranks_per_node):
    spawn(world_size, rank_identity, world_size, ranks_per_node=ranks_per_node)
