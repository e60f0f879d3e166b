"""`moe pack --experts bf12 --dense bf12`: three quarters of the bytes, and the same bits of every logit."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.walk_model import WalkModel, write
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.kernels import fused, grouped_gemm
from moe.kernels.reference import dequantized
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import Activation
from moe.launch.cli import main
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.dense_packed import PackedLinear, roundable
from moe.models.load import load_dense
from moe.offload.check import check_folder
from moe.offload.pack import pack
from moe.offload.requantise import sizes, target_format
from moe.offload.rounded_dense import RoundedDense
from moe.offload.stores import FileStore, aligned_bytes
from moe.params import SamplingParams
from tests.families import randomise, tiny_checkpoint
from tests.family_configs import CONFIGS

PROMPTS = [[5, 9, 30, 2, 8, 44, 1], [7]]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 16}


def wide_checkpoint(family, folder, dtype=torch.bfloat16):
    """Rows of 256: narrower ones would not become smaller."""
    name, model_name, options = CONFIGS[family]
    options = options | WIDE | ({"moe_intermediate_size": 256} if "moe_intermediate_size" in options else {})
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, name)(**options))
    with torch.no_grad():
        randomise(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def says(folder, *, dtype="bfloat16", budget="3", store="file", new=5, **more):
    config = EngineConfig(
        dtype=dtype,
        offload=OffloadConfig(budget=budget, store=store),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
        **more,
    )
    with LLM(folder, config) as llm:
        logits = llm.engine.keep_logits()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=new, ignore_eos=True))
        rows = torch.stack([row for rows in logits.values() for row in rows])
        packed = sum(isinstance(module, PackedLinear) for module in llm.engine.model.modules())
        return [o.outputs[0].token_ids for o in outputs], rows, packed


def blobs(index):
    for layer, site in enumerate(index.sites):
        for expert in range(site.num_experts):
            blob = aligned_bytes(index.layouts[layer].nbytes)
            FileStore(index).read_into(layer, expert, blob)
            yield index.layouts[layer], blob


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_logit_has_the_same_bits(family, tmp_path, capsys):
    folder, out = wide_checkpoint(family, tmp_path / "original"), tmp_path / "short"
    assert main(["pack", str(folder), str(out), "--experts", "bf12", "--dense", "bf12"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing is lost") == 2
    original, short = read_blueprint(folder), read_blueprint(out)
    assert {f.code for x in short.index.layouts for f in (x.gate_up_format, x.down_format)} == {"bf12"}
    assert short.expert_bytes < 0.87 * original.expert_bytes  # blobs are whole pages
    assert list(check_folder(short.checkpoint, short.index)) == []
    for budget in ("1.0", "0.25", "1 expert"):
        tokens, logits, _ = says(folder, budget=budget)
        again, same, packed = says(out, budget=budget)
        assert again == tokens
        assert torch.equal(same, logits), budget
        assert packed == len(short.quantised.matrices) > len(short.index.sites)


def test_other_ways_of_computing_read_it_too(tmp_path):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    original = read_blueprint(folder)
    pack(original.checkpoint, original.index, tmp_path / "short", experts=target_format("bf12", None))
    for how in ({"kernel": "reference"}, {"dtype": "float32"}, {"dense": "packed"}):
        tokens, logits, _ = says(folder, **{k: v for k, v in how.items() if k != "dense"})
        again, same, packed = says(tmp_path / "short", **how)
        assert again == tokens
        assert packed == 0
        # Of float32 x the sums of floats that are bf16 and of bf12 are the same; those of fp32 copies are not.
        assert torch.equal(same, logits), how


def test_a_packed_folder_can_be_made_short_and_is_not_twice(tmp_path, capsys):
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    for source, out in (("original", "packed"), ("packed", "short"), ("original", "at once")):
        experts = [] if out == "packed" else ["--experts", "bf12"]
        assert main(["pack", str(tmp_path / source), str(tmp_path / out), *experts]) == 0
    pairs = zip(blobs(read_blueprint(tmp_path / "short").index), blobs(read_blueprint(tmp_path / "at once").index))
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "short"), str(tmp_path / "again"), "--experts", "bf12"]) == 2
    assert "stored as bf12" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "short"), str(tmp_path / "int8"), "--experts", "int8"]) == 0
    assert main(["pack", str(folder), str(tmp_path / "int8 too"), "--experts", "int8"]) == 0
    pairs = zip(blobs(read_blueprint(tmp_path / "int8").index), blobs(read_blueprint(tmp_path / "int8 too").index))
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize(
    ("options", "says_what"),
    [
        (["--experts", "bf12", "--group", "32"], "--group (32) cannot be chosen for bf12"),
        (["--experts", "bf12", "--calibrate", __file__], "--calibrate says how experts are rounded"),
        (["--experts", "bf12"], "experts of layer 0 are stored as float32; bf12 is bf16 in 12 bits"),
    ],
)
def test_bad_requests(options, says_what, tmp_path, capsys):
    folder = tiny_checkpoint("mixtral", tmp_path / "original")
    assert main(["pack", str(folder), str(tmp_path / "out"), *options]) == 2
    assert says_what in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_what_would_not_become_smaller_stays_as_it_is(tmp_path):
    """One expert's exponents are spread over all there are, another's weights are no numbers: all come back."""
    folder = wide_checkpoint("qwen3_moe", tmp_path / "original")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    first = "model.layers.0.mlp.experts.3.gate_proj.weight"
    second = "model.layers.1.mlp.experts.5.gate_proj.weight"
    bits = torch.randint(-(1 << 15), 1 << 15, tensors[first].shape).to(torch.int16)
    tensors[first] = bits.view(torch.bfloat16)
    tensors[second][3, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 1e38])
    save_file(tensors, file, metadata={"format": "pt"})
    original = read_blueprint(folder)
    pack(original.checkpoint, original.index, tmp_path / "short", experts=target_format("bf12", None))
    short = read_blueprint(tmp_path / "short")
    layouts = short.index.layouts
    assert [layout.gate_up_format.code for layout in layouts] == [None, *["bf12"] * (len(layouts) - 1)]
    assert layouts[0].down_format.rare == 3 < layouts[1].gate_up_format.rare
    assert "bf12" in short.expert_formats
    assert "bfloat16" in short.expert_formats
    for each in zip(blobs(original.index), blobs(short.index)):
        both = [dequantized(layout.weights(layout.views(blob[None]), Activation()), 0) for layout, blob in each]
        for want, got in zip(*both):
            assert torch.equal(want.view(torch.int32), got.view(torch.int32))
    with pytest.raises(ValueError, match="experts of layer 0 are stored as bf12"):
        pack(short.checkpoint, short.index, tmp_path / "again", experts=target_format("bf12", None))


def test_a_pack_that_is_interrupted_goes_on(tmp_path):
    original = read_blueprint(wide_checkpoint("qwen3_moe", tmp_path / "original"))
    how, calls = {"experts": target_format("bf12", None)}, []

    def stop(done, total):
        calls.append((done, total))
        if total < original.expert_bytes and done > total // 2:  # not while all are read
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of 3 layers are kept"):
        pack(original.checkpoint, original.index, tmp_path / "short", progress=stop, **how)
    assert (original.expert_bytes, original.expert_bytes) in calls
    for out in ("short", "at once"):
        pack(original.checkpoint, original.index, tmp_path / out, **how)
    for file in sorted((tmp_path / "at once").iterdir()):
        assert file.read_bytes() == (tmp_path / "short" / file.name).read_bytes(), file.name


def test_linear_layers_that_would_not_become_smaller_stay(tmp_path, capsys):
    folder = tiny_checkpoint("mixtral", tmp_path / "original", torch.bfloat16)
    assert main(["pack", str(folder), str(tmp_path / "experts"), "--experts", "bf12"]) == 0
    assert "nothing is lost, nor won: rows are too narrow for bf12" in capsys.readouterr().out
    assert main(["pack", str(folder), str(tmp_path / "out"), "--dense", "bf12"]) == 0
    assert "0 other weights became bf12 (12 bits, without loss); nothing is lost" in capsys.readouterr().out
    original, packed = read_blueprint(folder).checkpoint, read_blueprint(tmp_path / "out").checkpoint
    dense = {name for name in original.tensors if "experts" not in name}
    assert all(torch.equal(original.load(name), packed.load(name)) for name in dense)


def test_what_it_would_take_is_told_of_bf16_alone(tmp_path):
    for dtype, is_told in ((torch.bfloat16, True), (torch.float32, False)):
        folder = wide_checkpoint("qwen3_moe", tmp_path / str(dtype), dtype)
        assert ("bf12" in sizes(read_blueprint(folder).index)) == is_told


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A model, its experts in bf12 (a row of one has as many rare weights as there is room for), its linear layers."""
    path = tmp_path_factory.mktemp("walk")
    folder = write(path / "original", WalkModel(layers=2, experts=4, top_k=2, hidden=256, width=256, vocab=256))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][7, :250:100] *= 2.0**-40
    save_file(tensors, file, metadata={"format": "pt"})
    original = read_blueprint(folder)
    pack(original.checkpoint, original.index, path / "packed")
    bf12, dense = target_format("bf12", None), RoundedDense(original.checkpoint, roundable(original), "bf12")
    pack(original.checkpoint, original.index, path / "short", experts=bf12)
    pack(original.checkpoint, original.index, path / "dense", dense=dense)
    return path


@pytest.mark.parametrize(
    ("kernel", "budget", "store"),
    [
        ("grouped", "0.5", "ram"),
        pytest.param("single_launch", "1.0", "file", marks=pytest.mark.heavy),
        pytest.param("grouped", "2", "file", marks=pytest.mark.heavy),
    ],
)
def test_the_kernels_of_gpus_say_the_same_bits(kernel, budget, store, walk, monkeypatch):
    """On CPU tensors, interpreted: from slots, from host memory by the device's own cache, and in waves."""
    for module in (grouped_gemm, fused):  # the same for floats: numpy adds up tiles of other widths in another order
        monkeypatch.setattr(module, "pick_tiles", lambda *_, **__: TileConfig(16, 64, 64, 128, 4, 1))
    found = [says(walk / name, kernel=kernel, budget=budget, store=store, new=2) for name in ("packed", "short")]
    (tokens, logits, _), (again, same, _) = found
    assert again == tokens
    assert torch.equal(same, logits)


def test_where_no_compiled_kernel_reads_them_linear_layers_are_decoded_at_load(walk):
    """As on a GPU, whose model has the weights of the original, bit for bit."""
    original, short = (read_blueprint(walk / name) for name in ("original", "dense"))
    assert short.quantised.matrices
    assert {matrix.format.code for matrix in short.quantised.matrices.values()} == {"bf12"}
    models = [load_dense(one, torch.bfloat16, "eager", packed=False, short=False) for one in (original, short)]
    (want, got) = (dict(model.named_parameters()) for model in models)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not any(isinstance(module, PackedLinear) for module in models[1].modules())
