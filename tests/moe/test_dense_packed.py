"""`dense=packed`: quantised attention stays as stored, in less memory, and says what the decoded one says."""

import pytest
import torch
from test_mixed_formats import PROMPTS, channel_fp8, gptq, int4, int8, write_pair

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.models.dense_packed import PackedLinear
from moe.params import SamplingParams


def says(folder, dense):
    config = EngineConfig(
        dtype="float32",
        dense=dense,
        offload=OffloadConfig(budget="3"),
        batch=BatchConfig(max_tokens=16, max_sequences=3, kv_tokens=256),
    )
    with LLM(folder, config) as llm:
        logits = llm.engine.keep_logits()
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
        rows = torch.stack([row for rows in logits.values() for row in rows])
        model = llm.engine.model
        nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert llm.engine.state().dense_bytes <= nbytes  # tied tensors count once
        assert any(("decoded at load" if dense == "decoded" else "packed where") in note for note in llm.engine.notes)
        packed = sum(isinstance(module, PackedLinear) for module in model.modules())
        return [o.outputs[0].token_ids for o in outputs], rows, nbytes, packed


@pytest.mark.parametrize("writer", [int4, int8, channel_fp8, gptq])
def test_equals_the_decoded_one(writer, tmp_path):
    stored, _ = write_pair("qwen3_moe", tmp_path, lambda key: writer if "self_attn" in key else None)
    tokens, logits, nbytes, none = says(stored, "decoded")
    again, close, less, packed = says(stored, "packed")
    assert (none, packed) == (0, 12)  # q, k, v, o of three layers
    assert again == tokens
    assert float((close - logits).abs().max()) < 1e-5 * float(logits.abs().max())  # orders of fp32 sums
    assert less < nbytes


def test_needs_the_compiled_kernels(tmp_path):
    stored, _ = write_pair("qwen3_moe", tmp_path, lambda key: int8 if "self_attn" in key else None)
    with pytest.raises(ValueError, match="dense=packed needs the compiled kernels"):
        LLM(stored, EngineConfig(dense="packed", kernel="reference"))
