"""Every blob equals the parameters that transformers itself loads, for every family and every store."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

from moe.offload.checkpoint import Checkpoint
from moe.offload.index import ExpertIndex, index_experts
from moe.offload.layout import ExpertSite
from moe.offload.stores import FileStore, MmapStore, RamStore, aligned_bytes
from tests.families import (
    IN_SLOTS,
    expert_parameters,
    expert_sites,
    model_class,
    reference_model,
    tiny_checkpoint,
    tiny_config,
)


def meta_model(family):
    with torch.device("meta"):
        return model_class(family)(tiny_config(family))


def index_of(folder, family, sites=None) -> ExpertIndex:
    model = meta_model(family)
    sites = expert_sites(model) if sites is None else sites
    return index_experts(Checkpoint.open(folder), sites, get_model_conversion_mapping(model), model.base_model_prefix)


def stores_of(index):
    mapped = MmapStore(index)
    return [mapped, RamStore.read_from(mapped), FileStore(index, direct=False), FileStore(index, direct=True)]


def check_store(store, index: ExpertIndex, model) -> None:
    """Every piece of every blob of `store` equals what transformers loaded."""
    for layer, (site, layout) in enumerate(zip(index.sites, index.layouts)):
        for expert in range(site.num_experts):
            blob = aligned_bytes(layout.nbytes)
            assert store.read_into(layer, expert, blob) > 0
            pieces = [layout.piece(name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")]
            for piece, expected in zip(pieces, expert_parameters(model, site, expert)):
                assert (piece is None) == (expected is None)
                if piece is not None:
                    assert torch.equal(layout.view(blob[None], piece)[0], expected), (site.module, expert)


@pytest.mark.parametrize("family", IN_SLOTS)
def test_blobs_equal_transformers(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path, max_shard_size="60KB")
    model = reference_model(family, folder)
    index = index_of(folder, family)
    assert len(index.sites) >= 2
    assert index.dtype == torch.float32
    for store in stores_of(index):
        check_store(store, index, model)
        store.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blobs_keep_the_dtype_of_the_checkpoint(family, dtype, tmp_path):
    folder = tiny_checkpoint(family, tmp_path, dtype)
    model = reference_model(family, folder, dtype)
    index = index_of(folder, family)
    assert index.dtype == dtype
    for store in stores_of(index):
        check_store(store, index, model)


@pytest.mark.parametrize("family", IN_SLOTS)
def test_expert_keys_are_exactly_the_experts(family, tmp_path):
    """What is not an expert key is what a model without experts needs."""
    folder = tiny_checkpoint(family, tmp_path)
    index = index_of(folder, family)
    checkpoint = Checkpoint.open(folder)
    stored = sum(checkpoint.tensors[key].nbytes for key in index.expert_keys)
    model = meta_model(family)
    inside = [p for site in index.sites for p in model.get_submodule(site.module).parameters()]
    assert stored == sum(p.nbytes for p in inside)
    assert stored == sum(s.nbytes for l, site in enumerate(index.sites) for e in range(site.num_experts)
                         for s in index.segments(l, e))  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_checkpoint_in_the_fused_form(family, tmp_path):
    """transformers can also save its own fused parameters; they are the same experts."""
    folder = tiny_checkpoint(family, tmp_path / "original")
    model = reference_model(family, folder)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    index = index_of(tmp_path / "fused", family)
    assert any(key.endswith("gate_up_proj") for key in index.expert_keys)
    check_store(FileStore(index, direct=True), index, model)


def test_checkpoint_of_the_base_model(tmp_path):
    """Saved without the head, the names lack the prefix `model.`."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path / "original")
    model = reference_model("qwen3_moe", folder)
    model.model.save_pretrained(tmp_path / "base")
    index = index_of(tmp_path / "base", "qwen3_moe")
    assert not any(key.startswith("model.") for key in index.expert_keys)
    check_store(FileStore(index), index, model)


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), r"layer 1 .*expert 5 is missing .*experts\.5\.up_proj"),
        (lambda t: t.update({KEY: torch.zeros(16, 36)}), r"expert 5 has gate_up_proj of shape \[33, 36\].*\[34, 36\]"),
        (lambda t: t.update({KEY: torch.zeros(36, 17)}), "expert 5 has gate_up_proj of shape"),
        (lambda t: t.update({KEY: t[KEY].bfloat16()}), "stored as BF16, F32; only one of"),
        (lambda t: t.update({KEY: t[KEY].double()}), "stored as F32, F64; only one of"),
        (lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), "stored as F8_E4M3 without the scales"),
        (lambda t: t.update({KEY + "_scale_inv": torch.ones(1)}), r"layer 1 .*not understood .*up_proj.weight F32"),
        (lambda t: t.update({KEY.replace(".5.", ".8."): torch.ones(17, 36)}), "has 9 experts .*says 8"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.experts" in k], "nothing is stored under that module"),
    ],
)
def test_bad_expert_tensors(change, message, tmp_path):
    folder = tiny_checkpoint("qwen3_moe", tmp_path)
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        index_of(folder, "qwen3_moe")


@pytest.mark.parametrize("family", ["switch_transformers", "dbrx", "llama4"])
def test_wrong_sizes_are_refused(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    sites = expert_sites(meta_model(family))
    sites[1] = replace(sites[1], intermediate_size=sites[1].intermediate_size + 1)
    with pytest.raises(ValueError, match=r"layer 1 .*on disk, the config asks for"):
        index_of(folder, family, sites)


def test_other_conversions_are_refused(tmp_path):
    from transformers.core_model_loading import Chunk, WeightConverter

    folder = tiny_checkpoint("granitemoe", tmp_path)
    sites = expert_sites(meta_model("granitemoe"))
    odd = WeightConverter("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj", [Chunk(0)])
    with pytest.raises(ValueError, match=r"layer 0 .*with Chunk.*cannot be read expert by expert"):
        index_experts(Checkpoint.open(folder), sites, [odd])


def test_conversions_of_other_families(tmp_path):
    """Interleaved rows (Inkling), stacked gate and up (Step), swapped dimensions (Qwen3-VL) against transformers' own
    operations on the data."""
    from transformers.core_model_loading import Concatenate, Interleave, Transpose, WeightConverter

    num_experts, hidden, inner = 5, 12, 7
    generator = torch.Generator().manual_seed(0)
    site = ExpertSite(module="m.experts", num_experts=num_experts, hidden_size=hidden, intermediate_size=inner)

    def make(*shape):
        return torch.randn(shape, generator=generator)

    cases = [
        (["x.w13"], [make(num_experts, 2 * inner, hidden)], [Interleave(dim=1)]),
        (["x.w13"], [make(num_experts, 2 * inner, hidden)], [Interleave(dim=1, inverse=True)]),
        (["x.g", "x.u"], [make(num_experts, inner, hidden), make(num_experts, inner, hidden)], [Concatenate(dim=1)]),
        (["x.w13"], [make(num_experts, hidden, 2 * inner)], [Transpose(1, 2)]),
    ]
    for number, (names, tensors, operations) in enumerate(cases):
        converter = WeightConverter([*names], ["m.experts.gate_up_proj"], operations)
        data = {name: [tensor] for name, tensor in zip(names, tensors)}
        for operation in operations:
            data = operation.convert(data, source_patterns=names, target_patterns=["m.experts.gate_up_proj"])
        (expected,) = data.values()
        folder = tmp_path / str(number)
        folder.mkdir()
        stored = dict(zip(names, tensors)) | {"m.experts.down_proj": make(num_experts, hidden, inner)}
        save_file(stored, folder / "model.safetensors")
        index = index_experts(Checkpoint.open(folder), [site], [converter])
        for store in stores_of(index):
            for expert in range(num_experts):
                blob = aligned_bytes(index.layouts[0].nbytes)
                store.read_into(0, expert, blob)
                gate_up = index.layouts[0].views(blob[None])["gate_up"][0]
                assert torch.equal(gate_up, expected[expert]), (number, type(store))


def test_no_sites(tmp_path):
    folder = tiny_checkpoint("qwen3_moe", tmp_path)
    index = index_experts(Checkpoint.open(folder), [])
    assert index.expert_keys == frozenset()
    assert index.layouts == ()


def test_threads_read_the_same_bytes(tmp_path):
    folder = tiny_checkpoint("gpt_oss", tmp_path)
    index = index_of(folder, "gpt_oss")
    ram = RamStore.read_from(MmapStore(index))
    everything = [(layer, e) for layer, site in enumerate(index.sites) for e in range(site.num_experts)] * 20

    for direct in (False, True):
        store = FileStore(index, direct=direct)

        def read(at, store=store):
            blob = aligned_bytes(index.layouts[at[0]].nbytes)
            store.read_into(*at, blob)
            return torch.equal(blob, ram.blobs[at[0]][at[1]])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, everything))


def test_a_file_cut_after_opening_is_an_error(tmp_path):
    folder = tiny_checkpoint("mixtral", tmp_path)
    index = index_of(folder, "mixtral")
    path = folder / "model.safetensors"
    for direct in (False, True):
        store = FileStore(index, direct=direct)
        data = path.read_bytes()
        path.write_bytes(data[:5000])
        with pytest.raises(OSError, match=r"the file ends after.*model\.safetensors"):
            store.read_into(2, 6, aligned_bytes(index.layouts[2].nbytes))
        path.write_bytes(data)
        store.close()


def test_direct_is_chosen_by_size(tmp_path, monkeypatch):
    folder = tiny_checkpoint("mixtral", tmp_path)
    index = index_of(folder, "mixtral")
    size = (folder / "model.safetensors").stat().st_size
    for available, direct in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr("moe.offload.stores.available_memory", lambda available=available: available)
        store = FileStore(index)
        assert store.direct == direct
        check_store(store, index, reference_model("mixtral", folder))


def test_a_file_system_without_direct_reads_is_said_once(tmp_path, monkeypatch, caplog):
    """procfs refuses O_DIRECT for real; the other tests of this file run on one that takes it or refuses it."""
    index = index_of(tiny_checkpoint("mixtral", tmp_path), "mixtral")
    monkeypatch.setattr(ExpertIndex, "files", lambda self: [Path("/proc/self/maps"), Path("/proc/self/stat")])
    store = FileStore(index, direct=True)
    assert store.direct is False
    assert len([r for r in caplog.records if "refuses O_DIRECT" in r.message]) == 1
    store.close()
