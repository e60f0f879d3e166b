"""Packed experts in nested precision: fewer bits are a prefix, and a budget in bytes shares bits out among experts."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig, PlacementConfig
from moe.engine.assemble import read_model
from moe.engine.share import Share
from moe.kernels.nested import LEVELS
from moe.launch.cli import main
from moe.layer.parallel import experts_of_rank
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.deepnvme import DeepNvmeStore
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.nested import Sensitivity, at_level, plan_bits, read_sensitivity, serve, sizes_of
from moe.offload.requantise import target_format
from moe.offload.shared import SharedStore
from moe.offload.stores import FileStore, MmapStore, aligned_bytes, bytes_moved
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.families import nested_folder, tiny_checkpoint
from tests.offload.test_deepnvme import Sectors
from tests.offload.test_integrity import flip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nested_folder(tmp_path_factory.mktemp("nested"))


def says(folder, bits, kernel="auto", budget="1.0", prompts=([5, 9, 30], [7])):
    offload = OffloadConfig(budget=budget, bits=bits)
    config = EngineConfig(dtype="float32", kernel=kernel, offload=offload, batch=BatchConfig(kv_tokens=256))
    with LLM(folder, config) as llm:
        outputs = llm.generate([*prompts], SamplingParams(max_tokens=6, ignore_eos=True))
        llm.engine.experts.cache.check()
        return [o.outputs[0].token_ids for o in outputs], llm.engine.experts.cache, llm.engine.notes


@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_fewer_bits_are_a_prefix(folder, bits):
    whole = read_blueprint(folder)
    index = serve(whole.checkpoint, whole.index, bits, None)
    layout, full = index.layouts[0], whole.index.layouts[0]
    assert layout.pieces == full.pieces[: len(layout.pieces)]
    assert layout.nbytes <= full.nbytes
    blobs = [aligned_bytes(layout.nbytes) for _ in range(3)]
    stores = FileStore(index, check="always"), MmapStore(index, check="always")
    for store, blob in zip((*stores, DeepNvmeStore(index, check="always", handles=Sectors)), blobs):
        assert store.read_into(0, 1, blob) == layout.nbytes
        assert torch.equal(blob, blobs[0])
    views = layout.views(blobs[0][None])
    assert int(views["gate_up.bits"]) == int(views["down.bits"]) == int(bits)
    blob = aligned_bytes(full.nbytes)
    FileStore(whole.index, check="always").read_into(0, 1, blob)
    for name, view in views.items():
        stored = full.views(blob[None])[name]
        assert name.endswith("bits") or torch.equal(view.view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_fewer_bits_ahead_of_their_use_come_in_parts(folder, bits, monkeypatch):
    """One part a read; the last one says how many bits there are, and is what a flipped bit is found after."""
    whole = read_blueprint(folder)
    index = serve(whole.checkpoint, whole.index, bits, None)
    nbytes = index.layouts[1].nbytes
    expected, out = (aligned_bytes(nbytes) for _ in range(2))
    MmapStore(index, check="always").read_into(1, 2, expected)
    monkeypatch.setattr("moe.offload.stores.PART_BYTES", 4096)
    moved = []
    assert bytes_moved(FileStore(index, direct=True, check="always").read_parts(1, 2, out), moved.append) == nbytes
    assert moved == [*range(4096, nbytes, 4096)]
    assert moved
    assert torch.equal(out, expected)
    (segment,) = index.segments(1, 2)
    flip(segment.path, segment.offset + 4000)
    with pytest.raises(OSError, match="layer 1, expert 2"):
        bytes_moved(FileStore(index, direct=True).read_parts(1, 2, out))
    flip(segment.path, segment.offset + 4000)


@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_the_kernel_says_what_its_twin_says(folder, bits):
    said, _, notes = says(folder, bits, budget="3")
    assert said == says(folder, bits, kernel="reference")[0]
    assert any(f"in {bits} bits; `moe evaluate`" in note for note in notes)


def as_ranks(folder, bits):
    """One rank: its prompt's answer, and bytes of an expert in the host copy that the node's ranks share."""
    offload = OffloadConfig(budget="2", bits=bits, store="ram")
    config = EngineConfig(dtype="float32", offload=offload, batch=BatchConfig(kv_tokens=256))
    with process_groups() as groups, LLM(folder, config, groups=groups) as llm:
        prompts = [[5, 9, 30], [7]][groups.rank :: 2]
        (output,) = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
        llm.engine.experts.cache.check()
        store = llm.engine.experts.cache.store
        assert isinstance(store, SharedStore)
        return output.outputs[0].token_ids, store.blobs[0].shape[1]


@pytest.mark.parametrize("bits", ["2", "4"])
def test_two_ranks_share_a_host_copy_of_these_bits(folder, bits):
    whole = read_blueprint(folder)
    nbytes = at_level(whole.index.sites[0], whole.index.layouts[0], int(bits)).nbytes
    answers = spawn(2, as_ranks, folder, bits)
    assert [tokens for tokens, _ in answers] == says(folder, bits)[0]
    assert [held for _, held in answers] == [nbytes] * 2


def test_four_bits_are_as_large_as_int4():
    """Of Qwen3-30B-A3B's experts and of the demo's."""
    for hidden, inter in ((2048, 768), (128, 192)):
        site = ExpertSite(module="m", num_experts=1, hidden_size=hidden, intermediate_size=inter)
        nested, int4 = (ExpertLayout.of(site, target_format(to, None)) for to in ("nested", "int4"))
        assert at_level(site, nested, 4).nbytes <= 1.05 * int4.nbytes


def test_auto_keeps_all_experts_in_a_budget(folder):
    """Every byte of the slots is an expert's: theirs together are what is said, and no more than the budget."""
    whole = read_blueprint(folder)
    sizes = sizes_of(whole.index)
    least, most = (sum(s[i] * site.num_experts for s, site in zip(sizes, whole.index.sites)) for i in (0, -1))
    assert least < most
    for budget in (least, (least + most) // 2, most):
        said, cache, notes = says(folder, "auto", budget=f"{budget}B")
        plan = plan_bits(read_sensitivity(whole.checkpoint), sizes, budget)
        taken = sum(size[LEVELS.index(b)] for size, of in zip(sizes, plan) for b in of)
        assert cache.slot_bytes == taken <= budget
        assert cache.num_slots == sum(cache.num_experts)
        assert any("nested precision" in note for note in notes)
        for layer, of in enumerate(plan):
            bits = cache.views(layer)["gate_up.bits"][cache.resident_slots(layer).long(), 0]
            assert bits.tolist() == of
        alone = says(folder, "auto", budget=f"{budget}B", prompts=([7],))[0]
        assert alone == said[1:]
        assert said == says(folder, "auto", kernel="reference", budget=f"{budget}B")[0]


# Of two layers of six experts; the two that are on both ranks have the same bits there.
SHARED = Plan(num_experts=6, num_ranks=2, phy2log=np.array([[0, 1, 2, 3, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 4, 5]]))


def budgets(index):
    """2 bits of all and half of the rest, of what a rank of `SHARED` holds."""
    least, most = (sum(size[i] for size in sizes_of(index)) * 4 for i in (0, -1))
    return (least + most) // 2


def as_ranks_of_auto(folder, plan, budget, dispatcher):
    """One rank: its prompt's answer, its notes, what its slots take, the bits of its experts by layer."""
    offload, parallel = (
        OffloadConfig(budget=f"{budget}B", bits="auto"),
        ParallelConfig(plan=plan, dispatcher=dispatcher),
    )
    batch = BatchConfig(kv_tokens=256)
    config = EngineConfig(dtype="float32", offload=offload, parallel=parallel, batch=batch)
    with process_groups() as groups, LLM(folder, config, groups=groups) as llm:
        prompts = [[5, 9, 30], [7]][groups.rank :: 2]
        (output,) = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
        cache = llm.engine.experts.cache
        cache.check()
        held = []
        for layer, own in enumerate(experts_of_rank(SHARED, groups.rank)):
            bits = cache.views(layer)["gate_up.bits"][cache.resident_slots(layer).long(), 0]
            held.append({expert: int(bits[expert]) for expert in own})
        return output.outputs[0].token_ids, llm.engine.notes, cache.slot_bytes, held


@pytest.mark.parametrize("dispatcher", ["all_to_all", "coherent"])
def test_auto_over_ranks_is_each_ranks_budget(folder, tmp_path, dispatcher):
    """Copies are alike, no rank has more than its budget, and answers are those of one process with the same bits."""
    whole = read_blueprint(folder)
    SHARED.save(tmp_path / "plan.json")
    budget, sizes = budgets(whole.index), sizes_of(whole.index)
    held = [experts_of_rank(SHARED, rank) for rank in range(2)]
    plan = plan_bits(read_sensitivity(whole.checkpoint), sizes, budget, held)
    assert len({bits for of in plan for bits in of}) > 1
    answers = spawn(2, as_ranks_of_auto, folder, str(tmp_path / "plan.json"), budget, dispatcher)
    for rank, (_, notes, taken, bits) in enumerate(answers):
        assert bits == [{e: plan[layer][e] for e in own} for layer, own in enumerate(held[rank])]
        assert taken == sum(sizes[n][LEVELS.index(b)] for n, of in enumerate(bits) for b in of.values()) <= budget
        assert any("nested precision" in note for note in notes)
    assert [tokens for tokens, *_ in answers] == says_of(folder, plan)


def says_of(folder, plan):
    """What one process says whose experts are in these bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.offload.nested.plan_bits", lambda *_: [list(of) for of in plan])
        return says(folder, "auto", budget="1GiB")[0]


worths = st.lists(
    st.lists(st.tuples(st.floats(0, 1e6), st.lists(st.floats(0, 1e6), min_size=4, max_size=4)), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(worths, st.integers(0, 400), st.integers(1, 3))
def test_no_rank_has_more_than_its_budget_nor_room_for_a_plane(worth, more, num_ranks):
    def ranks_of(expert):  # every third is on two
        return {expert % num_ranks, (expert + (expert % 3 == 0)) % num_ranks}

    worth = [[Sensitivity(e, tuple(of)) for e, of in layer] for layer in worth]
    sizes = [[10 + i, 14 + i, 20 + i, 40 + i] for i in range(len(worth))]
    held = [[[e for e in range(len(layer)) if r in ranks_of(e)] for layer in worth] for r in range(num_ranks)]
    budget = more + max(sum(size[0] * len(of) for size, of in zip(sizes, own)) for own in held)
    plan = plan_bits(worth, sizes, budget, held)
    left = [budget - sum(s[LEVELS.index(p[e])] for s, p, of in zip(sizes, plan, own) for e in of) for own in held]
    assert min(left) >= 0
    for size, of in zip(sizes, plan):
        for expert, b in enumerate(of):
            at = LEVELS.index(b)
            assert b == 8 or any(size[at + 1] - size[at] > left[r] for r in ranks_of(expert))


@settings(max_examples=60, deadline=None)
@given(worths, st.integers(0, 400))
def test_a_plan_fits_and_leaves_no_plane_that_would(worth, more):
    worth = [[Sensitivity(e, tuple(of)) for e, of in layer] for layer in worth]
    sizes = [[10 + i, 14 + i, 20 + i, 40 + i] for i in range(len(worth))]
    least = sum(size[0] * len(layer) for size, layer in zip(sizes, worth))
    plan = plan_bits(worth, sizes, least + more)
    cost = sum(size[LEVELS.index(b)] for size, of in zip(sizes, plan) for b in of)
    assert cost <= least + more
    assert [len(of) for of in plan] == [len(layer) for layer in worth]
    for size, of in zip(sizes, plan):
        for b in of:
            at = LEVELS.index(b)
            # What is bought later only takes from what is left, so a plane that fits at the end would have fitted.
            assert b == 8 or size[at + 1] - size[at] > least + more - cost
    with pytest.raises(ValueError, match="must hold 2 bits"):
        plan_bits(worth, sizes, least - 1)


def test_a_hot_expert_gets_its_bits_first():
    cold, hot = (Sensitivity(1.0, tuple(scale * f for f in (0.1, 0.03, 0.01, 0.0))) for scale in (1.0, 10.0))
    assert plan_bits([[cold, hot, cold]], [[10, 14, 20, 40]], 40) == [[2, 4, 2]]


def test_planes_in_the_first_order_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "packed.json"
    said = json.loads(path.read_text())
    for layer in said["layers"]:
        assert [of.pop("block_columns") for of in layer["formats"]] == [256, 256]
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="column after column"):
        read_blueprint(tmp_path / "old")


def test_bad_requests(folder, tmp_path, capsys):
    whole = read_blueprint(folder)
    with pytest.raises(ValueError, match="shares out a number of bytes"):
        serve(whole.checkpoint, whole.index, "auto", "0.5")
    plain = tiny_checkpoint("mixtral", tmp_path / "plain")
    blueprint = read_blueprint(plain)
    with pytest.raises(ValueError, match="is for experts in nested precision"):
        serve(blueprint.checkpoint, blueprint.index, "4", None)
    offload = OffloadConfig(bits="auto", budget="200000B", store="ram")
    config = EngineConfig(dtype="float32", offload=offload, batch=BatchConfig(kv_tokens=256))
    with pytest.raises(ValueError, match="hold each a second time"):
        LLM(folder, config)
    for moves in (False, True):
        config = EngineConfig(offload=OffloadConfig(bits="auto", budget="1MB"), placement=PlacementConfig(online=moves))
        with pytest.raises(ValueError, match="online move experts"):
            read_model(whole, config, Share(SHARED, 0, may_change=not moves))
    assert main(["pack", str(plain), str(tmp_path / "x"), "--experts", "nested", "--group", "24"]) == 2
    assert "multiple of 16" in capsys.readouterr().err
