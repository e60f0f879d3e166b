"""What a user can get wrong: each ends with one clear sentence on standard error and exit status 2."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe.batch import BatchProgress, ResultFile
from moe.config import EngineConfig
from moe.launch.cli import main
from moe.launch.place_options import with_file
from moe.launch.prompts import read_prompts
from moe.launch.serve import read_key
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.load import load_dense
from moe.openai import lines_of
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import NUM_NEW, ROOT, TINYMOE, check_whole, config, engine_says, greedy

PROMPT = ["--prompt", "Once upon a time", "--max-tokens", "2"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe") / "model", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(original, tmp_path / "model")


def refused(capfd, *arguments) -> str:
    """The sentence; everything before it is the settings, everything else a traceback, which must not be."""
    status = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    assert status == 2, captured
    assert "Traceback" not in captured.err
    sentences = [line for line in captured.err.splitlines() if line.startswith(f"moe {arguments[0]}: ")]
    assert len(sentences) == 1, captured.err
    return sentences[0]


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder, change):
    """Every tensor through `change(name, tensor)`; None takes it out."""
    for shard in shards(folder):
        tensors = {name: change(name, tensor) for name, tensor in load_file(shard).items()}
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, shard, {"format": "pt"})


def missing_shard(folder):
    shards(folder)[1].unlink()


def truncated(folder):
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def empty_shard(folder):
    shards(folder)[0].write_bytes(b"")


def garbage_header(folder):
    shards(folder)[0].write_bytes(b"\x10" + bytes(7) + b"not json at all!" + bytes(100))


def integer_experts(folder):
    change_tensors(folder, lambda n, t: (t * 100).to(torch.int8) if ".experts." in n else t)


def fp8_experts(folder):
    change_tensors(folder, lambda n, t: t.to(torch.float8_e4m3fn) if ".experts." in n else t)


def one_expert_of_another_dtype(folder):
    change_tensors(folder, lambda n, t: t.bfloat16() if ".experts.3." in n else t)


def integer_dense(folder):
    change_tensors(folder, lambda n, t: (t * 100).to(torch.int32) if "q_proj" in n else t)


def expert_missing(folder):
    change_tensors(folder, lambda n, t: None if "layers.1.mlp.experts.5.up_proj" in n else t)


def dense_missing(folder):
    change_tensors(folder, lambda n, t: None if "layers.1.mlp.gate." in n else t)


def other_expert_size(folder):
    change_config(folder, moe_intermediate_size=23)


def other_dense_size(folder):
    change_config(folder, num_key_value_heads=6)


def other_architecture(folder):
    change_config(folder, mlp_only_layers=[0])


def no_config(folder):
    (folder / "config.json").unlink()


def config_no_json(folder):
    (folder / "config.json").write_text("{")


def config_list(folder):
    (folder / "config.json").write_text("[]")


def no_model_type(folder):
    (folder / "config.json").write_text("{}")


def unknown_architecture(folder):
    change_config(folder, model_type="quantum_moe", architectures=["QuantumMoeForCausalLM"])


def strange_values(folder):
    change_config(folder, hidden_size="wide")


def no_heads(folder):
    change_config(folder, num_attention_heads=-1, head_dim=None)


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')


def outside_the_folder(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(folder):
    for shard in shards(folder):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(folder):
    only_pickles(folder)
    (folder / "pytorch_model.bin").unlink()


def removed(folder):
    shutil.rmtree(folder)


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


BROKEN = [
    (missing_shard, ["is missing although model.safetensors.index.json lists it", "download it again"]),
    (truncated, ["truncated", "download it again"]),
    (empty_shard, ["is not a whole safetensors file"]),
    (garbage_header, ["bad safetensors header"]),
    (integer_experts, ["layer 0", "is stored as I8 without the scales that would decode it"]),
    (fp8_experts, ["layer 0", "is stored as F8_E4M3 without the scales that would decode it"]),
    (one_expert_of_another_dtype, ["stored as BF16, F32", "convert the checkpoint"]),
    (integer_dense, ["q_proj", "is stored as I32 without the scales that would decode it"]),
    (expert_missing, ["layer 1", "expert 5"]),
    (dense_missing, ["1 dense tensors are missing", "layers.1.mlp.gate"]),
    (other_expert_size, ["layer 0", "gate_up_proj of shape [34, 36] on disk, the config asks for [46, 36]"]),
    (other_dense_size, ["k_proj", "[24, 36] on disk, [48, 36] asked for"]),
    (other_architecture, ["3 dense tensors are missing", "layers.0.mlp.down_proj"]),
    (no_config, ["has no config.json"]),
    (config_no_json, ["config.json"]),
    (config_list, ["config.json"]),
    (no_model_type, ["config.json", "model_type"]),
    (unknown_architecture, ["quantum_moe"]),
    (strange_values, ["config.json", "hidden_size"]),
    (no_heads, ["Qwen3MoeForCausalLM"]),
    (broken_index, ["has no weight_map"]),
    (outside_the_folder, ["../../secret.safetensors", "not a file name in this folder"]),
    (only_pickles, ["only pickle files", "save_pretrained"]),
    (no_weights, ["has neither model.safetensors nor"]),
    (removed, ["is not a folder"]),
    (a_file, ["is not a folder"]),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_broken_checkpoint(capfd, folder, original, spoil, words):
    spoil(folder)
    sentence = refused(capfd, "generate", folder, *PROMPT)
    for word in words:
        assert word in sentence, sentence


def test_a_refused_checkpoint_leaves_the_process_as_it_was(capfd, monkeypatch, folder, original):
    """transformers' classes are patched while a model loads; an error in the midst must not leave them patched."""
    before = modeling_qwen3_moe.Qwen3MoeExperts
    other_dense_size(folder)
    refused(capfd, "generate", folder, *PROMPT)
    assert modeling_qwen3_moe.Qwen3MoeExperts is before

    def interrupt(*_):
        assert modeling_qwen3_moe.Qwen3MoeExperts is not before
        raise KeyboardInterrupt

    blueprint = read_blueprint(original)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen3_moe.Qwen3MoeModel, "post_init", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_dense(blueprint, torch.float32, "eager")
    assert modeling_qwen3_moe.Qwen3MoeExperts is before
    with LLM(original, config("1 expert")) as llm:
        assert len(engine_says(llm, [[1, 2, 3]]).tokens[0]) == NUM_NEW


SETTINGS = [
    (["--experts-in-memory", "0"], ["must be >= 1 expert (144.0 KiB)", "raise offload.budget"]),
    (["--experts-in-memory", "100KB"], ["100KB", "must be >= 1 expert (144.0 KiB)", "raise offload.budget"]),
    (["--experts-in-memory", "many"], ["'many' is not understood; give bytes (6GiB), a number of experts (64)"]),
    (["--experts-in-memory", "1"], ["one expert or all of them", "give 1.0 or 100% for all, '1 expert' for one"]),
    (["--experts-in-memory", "1.5"], ["'1.5' is not understood"]),
    (["--experts-in-memory", "-3"], ["'-3' is not understood"]),
    (["--set", "offload.bugdet=1"], ["unknown setting offload.bugdet; known: offload.bits, offload.budget"]),
    (["--set", "offload.readers=-1"], ["offload.readers (-1) must lie in [0, 1024]"]),
    (["--set", "dtype=int4"], ["dtype ('int4') must be one of"]),
    (
        ["--set", "batch.kv_tokens=16", "--max-tokens", "20"],
        ["the KV cache holds 16", "raise batch.kv_tokens or lower max_tokens"],
    ),
    (["--set", "max_context=5000"], ["max_context (5000) is beyond the model's 1024 tokens"]),
    (["--set", "max_context=4"], ["the context holds 4", "shorten it"]),
    (["--set", "device=abacus"], ["device", "abacus"]),
    (["--set", "device=cuda"], ["cuda"]),
    (["--config", "nowhere.toml"], ["nowhere.toml"]),
    (["--config", "pyproject.toml"], ["unknown setting"]),
    (["--temperature", "-1"], ["temperature (-1.0)"]),
    (["--top-p", "2"], ["top_p (2.0)"]),
    (["--max-tokens", "0"], ["max_tokens (0) must be >= 1"]),
    (["--stop", ""], ["stop strings must not be empty"]),
    (["--prompt", "word " * 1100], ["1024"]),
    (["--prompt", "half \ud800 a pair"], ["not valid text"]),
]


@pytest.mark.parametrize(("arguments", "words"), SETTINGS, ids=[" ".join(a)[:40] for a, _ in SETTINGS])
def test_bad_settings(capfd, monkeypatch, arguments, words):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(ROOT)
    sentence = refused(capfd, "generate", TINYMOE, *PROMPT, "--no-stream", *arguments)
    for word in words:
        assert word in sentence, sentence


def test_a_longer_context_where_the_rope_scaling_allows_it():
    from types import SimpleNamespace

    from moe.engine.limits import context_of

    yarn = SimpleNamespace(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    )
    assert context_of(2000, 1024, yarn) == 2000
    assert context_of(None, 1024, yarn) == 1024
    with pytest.raises(ValueError, match="beyond the model's 2048 tokens"):
        context_of(2049, 1024, yarn)


def test_files_of_the_other_commands(capfd, tmp_path, folder):
    text = tmp_path / "prompts.txt"
    text.write_text("A prompt\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": \n')
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes('{"custom_id": "Ċ"}\n'.encode("utf-16-le"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    trace = tmp_path / "trace.npz"
    cases = [
        (["trace", TINYMOE, tmp_path / "none.txt", trace], ["none.txt"]),
        (["trace", TINYMOE, bad, trace], ["bad.jsonl, line 2, is not valid JSON"]),
        (["trace", TINYMOE, latin, trace], ["latin.txt is not UTF-8"]),
        (["trace", TINYMOE, empty, trace], ["has no prompts"]),
        (["trace", TINYMOE, text, tmp_path / "trace.pkl"], ["must end in .npz or .safetensors"]),
        (["trace", TINYMOE, text, tmp_path / "no" / "trace.npz"], ["trace.npz"]),
        (["trace", folder, text, trace], ["has no tokenizer; give token ids"]),
        (["batch", TINYMOE, tmp_path / "none.jsonl", tmp_path / "out.jsonl"], ["none.jsonl"]),
        (["batch", TINYMOE, bad, tmp_path / "no" / "out.jsonl"], ["out.jsonl"]),
        (["batch", TINYMOE, bad, tmp_path], [tmp_path.name]),
        (["batch", TINYMOE, bad, text], ["is no result of this program"]),
        (["pack", TINYMOE, tmp_path], ["exists already"]),
        (["batch", TINYMOE, wide, tmp_path / "out.jsonl"], ["wide.jsonl is UTF-16 or UTF-32; UTF-8 is wanted"]),
        (["info", tmp_path], ["has neither model.safetensors nor"]),
    ]
    for arguments, words in cases:
        sentence = refused(capfd, *arguments)
        for word in words:
            assert word in sentence, sentence
    assert text.read_text() == "A prompt\n"
    assert not trace.exists()


def test_texts_of_other_encodings(tmp_path):
    """Whoever reads text that people write: the mark that some editors begin it with is none of it, UTF-16 is said."""
    readers = {
        "p.jsonl": (lambda p: read_prompts(p, None), '{"prompt": "é"}\r\n', ["é"]),
        "p.txt": (lambda p: read_prompts(p, None), "é\r\n", ["é"]),
        "c.toml": (lambda p: EngineConfig.load(p).max_context, "max_context = 7\n", 7),
        "place.toml": (
            lambda p: with_file(["place", "t", "--config", str(p)]),
            "seed = 3\n",
            ["place", "--seed=3", "t"],
        ),
        "key": (lambda p: read_key(argparse.Namespace(api_key_file=p, host="::1")), "secret\n", "secret"),
        "in.jsonl": (lambda p: lines_of(p.read_bytes(), str(p)), "{}\r\n", [b"{}"]),
    }
    for name, (read, text, want) in readers.items():
        path = tmp_path / name
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_bytes(text.encode(encoding))
            assert read(path) == want, (name, encoding)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            path.write_bytes(text.encode(encoding))
            with pytest.raises(ValueError, match="is UTF-16 or UTF-32; UTF-8 is wanted"):
                read(path)


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_results_are_kept_in_a_regular_file(device):
    with pytest.raises(ValueError, match="is no regular file"), ResultFile(Path(device), BatchProgress(0)):
        pass


def test_without_a_tokenizer_nothing_is_printed_before_the_error(capfd, original):
    assert main(["generate", str(original), *PROMPT]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert "has no tokenizer; give token ids" in said.err


def test_broken_tokenizer(capfd, tmp_path):
    folder = shutil.copytree(TINYMOE, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": ')
    assert "tokenizer" in refused(capfd, "generate", folder, *PROMPT)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    options = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**options, **heads)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINYMOE / name, folder / name)
    return folder


def test_dense_model_runs_and_says_so(capfd, dense):
    says = "this model is dense: it has no experts, the whole model is in memory"
    assert main(["generate", str(dense), *PROMPT, "--experts-in-memory", "0.25"]) == 0
    captured = capfd.readouterr()
    assert says in captured.err
    assert captured.out.startswith("Once upon a time")
    assert main(["info", str(dense)]) == 0
    assert "none in slots" in capfd.readouterr().out
    assert "has no experts to pack" in refused(capfd, "pack", dense, dense.parent / "packed")
    text = dense.parent / "p.txt"
    text.write_text("A\n")
    assert "no experts in slots" in refused(capfd, "trace", dense, text, dense.parent / "t.npz")


def test_a_model_that_generates_no_text(capfd, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path)
    sentence = refused(capfd, "generate", tmp_path, *PROMPT)
    assert "is no text generation model" in sentence


def test_an_expert_that_cannot_be_read_any_more(folder):
    """A file that is cut while the model runs: an error that names the expert, and an engine that is still whole."""
    with LLM(folder, config("1 expert")) as llm:
        right = engine_says(llm, [[1, 2, 3]])
        kept = {shard: shard.read_bytes() for shard in shards(folder)}
        for shard in kept:
            shard.write_bytes(kept[shard][:200])
        with pytest.raises(OSError, match=r"expert \d+ of layer \d+"):
            llm.generate([[1, 2, 3]], greedy())
        assert not llm.engine.has_work
        check_whole(llm)
        for shard, content in kept.items():
            shard.write_bytes(content)
        again = engine_says(llm, [[1, 2, 3]])
        assert again.tokens == right.tokens
