"""Traces keep what they were given, refuse what is wrong, and are read back from every recorder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.placement.importers import (
    from_deepseek_esft_npz,
    from_sglang_records,
    from_vllm_routed_experts,
)
from moe.placement.trace import DECODE, PREFILL, RoutingTrace

FIELDS = ("expert_ids", "weights", "sequence_lengths", "phase")


def make_trace(lengths=(3, 1, 4), num_layers=2, top_k=2, num_experts=5, seed=0, **fields) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    ids = np.argsort(rng.random((n, num_layers, num_experts)), axis=2)[:, :, :top_k].astype(np.int16)
    given = {
        "expert_ids": ids,
        "sequence_lengths": np.array(lengths, np.int32),
        "num_experts": num_experts,
        "model": "m",
        "weights": rng.random(ids.shape).astype(np.float32),
        "phase": rng.integers(0, 2, n).astype(np.uint8),
        "domain": "d",
    }
    return RoutingTrace(**(given | fields))


def assert_same(a: RoutingTrace, b: RoutingTrace) -> None:
    assert (a.num_experts, a.model, a.domain) == (b.num_experts, b.model, b.domain)
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("fields", [{}, {"weights": None, "phase": None, "domain": None}], ids=["full", "bare"])
@pytest.mark.parametrize("lengths", [(3, 1, 4), (1,), ()])
def test_save_then_load_is_the_same_trace(tmp_path, suffix, fields, lengths):
    trace = make_trace(lengths, **fields)
    trace.save(tmp_path / f"t{suffix}")
    assert_same(RoutingTrace.load(tmp_path / f"t{suffix}"), trace)


def test_half_precision_weights_survive(tmp_path):
    trace = make_trace()
    half = make_trace(weights=trace.weights.astype(np.float16))
    half.save(tmp_path / "t.safetensors")
    assert RoutingTrace.load(tmp_path / "t.safetensors").weights.dtype == np.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": np.full((8, 2, 2), 5, np.int16)}, "runs from 5 to 5"),
        ({"expert_ids": np.full((8, 2, 2), -2, np.int16)}, "from -2"),
        ({"expert_ids": np.full((8, 2, 2), 1, np.int16)}, "names expert 1 twice in layer 0"),
        ({"expert_ids": np.zeros((8, 2, 2))}, "must be integers"),
        ({"expert_ids": np.zeros((8, 4), np.int16)}, "must have 3 axes"),
        ({"expert_ids": np.zeros((8, 0, 2), np.int16), "weights": None}, "at least one layer"),
        ({"expert_ids": np.full((8, 2, 6), -1, np.int16), "weights": None}, "only 5 experts"),
        ({"sequence_lengths": np.array([3, 1, 3], np.int32)}, "sum to 7 but expert_ids has 8"),
        ({"sequence_lengths": np.array([8, 0], np.int32)}, "runs from 0 to 8"),
        ({"weights": np.ones((8, 2, 1), np.float32)}, "weights has shape"),
        ({"weights": np.ones((8, 2, 2), np.float64)}, "float32 or float16"),
        ({"weights": np.full((8, 2, 2), np.nan, np.float32)}, "NaN"),
        ({"phase": np.zeros(7, np.uint8)}, "7 entries for 8 tokens"),
        ({"phase": np.full(8, 2, np.uint8)}, "phase runs from 2"),
        ({"num_experts": 0}, "num_experts"),
    ],
)
def test_wrong_input_is_refused_with_the_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        make_trace(**change)


def test_no_expert_is_allowed_and_may_repeat():
    ids = np.full((8, 2, 2), -1, np.int16)
    assert (make_trace(expert_ids=ids).expert_ids == -1).all()


def test_a_trace_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        make_trace().expert_ids[0, 0, 0] = 1


@given(st.lists(st.integers(1, 6), min_size=2, max_size=9), st.floats(0.05, 0.95), st.integers(0, 99))
def test_split_keeps_every_sequence_once(lengths, fraction, seed):
    trace = make_trace(lengths)
    marked = make_trace(
        lengths, weights=np.arange(trace.expert_ids.size, dtype=np.float32).reshape(trace.expert_ids.shape)
    )
    fit, held = marked.split(fraction, seed)
    assert fit.num_sequences + held.num_sequences == trace.num_sequences
    assert fit.num_sequences >= 1
    assert held.num_sequences >= 1
    both = np.concatenate([fit.weights.reshape(-1), held.weights.reshape(-1)])
    np.testing.assert_array_equal(np.sort(both), np.arange(trace.expert_ids.size))


def test_select_and_concat_are_inverse():
    trace = make_trace((3, 1, 4, 2))
    parts = [trace.select([i]) for i in range(4)]
    assert_same(RoutingTrace.concat(parts), trace)
    assert_same(trace.select(slice(1, 3)), trace.select([1, 2]))
    np.testing.assert_array_equal(trace.select([2, 0]).sequence_lengths, [4, 3])
    np.testing.assert_array_equal(trace.select([2]).expert_ids, trace.expert_ids[4:8])
    assert trace.select([]).num_tokens == 0
    with pytest.raises(ValueError, match="asked of a trace of 4"):
        trace.select([4])


def test_concat_drops_what_one_part_lacks_and_refuses_other_models():
    a, b = make_trace(domain="x"), make_trace(domain="y", weights=None, seed=1)
    joined = RoutingTrace.concat([a, b])
    assert joined.weights is None
    assert joined.domain is None
    assert joined.phase is not None
    with pytest.raises(ValueError, match="model is 'm' in one, 'other'"):
        RoutingTrace.concat([a, make_trace(model="other")])
    with pytest.raises(ValueError, match="at least one"):
        RoutingTrace.concat([])


def test_only_keeps_one_phase():
    trace = make_trace((2, 2, 1), phase=np.array([0, 1, 0, 0, 1], np.uint8))
    np.testing.assert_array_equal(trace.only(PREFILL).sequence_lengths, [1, 2])
    np.testing.assert_array_equal(trace.only(DECODE).sequence_lengths, [1, 1])
    np.testing.assert_array_equal(trace.only(DECODE).expert_ids, trace.expert_ids[[1, 4]])
    with pytest.raises(ValueError, match="record the phase"):
        make_trace(phase=None).only(PREFILL)


def test_split_needs_two_sequences():
    with pytest.raises(ValueError, match="1 sequence"):
        make_trace((5,)).split(0.5)
    with pytest.raises(ValueError, match="strictly between"):
        make_trace().split(1.0)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match="not a routing trace"):
        RoutingTrace.load(tmp_path / "x.npz")
    np.savez(tmp_path / "p.npz", expert_ids=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        RoutingTrace.load(tmp_path / "p.npz")
    for name in ("b.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"not an archive at all")
        with pytest.raises(ValueError, match="cannot be read"):
            RoutingTrace.load(tmp_path / name)
    with pytest.raises(ValueError, match="npz or"):
        make_trace().save(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "absent.npz")


def test_vllm_arrays_become_sequences():
    requests = [np.array([[[0, 1]], [[2, 3]]]), np.array([[[3, 0]]]), np.zeros((0, 1, 2), int)]
    trace = from_vllm_routed_experts(requests, 4, model="m", prompt_lengths=[1, 1, 0])
    np.testing.assert_array_equal(trace.sequence_lengths, [2, 1])
    np.testing.assert_array_equal(trace.phase, [PREFILL, DECODE, PREFILL])
    np.testing.assert_array_equal(trace.expert_ids[:, 0], [[0, 1], [2, 3], [3, 0]])
    with pytest.raises(ValueError, match="equal layers and K"):
        from_vllm_routed_experts([requests[0], np.zeros((1, 2, 2), int)], 4, model="m")
    with pytest.raises(ValueError, match="no request"):
        from_vllm_routed_experts([], 4, model="m")
    with pytest.raises(ValueError, match="1 prompt lengths for 3"):
        from_vllm_routed_experts(requests, 4, model="m", prompt_lengths=[1])


def test_layers_that_vllm_leaves_at_zero_are_dropped():
    ids = np.random.default_rng(0).random((9, 6, 64)).argsort(-1)[..., :8].astype(np.int16)
    ids[:, 0] = 0  # the dense first layer
    trace = from_vllm_routed_experts([ids, ids], 64, model="m", prompt_lengths=[5, 5])
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([ids, ids])[:, 1:])


def test_sglang_records_become_sequences():
    dense = np.zeros((1, 3, 2), int)  # the recorder never writes to a dense layer
    extend = {
        "topk_ids_of_layer": np.concatenate([dense, [[[0, 1], [2, 3], [4, 0]]]]),
        "extend_seq_lens": [2, 1],
        "forward_mode": 1,
    }
    decode = {"topk_ids_of_layer": np.concatenate([dense[:, :2], [[[1, 4], [3, 1]]]]), "forward_mode": 2}
    table = np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]])
    trace = from_sglang_records([extend, decode], 4, model="m", physical_to_logical=table)
    np.testing.assert_array_equal(trace.sequence_lengths, [2, 1, 1, 1])
    np.testing.assert_array_equal(trace.phase, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(trace.expert_ids[:, 0], [[3, 2], [1, 0], [1, 3], [2, 1], [0, 2]])
    with pytest.raises(ValueError, match="sum to 2 but 3"):
        from_sglang_records([extend | {"extend_seq_lens": [2]}], 5, model="m")
    with pytest.raises(ValueError, match="mode per_token"):
        from_sglang_records([{}], 4, model="m")
    with pytest.raises(ValueError, match="no layer"):
        from_sglang_records([{"topk_ids_of_layer": dense}], 4, model="m")
    with pytest.raises(ValueError, match="does not cover"):
        from_sglang_records([extend], 4, model="m", physical_to_logical=table[:, :3])


@pytest.mark.parametrize(
    ("domain", "sequences", "tokens", "total"),
    [("intent", 127, 8222, 40276217), ("summary", 13, 8479, 41526273), ("translation", 40, 8251, 40457278)],
)
def test_recorded_deepseek_traces(shared_data, domain, sequences, tokens, total):
    trace = from_deepseek_esft_npz(shared_data / "traces" / f"deepseek_v2_lite_{domain}.npz")
    assert (trace.num_sequences, trace.num_tokens, trace.num_layers, trace.top_k) == (sequences, tokens, 26, 6)
    assert int(trace.expert_ids.sum(dtype=np.int64)) == total
    assert trace.domain == domain
    assert 0 < float(trace.weights.sum(axis=2).mean()) < 1


def test_arrays_of_another_file(shared_data):
    with pytest.raises(ValueError, match="lacks"):
        from_deepseek_esft_npz(shared_data / "traces" / "olmoe_mixtral_domain_counts.npz")
