"""The sampler against a plain computation, and parameters that make no sense."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from moe.engine.draw import NONE_LEFT, Draws, draw, philox, uniform
from moe.engine.sampling import Sampler, choose, edited, logprobs_of
from moe.params import SamplingParams

V = 17


def sample(params, logits, tokens, num_prompt=None):
    """One row's token; its error is raised."""
    sampler = Sampler(params, len(tokens) if num_prompt is None else num_prompt)
    (choice,) = choose(logits[None], [(sampler, tokens)])
    if choice.error is not None:
        raise ValueError(choice.error)
    return choice.token


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
            if taken and mass >= params.top_p:
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
    st.sampled_from([1.0, 0.9, 0.5, 0.01, 0.0]),
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
    draws = 300
    counts = [0] * V
    asking = [(Sampler(replace(params, seed=seed + n), len(tokens)), tokens) for n in range(draws)]
    for choice in choose(logits.expand(draws, V), asking):
        counts[choice.token] += 1
    assert torch.equal(logits, before)
    assert {i for i, n in enumerate(counts) if n} <= set(expected)
    for i, p in expected.items():  # six standard deviations
        assert abs(counts[i] - draws * p) <= 6 * math.sqrt(draws * p * (1 - p)) + 1, (i, p, counts[i])


def test_greedy_takes_the_largest_whatever_the_filters():
    logits = random_logits(3)
    params = SamplingParams(top_k=1, top_p=0.1, min_p=0.9, seed=5)
    assert {sample(params, logits, [0]) for _ in range(3)} == {int(logits.argmax())}
    best, second = logits.topk(2).indices.tolist()
    penalised = SamplingParams(repetition_penalty=1000.0)
    assert sample(penalised, logits.abs() + 1, [best]) != best
    assert sample(penalised, torch.tensor([3.0, 2.0, -1.0]), [0]) == 1
    assert second != best


def test_seeds():
    logits = random_logits(1) / 4

    def draw(seed):
        params = SamplingParams(temperature=1.0, seed=seed)
        return [sample(params, logits, [0] * (1 + n), num_prompt=1) for n in range(20)]

    assert draw(7) == draw(7) != draw(8)
    torch.manual_seed(0)  # the global generator has no part in it
    one = draw(7)
    torch.manual_seed(1)
    assert draw(7) == one
    assert len(draw((1 << 63) - 1)) == 20
    assert SamplingParams(seed=-1).seed is None
    assert draw(-7) == draw((1 << 63) - 7) != draw(7)
    assert [SamplingParams(seed=-2, n=3).sample(n).seed for n in range(3)] == [(1 << 63) - 2, (1 << 63) - 1, 0]


def test_extreme_temperatures_are_finite():
    logits = random_logits(2) * 50
    for temperature in (1e-6, 1e6):
        assert 0 <= sample(SamplingParams(temperature=temperature), logits, [0]) < V


@pytest.mark.parametrize("num", [0, 1, 5, V, V + 10])
def test_logprobs_are_the_log_softmax_of_the_models_logits(num):
    logits = random_logits(9)
    sampler = Sampler(SamplingParams(temperature=0.2, top_k=2, logprobs=num))
    (choice,) = choose(logits[None], [(sampler, [1])])
    exact = logits.double().log_softmax(-1)
    assert [choice.logprobs] == logprobs_of(logits[None], [choice.token], num)
    (result,) = logprobs_of(logits[None], [4], num)
    assert result.chosen == pytest.approx(float(exact[4]), abs=1e-6)
    order = exact.argsort(descending=True).tolist()
    assert list(result.top) == order[: min(num, V)]
    assert list(result.top.values()) == pytest.approx(exact[order[: min(num, V)]].tolist(), abs=1e-5)
    assert choose(logits[None], [(Sampler(SamplingParams()), [1])])[0].logprobs is None


def test_philox_gives_the_published_words():
    """The known answers of Random123's distribution."""
    ones = 0xFFFFFFFF
    assert philox((0, 0), (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones, ones), (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0xA4093822, 0x299F31D0), pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    numbers = [uniform(seed, place) for seed in (0, 1, (1 << 63) - 1) for place in range(400)]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 6 / math.sqrt(12 * len(numbers))


def plain_draw(scores, how):
    """`draw` of one row with Python's numbers: integers of any size, sorted by likelihood, then by token."""
    finite = [s for s in scores if s > -math.inf]
    if not finite:
        return NONE_LEFT
    ratio = [math.exp((s / how.temperature) - max(finite) / how.temperature) for s in scores]
    one = 2 ** (62 - (len(scores) - 1).bit_length())
    order = sorted(range(len(scores)), key=lambda i: (-int(ratio[i] * one), i))
    weight = {i: int(ratio[i] * one) for i in order}
    if how.top_k:
        least = weight[order[min(how.top_k, len(order)) - 1]]
        weight = {i: w if w >= least else 0 for i, w in weight.items()}
    if how.top_p < 1:
        enough, before = max(1, math.ceil(sum(weight.values()) * how.top_p)), 0
        for i in order:
            before, weight[i] = before + weight[i], weight[i] if before < enough else 0
    weight = {i: w if ratio[i] >= how.min_p else 0 for i, w in weight.items()}
    place = int(float(sum(weight.values())) * how.uniform)
    for i in range(len(scores)):
        place -= weight[i]
        if place < 0:
            return i
    return max(i for i, w in weight.items() if w)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.01, 0.5, 1.0, 30.0]),
            st.sampled_from([0, 1, 3, 50]),
            st.sampled_from([1.0, 0.9, 0.3, 1e-9, 0.0]),
            st.sampled_from([0.0, 0.2, 1.0]),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 99),
    st.booleans(),
)
def test_rows_are_drawn_as_one_by_one_in_plain_integers(rows, seed, has_ties):
    """Also a row's token is the same in any batch; ties and forbidden tokens included."""
    draws = [Draws(*row) for row in rows]
    scores = torch.stack([random_logits(seed + n) for n in range(len(draws))])
    scores = scores.round() if has_ties else scores
    scores[:, 5::4] = -torch.inf
    scores[seed % len(draws)] = -torch.inf
    found = draw(scores, draws)
    assert found.tolist() == [plain_draw(row, how) for row, how in zip(scores.double().tolist(), draws)]
    assert found.tolist() == [int(draw(scores[n : n + 1], [how])) for n, how in enumerate(draws)]


def test_edits_are_what_transformers_processors_do():
    tokens, bad = [3, 4, 3, 9], ((2,), (9, 7), (3, 9, 1), (5, 9, 6))
    logits = torch.stack([random_logits(1), random_logits(2)])
    params = SamplingParams(repetition_penalty=1.7, bad_words_ids=bad)
    found = edited(logits, {1: Sampler(params, 2).edits(tokens, V)}, {1: 1.7})
    ids = torch.tensor([tokens])
    wanted = NoBadWordsLogitsProcessor([*map(list, bad)])(ids, logits[1:].clone())
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, wanted)
    assert torch.equal(found[0], logits[0])
    assert torch.equal(found[1], wanted[0])
    assert found[1].isinf().nonzero().flatten().tolist() == [1, 2, 7]


def test_every_edit_in_one_batch_and_logits_stay():
    logits = torch.zeros(5, V)
    before = logits.clone()
    rules = [
        SamplingParams(logit_bias={3: 5.0}),
        SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, logit_bias={6: 1.5, 7: 1.5}),
        SamplingParams(allowed_token_ids=[8, 9]),
        SamplingParams(min_tokens=4, end_token_ids=(0,)),
        SamplingParams(),
    ]
    tokens = [[1, 2, 6, 6]] * 5
    choices = choose(logits, [(Sampler(one, 2), said) for one, said in zip(rules, tokens)])
    assert [choice.token for choice in choices] == [3, 7, 8, 1, 0]
    assert torch.equal(logits, before)


def test_a_row_that_fails_is_alone():
    logits = torch.stack([random_logits(n) for n in range(4)])
    logits[1, 3] = torch.nan
    rules = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(allowed_token_ids=[2], bad_words_ids=((2,),)),
    ]
    choices = choose(logits, [(Sampler(one), [1]) for one in (*rules, rules[1])])
    assert "not finite: nan for token 3" in choices[1].error
    assert "leave no token" in choices[2].error
    assert choices[0].token == int(logits[0].argmax())
    assert choices[3] == choose(logits[3:], [(Sampler(rules[1]), [1])])[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("temperature", [-0.1, math.nan, math.inf, 1e-9]),
        ("top_k", [-2]),
        ("top_p", [-0.1, 1.01, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
        ("n", [0]),
        ("logprobs", [-1]),
        ("seed", [-(1 << 63) - 1, 1 << 63]),
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


WRONG_KINDS = ("5", b"5", 1.5, True, [1.5], ["x"], {"x": 1}, object(), [True], [None], [[1.5]], math.nan)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams) if f.name != "structured_outputs"])
def test_every_parameter_is_what_its_field_says_or_refused_by_its_name(name):
    """What is not refused here is found in a step, by then with others."""
    kinds = {True: bool, False: (int, float, str, tuple, dict)}
    taken, refused = 0, []
    for value in WRONG_KINDS:
        try:
            read = getattr(SamplingParams(**{name: value}), name)
        except ValueError as error:
            refused.append(str(error))
            continue
        taken += 1
        default = SamplingParams.__dataclass_fields__[name].default
        assert isinstance(read, kinds[isinstance(default, bool)]), (name, value)
        if isinstance(read, tuple):
            flat = [x for one in read for x in (one if isinstance(one, tuple) else (one,))]
            assert all(type(x) is (str if name in ("stop", "bad_words") else int) for x in flat), (name, value)
    assert taken <= 3
    assert all(name.removesuffix("_ids") in sentence for sentence in refused), refused


def test_numbers_of_numpy_and_torch_are_numbers():
    bias = {"5": 1, np.int64(6): 2}
    params = SamplingParams(
        max_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=np.arange(3), logit_bias=bias
    )
    assert type(params.max_tokens) is int
    assert params.stop_token_ids == (0, 1, 2)
    assert params.logit_bias == {5: 1.0, 6: 2.0}
    assert SamplingParams(allowed_token_ids=torch.tensor([4, 5])).allowed_token_ids == (4, 5)


def test_a_frequency_penalty_counts_every_token_once():
    tokens = [1, 2, 3, 2, 2, 1]
    edits = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), 1).edits(tokens, 10)
    assert dict(edits.subtracted) == {t: 0.5 + 0.25 * tokens[1:].count(t) for t in {1, 2, 3}}


def test_words_that_every_step_looks_for_have_an_end():
    SamplingParams(bad_words=["x"] * 10_000, bad_words_ids=[[1]] * 20_000)
    for words in ({"bad_words": ["x"] * 10_001}, {"bad_words_ids": [[1]] * 20_001}):
        with pytest.raises(ValueError, match="bad_words must be at most 10000, of two forms each"):
            SamplingParams(**words)
