"""Models without experts, and models that are none of text."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from moe.launch.cli import main
from tests.launch.refused import PROMPT, refused
from tests.moe.moe_cases import TINYMOE


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
