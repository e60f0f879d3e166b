"""Settings and options that cannot be: each ends with one clear sentence."""

from types import SimpleNamespace

import pytest
import torch

from moe.engine.limits import context_of
from tests.launch.refused import PROMPT, refused
from tests.moe.moe_cases import ROOT, TINYMOE

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
    (
        ["--set", "batch.kv_tokens=2147483647", "--experts-in-memory", "0.5"],
        ["the KV cache of 134217728 blocks of 16 tokens takes 4.5 TiB", "are free", "lower batch.kv_tokens"],
    ),
    (["--set", "batch.block_size=2147483647"], ["the KV cache of 1 blocks of 2147483647 tokens", "batch.block_size"]),
    (["--set", "max_context=5000"], ["max_context (5000) is beyond the model's 1024 tokens"]),
    (["--set", "max_context=4"], ["the context holds 4", "shorten it"]),
    (
        ["--set", "parallel.plan=plan.json"],
        ["parallel.plan (plan.json) places experts on ranks", "is alone", "torchrun"],
    ),
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
    yarn = SimpleNamespace(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    )
    assert context_of(2000, 1024, yarn) == 2000
    assert context_of(None, 1024, yarn) == 1024
    with pytest.raises(ValueError, match="beyond the model's 2048 tokens"):
        context_of(2049, 1024, yarn)
