"""bf16 experts that become bf12 when they arrive in slots (`offload.keep`): the same bits, fewer bytes."""

import errno
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.choices import choose_keep
from moe.kernels.reference import dequantized
from moe.kernels.weights import Activation
from moe.launch.cli import main
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.dense_packed import PackedLinear
from moe.offload import short_floats
from moe.offload.in_place import in_place
from moe.offload.pack import pack
from moe.offload.short_floats import RareTable, Shortened, TooMuchRare, shortened, why_not_shortened
from moe.offload.stores import FileStore, MmapStore, PartedStore, aligned_bytes, bytes_moved
from moe.params import SamplingParams
from moe.placement.machine import Rate, save_machine
from tests import architecture_configs
from tests.architectures import tiny_model
from tests.distributed import spawn
from tests.families import randomise, tiny_checkpoint
from tests.family_configs import CONFIGS
from tests.launch.test_measure import figures
from tests.offload.test_short_floats import PROMPTS, wide_checkpoint

CPU = torch.device("cpu")


def config(*, keep="bf12", budget="3", probe_file=None, dtype="bfloat16", kernel="auto", **offload):
    return EngineConfig(
        dtype=dtype,
        kernel=kernel,
        probe_file=probe_file,
        offload=OffloadConfig(budget=budget, keep=keep, **offload),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
    )


def says(folder, how, max_tokens=5, groups=None):
    """Tokens, logits, bytes of slots, and what of the dense layers is packed."""
    with LLM(folder, how, groups=groups) as llm:
        kept = llm.engine.keep_logits()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
        logits = torch.stack([row for rows in kept.values() for row in rows])
        packed = [name for name, module in llm.engine.model.named_modules() if isinstance(module, PackedLinear)]
        return [o.outputs[0].token_ids for o in outputs], logits, llm.engine.experts.cache.slot_bytes, packed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("source", ["original", "packed"])
def test_every_logit_has_the_same_bits(family, source, tmp_path):
    folder = wide_checkpoint(family, tmp_path / "original")
    if source == "packed":
        blueprint = read_blueprint(folder)
        pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed")
        folder = tmp_path / "packed"
    for budget in ("1.0", "0.25", "1 expert"):
        tokens, logits, nbytes, packed = says(folder, config(keep="stored", budget=budget))
        assert packed == []
        for how in ({"direct": True}, {"direct": False}, {"store": "mmap"}):
            again, same, fewer, short = says(folder, config(budget=budget, **how))
            assert again == tokens
            assert torch.equal(same, logits), (budget, how)
            assert fewer < 0.87 * nbytes  # blobs are whole pages
            assert len(short) >= 3 * 2
            assert not [name for name in short if name.endswith(("gate", "router"))]


def test_activations_in_float32_have_the_same_bits_too(tmp_path):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    (tokens, logits, nbytes, _), (again, same, fewer, packed) = (
        says(folder, config(keep=keep, dtype="float32")) for keep in ("stored", "bf12")
    )
    assert again == tokens
    assert torch.equal(same, logits)
    assert fewer < nbytes
    assert packed == []  # linear layers are float32


def test_what_is_read_ahead_is_the_same(tmp_path):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    tokens, logits, *_ = says(folder, config(keep="stored", budget="12"), 20)
    for prefetch in ("transition", "router", "learned"):
        again, same, *_ = says(folder, config(budget="12", prefetch=prefetch, direct=True), 20)
        assert again == tokens
        assert torch.equal(same, logits), prefetch


def on_a_rank(folder, how):
    with process_groups() as groups:
        tokens, logits, *_ = says(folder, how, groups=groups)
        return tokens, logits.float().numpy()


@pytest.mark.heavy
def test_two_ranks_say_what_one_says(tmp_path):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    tokens, logits, *_ = says(folder, config(keep="stored"))
    apart = replace(config(), parallel=ParallelConfig(dispatcher="all_to_all"))
    for again, same in spawn(2, on_a_rank, str(folder), apart):
        assert again == tokens
        assert torch.equal(torch.from_numpy(same), logits.float())


def with_odd_rows(folder, layer, expert, rows):
    """The first `rows` rows of an expert's down projection have any bits of numbers, those of the sample do not."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    few = tensors[name][:rows]
    tensors[name][:rows] = (few.float() * torch.exp2(torch.randint(-60, 0, few.shape).float())).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_rows_that_have_more_rare_weights_than_room_are_exact(tmp_path):
    folder = with_odd_rows(wide_checkpoint("qwen3_moe", tmp_path / "original"), 1, 5, 30)
    for budget in ("1.0", "2"):
        tokens, logits, *_ = says(folder, config(keep="stored", budget=budget))
        again, same, *_ = says(folder, config(budget=budget))
        assert again == tokens
        assert torch.equal(same, logits)
    index = read_blueprint(folder).index
    short = shortened(index)
    table = RareTable(index.expert_bytes)
    store, (site, layout) = (
        Shortened(FileStore(index), index.sites, short.layouts, table),
        (index.sites[1], short.layouts[1]),
    )
    plain, made = aligned_bytes(index.layouts[1].nbytes), aligned_bytes(layout.nbytes)
    FileStore(index).read_into(1, 5, plain)
    for read in (store.read_into, lambda *of: bytes_moved(store.read_parts(*of))):
        made.zero_()
        assert read(1, 5, made) == index.layouts[1].nbytes
        views = layout.views(made[None]) | dict.fromkeys(("gate_up.table", "down.table"), table.words)
        both = (
            layout.weights(views, Activation()),
            index.layouts[1].weights(index.layouts[1].views(plain[None]), Activation()),
        )
        for want, got in zip(*(dequantized(each, 0) for each in both)):
            assert torch.equal(want, got)
    used = table.used
    assert used > 30 * 100
    store.read_into(1, 5, made)
    assert table.used == used  # again in the same places
    assert isinstance(store, PartedStore)
    assert site.num_experts == 8
    store.close()


def test_a_table_that_is_full_is_one_sentence(tmp_path, monkeypatch):
    folder = with_odd_rows(wide_checkpoint("qwen3_moe", tmp_path / "original"), 1, 5, 200)
    monkeypatch.setattr(short_floats, "_LEAST_TABLE", 4096)
    with LLM(folder, config(budget="4")) as llm, pytest.raises(Exception, match=r"expert 5 of layer 1 .*keep=stored"):
        llm.generate([list(range(1, 60))] * 2, SamplingParams(max_tokens=30, ignore_eos=True), use_tqdm=False)
    table = RareTable(0)
    table.place((0, 0, "down", 0), torch.zeros(1000, dtype=torch.int32))
    with pytest.raises(TooMuchRare, match=r"4\.0 KiB are kept") as error:
        table.place((0, 1, "down", 0), torch.zeros(25, dtype=torch.int32))
    assert error.value.errno == errno.ENOMEM
    assert table.place((0, 0, "down", 0), torch.zeros(1000, dtype=torch.int32)) == 0


def test_weights_whose_exponents_are_spread_stay_as_they_are(tmp_path):
    folder = with_odd_rows(wide_checkpoint("qwen3_moe", tmp_path / "original"), 1, 3, 256)
    blueprint = read_blueprint(folder)
    for store in (FileStore(blueprint.index), MmapStore(blueprint.index)):
        assert "layer 1's weights are spread" in why_not_shortened(store, shortened(blueprint.index))
        store.close()
    with pytest.raises(ValueError, match=r"keep=bf12 is not for .*layer 1's weights are spread.*leave it out"):
        LLM(folder, config())


def test_what_is_looked_at_may_be_more_than_a_table_holds(tmp_path, monkeypatch):
    index = read_blueprint(with_odd_rows(wide_checkpoint("qwen3_moe", tmp_path / "original"), 0, 0, 256)).index
    monkeypatch.setattr(short_floats, "_LEAST_TABLE", 64)
    assert "layer 0's weights are spread" in why_not_shortened(FileStore(index), shortened(index))


def test_a_file_that_cannot_be_read_is_told_by_whoever_needs_it(tmp_path):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    blueprint = read_blueprint(folder)
    pack(blueprint.checkpoint, blueprint.index, tmp_path / "packed")
    first = read_blueprint(tmp_path / "packed").index.segments(0, 0)[0]
    with first.path.open("r+b") as opened:
        opened.seek(first.offset + 8192)
        opened.write(b"damage")
    index, choice = choose_keep(config(keep="auto"), read_blueprint(tmp_path / "packed"), machine(1e-10), CPU)
    assert index.stored is None
    assert "one that was looked at cannot be read" in choice.reason


@pytest.mark.parametrize("model_type", ["jamba", "deepseek_v32"])
def test_models_that_read_a_weight_beside_its_layer(model_type, tmp_path, monkeypatch):
    wide = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"), 256)
    if model_type == "jamba":
        name, model_name, options = CONFIGS["jamba"]
        options = options | {key: 256 for key in wide if key in options} | {"mamba_dt_rank": 256}
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(getattr(transformers, name)(**options))
        with torch.no_grad():
            randomise(model)
    else:
        for key in wide:
            monkeypatch.setitem(architecture_configs._SIZES, key, 256)
        model = tiny_model(model_type)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    (tokens, logits, *_), (again, same, _, packed) = (says(tmp_path, config(keep=keep)) for keep in ("stored", "bf12"))
    assert packed
    assert again == tokens
    assert torch.equal(same, logits)


def machine(short, plain=1e-10):
    found = figures(1e9, {1: 2e9})
    return replace(found, rates=(Rate("expert", "bfloat16", 1, 1, plain), Rate("expert", "bf12", 1, 1, short)))


def test_figures_choose_and_say_why(tmp_path):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    blueprint = read_blueprint(folder)
    for found, value, says_what in (
        (None, "stored", "were not measured"),
        (figures(1e9, {1: 2e9}), "stored", "were not measured"),
        (machine(2e-10), "stored", "5.0 G weights/s of bf12 and 10.0 of bf16"),
        (machine(1e-10), "bf12", "a third more experts"),
    ):
        index, choice = choose_keep(config(keep="auto"), blueprint, found, CPU)
        assert (choice.setting, choice.value) == ("offload.keep", value)
        assert says_what in choice.reason
        assert (index is blueprint.index) == (value == "stored")
    assert choose_keep(config(keep="stored"), blueprint, machine(1e-10), CPU) == (blueprint.index, None)
    save_machine(tmp_path / "probe.json", machine(1e-10))
    with LLM(folder, config(keep="auto", probe_file=str(tmp_path / "probe.json"))) as llm:
        assert "offload.keep is bf12: a third more experts" in "\n".join(map(str, llm.engine.choices))
        assert isinstance(llm.engine.experts.cache.store, Shortened)


@pytest.mark.parametrize(
    ("how", "device", "reason"),
    [
        ({}, "cuda", "for the compiled kernels of the CPU"),
        ({"kernel": "reference"}, "cpu", "for the compiled kernels of the CPU"),
        ({"store": "ram"}, "cpu", "offload.store=ram keeps a copy"),
    ],
)
def test_where_it_cannot_be(how, device, reason, tmp_path):
    blueprint = read_blueprint(wide_checkpoint("qwen3_moe", tmp_path / "original"))
    with pytest.raises(ValueError, match=f"offload.keep=bf12 is not for .*{reason}"):
        choose_keep(config(**how), blueprint, None, torch.device(device))
    index, choice = choose_keep(config(keep="auto", **how), blueprint, machine(1e-10), torch.device(device))
    assert index is blueprint.index
    assert reason in choice.reason


def test_other_weights_stay_as_they_are(tmp_path):
    for dtype, reason in ((torch.float32, "are stored as float32"), (torch.bfloat16, "so narrow that bf12")):
        blueprint = read_blueprint(tiny_checkpoint("mixtral", tmp_path / str(dtype), dtype))
        index, choice = choose_keep(config(keep="auto"), blueprint, machine(1e-10), CPU)
        assert index is blueprint.index
        assert reason in choice.reason


def test_what_files_hold_is_moved_in_place_and_slots_stay(tmp_path):
    short = shortened(read_blueprint(wide_checkpoint("qwen3_moe", tmp_path / "original")).index)
    moved = in_place(short)
    assert moved.layouts == short.layouts
    assert moved.in_files == in_place(short.in_files)
    assert moved.files() == []
    assert moved.in_files.files()


def test_info_and_plan_tell_what_slots_take(tmp_path, capsys, monkeypatch):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    lines = {}
    for name, short in (("stored", 2e-10), ("bf12", 1e-10)):
        (tmp_path / name / "moe").mkdir(parents=True)
        save_machine(tmp_path / name / "moe/probe.json", machine(short))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        assert main(["info", str(folder)]) == 0
        lines[name] = dict(line.split(None, 2)[:1] + [line] for line in capsys.readouterr().out.splitlines())
    assert "all" in lines["bf12"]
    assert lines["bf12"]["all"] != lines["stored"]["all"]
    assert "bf12: bf16 in 12 bits, nothing is lost" in lines["bf12"]["in"]
    assert "in" not in lines["stored"]
