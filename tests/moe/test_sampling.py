"""The sampler against a plain computation, and parameters that make no sense."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.engine.sampling import Sampler
from moe.params import SamplingParams

V = 17


def random_logits(seed, size=V):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def plain_probabilities(logits, params, tokens):
    """In the order: penalty, temperature, top_k, top_p, min_p; with loops and no sorting tricks."""
    scores = logits.double().tolist()
    for t in set(tokens):
        if params.repetition_penalty != 1:
            scores[t] = (
                scores[t] * params.repetition_penalty if scores[t] < 0 else scores[t] / params.repetition_penalty
            )
    scores = [s / params.temperature for s in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[: params.top_k] if params.top_k else order

    def shares(indices):
        top = max(scores[i] for i in indices)
        weights = {i: math.exp(scores[i] - top) for i in indices}
        total = sum(weights.values())
        return {i: w / total for i, w in weights.items()}

    if params.top_p < 1:
        p, taken, mass = shares(kept), [], 0.0
        for i in kept:  # likeliest first
            if mass >= params.top_p:
                break
            taken.append(i)
            mass += p[i]
        kept = taken
    if params.min_p > 0:
        p = shares(kept)
        kept = [i for i in kept if p[i] >= params.min_p * max(p.values())]
    return shares(kept)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 4, 100]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    st.sampled_from([1.0, 1.5, 0.7]),
)
def test_samples_follow_the_plain_probabilities(seed, temperature, top_k, top_p, min_p, penalty):
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed
    )
    logits, tokens = random_logits(seed), [1, 2, 2, 5]
    before = logits.clone()
    expected = plain_probabilities(logits, params, tokens)
    sampler = Sampler(params)
    draws = 300
    counts = [0] * V
    for _ in range(draws):
        counts[sampler.sample(logits, tokens)] += 1
    assert torch.equal(logits, before)
    assert {i for i, n in enumerate(counts) if n} <= set(expected)
    for i, p in expected.items():  # six standard deviations
        assert abs(counts[i] - draws * p) <= 6 * math.sqrt(draws * p * (1 - p)) + 1, (i, p, counts[i])


def test_greedy_takes_the_largest_whatever_the_filters():
    logits = random_logits(3)
    params = SamplingParams(top_k=1, top_p=0.1, min_p=0.9, seed=5)
    assert {Sampler(params).sample(logits, [0]) for _ in range(3)} == {int(logits.argmax())}
    best, second = logits.topk(2).indices.tolist()
    penalised = SamplingParams(repetition_penalty=1000.0)
    assert Sampler(penalised).sample(logits.abs() + 1, [best]) != best
    assert Sampler(penalised).sample(torch.tensor([3.0, 2.0, -1.0]), [0]) == 1
    assert second != best


def test_seeds():
    logits = random_logits(1) / 4

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.sample(logits, [0]) for _ in range(20)]

    assert draw(7) == draw(7) != draw(8)
    torch.manual_seed(0)  # the global generator has no part in it
    one = draw(7)
    torch.manual_seed(1)
    assert draw(7) == one
    assert len(draw((1 << 63) - 1)) == 20


def test_extreme_temperatures_are_finite():
    logits = random_logits(2) * 50
    for temperature in (1e-6, 1e6):
        assert 0 <= Sampler(SamplingParams(temperature=temperature)).sample(logits, [0]) < V


@pytest.mark.parametrize("num", [0, 1, 5, V, V + 10])
def test_logprobs_are_the_log_softmax_of_the_models_logits(num):
    logits = random_logits(9)
    sampler = Sampler(SamplingParams(temperature=0.2, top_k=2, logprobs=num))
    exact = logits.double().log_softmax(-1)
    result = sampler.logprobs(logits, 4)
    assert result.chosen == pytest.approx(float(exact[4]), abs=1e-6)
    order = exact.argsort(descending=True).tolist()
    assert list(result.top) == order[: min(num, V)]
    assert list(result.top.values()) == pytest.approx(exact[order[: min(num, V)]].tolist(), abs=1e-5)
    assert Sampler(SamplingParams()).logprobs(logits, 4) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("temperature", [-0.1, math.nan, math.inf, 1e-9]),
        ("top_k", [-2]),
        ("top_p", [0.0, 1.01, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
        ("n", [0]),
        ("logprobs", [-1]),
        ("seed", [-1, 1 << 63]),
        ("stop", ["", ["a", ""]]),
    ],
)
def test_bad_parameters(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name.split("_")[0]):
            SamplingParams(**{name: value})


def test_stop_is_one_string_or_several():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3]).stop_token_ids == (3,)
