"""Coherent dispatch over several layers: tokens end on the rank of their heaviest expert with the right values."""

import os
from datetime import timedelta

import pytest
import torch
from comm_cases import Case, draw, expert_values, physical_of

from moe.comm.coherent import CoherentDispatcher
from moe.comm.dispatcher import LocalDispatcher, local_pairs
from moe.comm.errors import CommError, Task
from moe.comm.gather import BackgroundGather
from moe.comm.groups import Groups
from moe.comm.membership import Generation, connect, join_groups, leave_groups, process_groups
from tests.distributed import spawn
from tests.patience import PATIENCE_S

NUM_LAYERS = 4


def cases(world_size):
    spread = tuple(p % world_size for p in range(13))
    last_only = (world_size - 1,) * 8
    busy = tuple(range(3, 3 + world_size))
    one_has_all = (9,) + (0,) * (world_size - 1)
    return [
        Case(busy, 6, 1, spread),
        Case(busy, 5, 3, spread, "holes", torch.bfloat16, seed=1),
        Case(one_has_all, 7, 8, spread, seed=2),
        Case(busy, 4, 4, last_only, seed=3),  # all experts together: no second round after the first layer
        Case((0,) * world_size, 4, 2, spread),
        Case(busy, 4, 2, spread, "none"),
        Case((1,) * world_size, 6, 5, spread, "holes", seed=4),
    ]


def routing(case, layer):
    """ids and weights of all tokens at a layer, by token number. Some weights are equal, for the tie."""
    tokens = draw(case._replace(seed=case.seed * 100 + layer))
    return tokens.ids, (tokens.weights * 4).round() / 4 + 0.25


def expected(case):
    """One process: (x after all layers [N, H], home of every token before and after each layer [L + 1][N])."""
    x = draw(case).x
    dispatcher = LocalDispatcher(Groups(device=torch.device("cpu")), torch.zeros(len(case.rank_of)))
    homes = [[rank for rank, count in enumerate(case.tokens_of) for _ in range(count)]]
    for layer in range(NUM_LAYERS):
        ids, weights = routing(case, layer)
        sent = dispatcher.dispatch(x, ids, weights)
        x = x + dispatcher.combine(expert_values(x, sent.local_ids), sent.handle)
        homes.append([])
        for before, experts, w in zip(homes[-2], ids.tolist(), weights.tolist()):
            best = max((k for k in range(case.top_k) if experts[k] >= 0), key=lambda k: (w[k], -k), default=None)
            homes[-1].append(before if best is None else case.rank_of[experts[best]])
    return x, homes


def expected_bytes(case, rank, homes, *, payload_bytes, partial, broadcast):
    """What `rank` sends to every rank over all layers, token by token in plain Python."""
    world = len(case.tokens_of)
    row, result = case.hidden * case.dtype.itemsize + 8 * case.top_k, case.hidden * case.dtype.itemsize
    bytes_to = [0] * world
    for layer in range(NUM_LAYERS):
        for before, after, ids in zip(homes[layer], homes[layer + 1], routing(case, layer)[0].tolist()):
            experts_on = [case.rank_of[p] for p in ids if p >= 0]
            for target in range(world) if broadcast else {*experts_on, after}:
                if before == rank != target:
                    bytes_to[target] += row + (payload_bytes if broadcast or target == after else 0)
            for source in set(experts_on) if partial else experts_on:
                if source == rank != after:
                    bytes_to[after] += result
    return bytes_to


def travel(groups, case, *, limit, combine, pairs):
    """All layers on this rank. Returns (x, token numbers, tokens per rank, dispatcher)."""
    dispatcher = CoherentDispatcher(groups, torch.tensor(case.rank_of), combine=combine, broadcast_tokens=limit)
    x = draw(case).of_rank(case, groups.rank).x
    begin = sum(case.tokens_of[: groups.rank])
    token = torch.arange(begin, begin + len(x))
    tokens_per_rank = case.tokens_of
    for layer in range(NUM_LAYERS):
        ids, weights = routing(case, layer)
        who = torch.stack([token, torch.full_like(token, groups.rank)], 1)
        sent = dispatcher.dispatch(
            x, ids[token], weights[token], payload=who, layer=layer, tokens_per_rank=tokens_per_rank
        )
        physical = physical_of(case.rank_of, groups.rank)[sent.local_ids]
        if pairs:
            at = local_pairs(sent.local_ids)
            y = expert_values(sent.rows[at // case.top_k], physical.flatten()[at][:, None])[:, 0]
        else:
            y = expert_values(sent.rows, physical)
        moved = dispatcher.combine(y, sent.handle)
        assert moved.tokens_per_rank[groups.rank] == len(moved.x)
        token, former_rank = moved.payload.t()
        assert former_rank.tolist() == sorted(former_rank.tolist())
        tokens_per_rank = moved.tokens_per_rank
        x = moved.x + moved.out
    return x, token, tokens_per_rank, dispatcher


def rank_layers(world_size, combine, eager_bytes=4096):
    with process_groups(eager_bytes=eager_bytes) as groups:
        differs = 0
        for case in cases(world_size):
            whole, homes = expected(case)
            for limit in (0, 64):
                x, token, tokens_per_rank, dispatcher = travel(
                    groups, case, limit=limit, combine=combine, pairs=limit == 0
                )
                assert sorted(token.tolist()) == [t for t, home in enumerate(homes[-1]) if home == groups.rank]
                assert tokens_per_rank == tuple(homes[-1].count(rank) for rank in range(world_size))
                if combine == "exact":
                    assert torch.equal(x, whole[token]), (limit, case)
                else:
                    torch.testing.assert_close(x, whole[token])
                    differs += not torch.equal(x, whole[token])
                assert dispatcher.traffic.bytes_to == expected_bytes(
                    case, groups.rank, homes, payload_bytes=16, partial=combine == "partial", broadcast=limit > 0
                ), (limit, case)
        return differs


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "eager_bytes"),
    [(1, 1, 4096), (2, 2, 0), (3, 3, 0), (3, 3, 96), (4, 2, 4096)],  # 96: counts alone fit, rows follow
)
def test_tokens_end_where_their_experts_are_with_the_values_of_one_process(world_size, ranks_per_node, eager_bytes):
    spawn(world_size, rank_layers, world_size, "exact", eager_bytes, ranks_per_node=ranks_per_node)


def test_partial_combine_is_close_and_another_sum():
    assert sum(spawn(3, rank_layers, 3, "partial")) > 0


def rank_rounds(eager_bytes):
    """All-to-all rounds of one layer: (K = 1, co-located experts, split experts) without and with counts."""
    rounds = []
    with process_groups(eager_bytes=eager_bytes) as groups:
        for ids in ([[0]], [[0, 2]], [[0, 1]]):
            for limit in (8, 0):
                dispatcher = CoherentDispatcher(groups, torch.tensor([0, 1, 0, 1]), broadcast_tokens=limit)
                here = groups.rank == 1  # the one token of the run; only rank 1 could know that it is split
                x, ids_here = torch.ones(int(here), 4), torch.tensor(ids)[: int(here)]
                sent = dispatcher.dispatch(
                    x, ids_here, torch.ones(ids_here.shape), payload=x[:, :0], tokens_per_rank=(0, 1)
                )
                y = expert_values(sent.rows, torch.where(sent.local_ids >= 0, sent.local_ids * 2 + groups.rank, -1))
                moved = dispatcher.combine(y, sent.handle)
                assert moved.tokens_per_rank == (1, 0)
                assert moved.payload.shape == (int(groups.rank == 0), 0)
                if groups.rank == 0:
                    assert torch.equal(moved.out, expert_values(torch.ones(1, 4), torch.tensor(ids)).sum(1))
                rounds.append(dispatcher.traffic.collectives)
    return rounds


def test_a_round_is_left_out_only_by_agreement_of_all_ranks():
    assert spawn(2, rank_rounds, 0) == [[1, 2, 1, 2, 2, 3]] * 2
    assert spawn(2, rank_rounds, 4096) == [[1, 1, 1, 1, 2, 2]] * 2  # counts go with the rows


def rank_gather():
    with process_groups() as groups:
        gather = BackgroundGather(groups)
        rows_of = [2, 0, 3]
        whole = torch.arange(5 * 2 * 3, dtype=torch.bfloat16).view(5, 2, 3), torch.arange(5)
        begin = sum(rows_of[: groups.rank])
        mine = [t[begin : begin + rows_of[groups.rank]] for t in whole]
        kv = gather.rows(mine, rows_of, Task("K/V", 0))
        counts = gather.counts(torch.arange(4) * (groups.rank + 1), Task("predicted counts", 1))
        assert torch.equal(counts.wait()[0], torch.stack([torch.arange(4) * r for r in (1, 2, 3)]))  # in any order
        for _ in range(2):
            for got, want in zip(kv.wait(), whole):
                assert torch.equal(got, want)
        row = 2 * 3 * 2 + 8
        assert gather.traffic.bytes_to == [
            rows_of[groups.rank] * row + 32 if rank != groups.rank else 0 for rank in range(3)
        ]
        with pytest.raises(ValueError, match=r"rows_of \(9, 9, 9\) must give 3 ranks, with"):
            gather.rows(mine, [9, 9, 9], Task("K/V"))


def test_background_gather_of_uneven_rows():
    spawn(3, rank_gather)


def rank_gather_lost():
    rank, store = int(os.environ["RANK"]), connect("127.0.0.1", int(os.environ["MASTER_PORT"]), PATIENCE_S)
    groups = join_groups(store, Generation(1, ("a", "b")), rank, meet_s=PATIENCE_S, timeout_s=2, eager_bytes=0)
    message = None
    if groups.rank == 1:
        store.wait(["ended"], timedelta(seconds=PATIENCE_S))  # alive, but it never joins the gather
    else:
        gathering = BackgroundGather(groups).counts(torch.ones(2), Task("counts", 7))
        try:
            gathering.wait()
        except CommError as error:
            message = str(error)
        store.set("ended", "")
    leave_groups(groups, wait=False)
    return message


def test_a_gather_that_a_peer_does_not_join_is_an_error_at_wait():
    message = spawn(2, rank_gather_lost)[0]
    assert message.startswith("rank 0 of 2: lost rank 1 in counts of layer 7 with ranks [0, 1] after"), message


def test_bad_input_is_refused_with_the_numbers():
    alone = Groups(device=torch.device("cpu"))
    with pytest.raises(ValueError, match="'sum'"):
        CoherentDispatcher(alone, torch.zeros(2), combine="sum")
    dispatcher = CoherentDispatcher(alone, torch.zeros(2))
    x, ids = torch.ones(2, 4), torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match=r"payload \(1, 3\) must be \[T, D\] with T = 2"):
        dispatcher.dispatch(x, ids, torch.ones(2, 1), payload=torch.ones(1, 3))
    with pytest.raises(ValueError, match="the handle is a int"):
        dispatcher.combine(x, 0)
