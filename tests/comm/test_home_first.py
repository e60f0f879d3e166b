"""Results that others wait for are on their way before a rank computes what only its own rows ask for."""

import os
import signal
import time

import pytest
import torch
from comm_cases import draw, expert_values, physical_of
from test_dispatch import MESHES, cases, local_result

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.dispatcher import contiguous_ranks
from moe.comm.errors import LostPeer
from moe.comm.membership import process_groups
from tests.distributed import spawn
from tests.patience import NEVER_S

KINDS = (AllToAllDispatcher, HierarchicalDispatcher)


def own_rows_late(world_size, eager_bytes):
    """The own rows of y are NaN until `meanwhile`: whoever looked at them before would say so."""
    with process_groups(eager_bytes=eager_bytes) as groups:
        num_late = 0
        for case in cases(world_size):
            mine = draw(case).of_rank(case, groups.rank)
            begin = sum(case.tokens_of[: groups.rank])
            expected = local_result(case)[begin : begin + len(mine.x)]
            for kind in KINDS:
                dispatcher = kind(groups, torch.tensor(case.rank_of))
                sent = dispatcher.dispatch(*mine)
                assert len(sent.rows) == sent.num_first + len(mine.x)
                whole = expert_values(sent.rows, physical_of(case.rank_of, groups.rank)[sent.local_ids])
                y = whole.clone()
                y[sent.num_first :] = torch.nan

                def meanwhile(y=y, whole=whole):
                    y.copy_(whole)

                out = dispatcher.combine(y, sent.handle, meanwhile)
                assert torch.equal(out, expected), (kind, case)
                num_late += int((sent.local_ids[sent.num_first :] >= 0).sum())
        assert num_late > 0


@pytest.mark.parametrize(("world_size", "ranks_per_node", "eager_bytes"), [m for m in MESHES if m[0] > 1])
def test_own_rows_may_come_last(world_size, ranks_per_node, eager_bytes):
    spawn(world_size, own_rows_late, world_size, eager_bytes, ranks_per_node=ranks_per_node)


def waits_for_the_others(kind, eager_bytes):
    """Rank 0 computes its own rows only when all others have what they wait for; they would wait for ever otherwise."""
    with process_groups(eager_bytes=eager_bytes) as groups:
        size = groups.world_size
        dispatcher = kind(groups, contiguous_ranks(size, size))
        ids = torch.arange(size)[None].repeat(3, 1)
        sent = dispatcher.dispatch(torch.ones(3, 2), ids, torch.ones(ids.shape))

        def meanwhile():
            if groups.rank == 0:
                groups.store.wait([f"home_{rank}" for rank in range(1, size)])

        y = (sent.local_ids >= 0)[:, :, None] * sent.rows[:, None]
        assert dispatcher.combine(y, sent.handle, meanwhile).tolist() == [[size] * 2] * 3
        groups.store.set(f"home_{groups.rank}", "1")


@pytest.mark.parametrize("eager_bytes", [0, 65536])
@pytest.mark.parametrize(("kind", "ranks_per_node"), [(KINDS[0], 3), (KINDS[0], 1), (KINDS[1], 1)])
def test_others_have_their_results_before_own_rows_are_computed(kind, ranks_per_node, eager_bytes):
    spawn(3, waits_for_the_others, kind, eager_bytes, ranks_per_node=ranks_per_node)


def lost_while_it_computes(kind, does):
    """Rank 1 ends, or fails, after its results have left; rank 0 and 2 learn it in the next layer."""
    try:
        with process_groups(timeout_s=NEVER_S) as groups:
            dispatcher = kind(groups, contiguous_ranks(3, 3))
            ids = torch.arange(3)[None]

            def meanwhile():
                if groups.rank == 1:
                    if does == "fails":
                        raise OSError("an expert cannot be read")
                    time.sleep(0.2)  # what it sent has arrived
                    os.kill(os.getpid(), signal.SIGKILL)

            for layer in range(2):
                sent = dispatcher.dispatch(torch.ones(1, 2), ids, torch.ones(ids.shape), layer=layer)
                dispatcher.combine(torch.ones(len(sent.rows), 3, 2), sent.handle, meanwhile)
    except OSError as error:
        return str(error)
    except LostPeer as error:
        return error.layer, error.peers


@pytest.mark.parametrize("does", ["ends", "fails"])
@pytest.mark.parametrize(("kind", "ranks_per_node"), [(KINDS[0], 3), (KINDS[0], 1), (KINDS[1], 1)])
def test_a_rank_that_is_lost_meanwhile_is_named(kind, ranks_per_node, does):
    may_die = [1] if does == "ends" else []
    first, second, third = spawn(3, lost_while_it_computes, kind, does, ranks_per_node=ranks_per_node, may_die=may_die)
    assert second == (None if does == "ends" else "an expert cannot be read")
    for layer, peers in (first, third):
        assert layer in (0, 1)
        assert 1 in peers
