"""Checkpoints that are broken, incomplete or of another shape: each ends with one clear sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.dense_packed import roundable
from moe.models.load import load_dense
from tests.families import reference_model
from tests.launch.refused import PROMPT, refused
from tests.moe.moe_cases import NUM_NEW, TINYMOE, check_whole, config, engine_says, greedy, reference_says


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


def too_many_experts_a_token(folder):
    change_config(folder, num_experts_per_tok=9)


def no_expert_a_token(folder):
    change_config(folder, num_experts_per_tok=0)


def no_layers(folder):
    change_config(folder, num_hidden_layers=-1)


def no_positions(folder):
    change_config(folder, max_position_embeddings=0)


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
    (too_many_experts_a_token, ["a token takes 9 experts, layers have 8", "1 to 8"]),
    (no_expert_a_token, ["a token takes 0 experts, layers have 8"]),
    (no_layers, ["num_hidden_layers (-1) must be >= 1"]),
    (no_positions, ["max_position_embeddings (0) must be >= 1"]),
    (no_heads, ["Qwen3MoeForCausalLM"]),
    (broken_index, ["has no weight_map"]),
    (outside_the_folder, ["../../secret.safetensors", "not a file name in this folder"]),
    (only_pickles, ["only pickle files", "save_pretrained"]),
    (no_weights, ["has neither model.safetensors nor"]),
    (removed, ["is not a folder"]),
    (a_file, ["is not a folder"]),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_broken_checkpoint(capfd, small_copy, small_model, spoil, words):
    spoil(small_copy)
    sentence = refused(capfd, "generate", small_copy, *PROMPT)
    for word in words:
        assert word in sentence, sentence


def test_layers_that_the_config_leaves_out_are_told(small_copy):
    """Layers that predict further tokens are published so; of any other the model's answers would be another's."""
    change_config(small_copy, num_hidden_layers=2)
    with LLM(small_copy, config("1.0")) as llm:
        (note,) = [note for note in llm.notes if "not read" in note]
        assert "layers 2 of the files are not read, config.json counts 2" in note
    change_config(small_copy, num_hidden_layers=3)
    with LLM(small_copy, config("1.0")) as llm:
        assert not any("not read" in note for note in llm.notes)


def test_tensors_that_the_config_switches_off_are_told(small_copy):
    """Dense or of an expert; what is said is what transformers says without them."""
    with LLM(small_copy, config("1.0")) as llm:
        without = engine_says(llm, [[1, 2, 3]])
        assert not any("not used" in note for note in llm.notes)
    tensors = load_file(shards(small_copy)[0])
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
    save_file(tensors, shards(small_copy)[0], {"format": "pt"})
    with LLM(small_copy, config("1.0")) as llm:
        (note,) = [note for note in llm.notes if "not used" in note]
        assert "a tensor of the files' layers not used, first model.layers.0.self_attn.q_proj.bias" in note
        assert engine_says(llm, [[1, 2, 3]]).tokens == without.tokens
    tensors |= {f"model.layers.1.mlp.experts.{n}.up_proj.bias": torch.ones(23) for n in range(8)}
    save_file(tensors, shards(small_copy)[0], {"format": "pt"})
    with LLM(small_copy, config("1.0")) as llm:
        assert any("9 tensors of the files' layers not used" in note for note in llm.notes)


def test_an_own_head_beside_one_that_the_config_ties_is_told(small_copy):
    """Stored twice it is one weight only if both are equal; transformers' answer, and a word."""
    change_config(small_copy, tie_word_embeddings=True)
    embedding = next(t for s in shards(small_copy) for n, t in load_file(s).items() if n == "model.embed_tokens.weight")
    for head, notes in ((embedding.roll(1, 0), 1), (embedding, 0)):
        change_tensors(small_copy, lambda n, t, head=head: head.clone() if n == "lm_head.weight" else t)
        reference = reference_model("qwen3_moe", small_copy)
        with LLM(small_copy, config("1.0")) as llm:
            assert engine_says(llm, [[1, 2, 3]]).tokens == reference_says(reference, [[1, 2, 3]]).tokens
            model = llm.engine.model
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == (notes == 0)
            assert sum("lm_head.weight and model.embed_tokens.weight one weight" in note for note in llm.notes) == notes
            assert "lm_head.weight" not in roundable(llm.engine.blueprint)  # or two that are equal would be no more


def test_a_refused_checkpoint_leaves_the_process_as_it_was(capfd, monkeypatch, small_copy, small_model):
    """transformers' classes are patched while a model loads; an error in the midst must not leave them patched."""
    before = modeling_qwen3_moe.Qwen3MoeExperts
    other_dense_size(small_copy)
    refused(capfd, "generate", small_copy, *PROMPT)
    assert modeling_qwen3_moe.Qwen3MoeExperts is before

    def interrupt(*_):
        assert modeling_qwen3_moe.Qwen3MoeExperts is not before
        raise KeyboardInterrupt

    blueprint = read_blueprint(small_model)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen3_moe.Qwen3MoeModel, "post_init", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_dense(blueprint, torch.float32, "eager")
    assert modeling_qwen3_moe.Qwen3MoeExperts is before
    with LLM(small_model, config("1 expert")) as llm:
        assert len(engine_says(llm, [[1, 2, 3]]).tokens[0]) == NUM_NEW


def test_an_expert_that_cannot_be_read_any_more(small_copy):
    """A file that is cut while the model runs: an error that names the expert, and an engine that is still whole."""
    with LLM(small_copy, config("1 expert")) as llm:
        right = engine_says(llm, [[1, 2, 3]])
        kept = {shard: shard.read_bytes() for shard in shards(small_copy)}
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


def test_an_adapter_beside_a_whole_model_is_not_left_out_in_silence(tmp_path):
    folder = shutil.copytree(TINYMOE, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with LLM(folder, experts_in_memory=0.5) as llm:
        assert any("adapter_config.json) is not used" in note for note in llm.notes)
