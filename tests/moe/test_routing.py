"""Between routers and experts: stages change routing, observers see it, and all are told whose tokens it is of."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe.comm.membership import process_groups
from moe.config import ParallelConfig
from moe.layer.routers import wrap_router
from moe.layer.routing import NOBODY, Routing, RoutingSeam, Span, StepContext, WholeForwards
from moe.llm import LLM
from tests.distributed import spawn
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import PROMPTS, TINYMOE, RoutingLog, config, engine_says, greedy


class Shift:
    """Every expert becomes the one `by` further on."""

    def __init__(self, by: int, num_experts: int = 16) -> None:
        self.by, self.num_experts = by, num_experts

    def route(self, x, routing, step):
        return routing._replace(topk_ids=(routing.topk_ids + self.by) % self.num_experts)


class Places:
    """An observer: which places of which sequences each layer routed, in order; whose answer's they are."""

    def __init__(self, num_layers: int) -> None:
        self.seen = [{} for _ in range(num_layers)]
        self.answers, self.begun = [set() for _ in range(num_layers)], 0

    def begin(self, step):
        self.begun += 1

    def routed(self, x, routing, step):
        assert len(x) == len(routing.topk_ids) == step.num_tokens
        owners = np.repeat([s.owner for s in step.spans], step.lengths)
        places = [p for s in step.spans for p in range(s.start, s.end)]
        sequences = np.repeat([s.sequence for s in step.spans], step.lengths)
        each = zip(owners.tolist(), sequences.tolist(), places, step.phase_of_token().tolist())
        for owner, sequence, place, phase in each:
            self.seen[routing.layer].setdefault((owner, sequence), []).append(place)
            if phase:
                self.answers[routing.layer].add((owner, sequence, place))


def test_stages_in_order_then_observers():
    seam, log = RoutingSeam(), RoutingLog(2)
    seam.observers.append(log)
    seam.stages += [Shift(3), Shift(5, 7)]
    ids, weights = torch.tensor([[0, 15], [6, 1]]), torch.rand(2, 2)
    said = seam.through(torch.zeros(2, 4), Routing(1, ids, weights))
    expected = [[((i + 3) % 16 + 5) % 7 for i in row] for row in ids.tolist()]
    assert said.topk_ids.tolist() == expected
    first, second = log.take()
    assert first is None
    assert second.topk_ids.tolist() == expected
    assert torch.equal(torch.from_numpy(second.topk_weights), weights)
    assert log.take() == [None, None]


def test_a_step_says_whose_its_tokens_are():
    step = StepContext((Span(7, 3, 5, 4), Span(2, 0, 1, 1), Span(NOBODY, 9, 11, 9, owner=1)))
    assert step.num_tokens == 5
    assert step.phase_of_token().tolist() == [0, 1, 0, 1, 1]
    assert [(span.sequence, span.end) for span in step.only([2, 0]).spans] == [(NOBODY, 11), (7, 5)]
    nothing = StepContext()
    assert (nothing.num_tokens, len(nothing.phase_of_token())) == (0, 0)


def test_whole_forwards_leave_out_interrupted_ones_and_refuse_what_does_not_fit():
    taken = []
    forwards = WholeForwards(2, lambda step, layers: taken.append((step, [one.topk_ids.tolist() for one in layers])))
    step = StepContext((Span(0, 0, 2, 2),))

    def routed(layer, rows):
        forwards.routed(None, Routing(layer, torch.full((rows, 1), layer), torch.ones(rows, 1)), step)

    forwards.begin(step)
    routed(0, 2)
    forwards.begin(step)
    routed(0, 2)
    routed(1, 2)
    assert taken == [(step, [[[0], [0]], [[1], [1]]])]
    forwards.begin(step)
    with pytest.raises(ValueError, match="layer 1 routed 2 rows as number 0 of a step of 2 tokens"):
        routed(1, 2)
    with pytest.raises(ValueError, match="layer 0 routed 3 rows as number 0 of a step of 2 tokens"):
        routed(0, 3)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_experts_follow_the_stages(kernel):
    """A stage and its inverse change nothing; a stage alone changes what the model says, by blocks and by modules."""
    with LLM(TINYMOE, config("0.5", kernel=kernel)) as llm:
        right = engine_says(llm, PROMPTS[:2]).tokens
        seam = llm.engine.experts.routing
        seam.stages += [Shift(3), Shift(13)]
        assert engine_says(llm, PROMPTS[:2]).tokens == right
        del seam.stages[0]
        assert engine_says(llm, PROMPTS[:2]).tokens != right


def wrap_all(llm, around):
    """around: of the number of a layer."""
    sites = llm.engine.blueprint.index.sites
    return [wrap_router(llm.engine.model, site, around(n)) for n, site in enumerate(sites)]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_wrapper_may_speak_for_a_router(kernel):
    """One that repeats the router changes nothing, nor one around another; one that masks experts keeps all away."""
    with LLM(TINYMOE, config("0.5", kernel=kernel, prefix_sharing=False)) as llm:
        right = engine_says(llm, PROMPTS[:3]).tokens
        asked, allowed = [0] * 6, torch.tensor([1, 2, 5, 6, 11])

        def repeating(layer):
            def around(router, x):
                asked[layer] += 1
                return router(x)

            return around

        def masking(layer):
            def around(router, x):
                logits, weights, ids = router(x)
                scores = torch.nn.functional.linear(x, router.weight)[:, allowed].softmax(-1)  # past the other wrapper
                best = scores.topk(ids.shape[1])
                return logits, best.values.to(weights.dtype), allowed[best.indices]

            return around

        undo = wrap_all(llm, repeating)
        assert engine_says(llm, PROMPTS[:3]).tokens == right
        assert len(set(asked)) == 1
        assert asked[0] > 8
        again = wrap_all(llm, masking)
        log = RoutingLog(6)
        llm.engine.experts.routing.observers.append(log)
        assert engine_says(llm, PROMPTS[:3]).tokens != right
        assert {int(e) for layer in log.take() for e in layer.topk_ids.flat} == set(allowed.tolist())
        for each in (*again, *undo):
            each()
        before = list(asked)
        assert engine_says(llm, PROMPTS[:3]).tokens == right
        assert asked == before


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4"])
def test_routers_of_other_families_can_be_wrapped_too(family, tmp_path):
    """They say other things than the usual three tensors, and their blocks reach for attributes of theirs."""
    with LLM(tiny_checkpoint(family, tmp_path), config("1.0", prefix_sharing=False)) as llm:
        right, calls = engine_says(llm, PROMPTS[:2]).tokens, []
        undo = wrap_all(llm, lambda layer: lambda router, *given: calls.append(layer) or router(*given))
        assert engine_says(llm, PROMPTS[:2]).tokens == right
        assert set(calls) == set(range(len(undo)))
        wrap_all(llm, lambda layer: lambda router, x, *more: router(-x, *more))
        assert engine_says(llm, PROMPTS[:2]).tokens != right


def test_every_layer_without_a_router_is_refused():
    with LLM(TINYMOE, config("1.0")) as llm:
        site = replace(llm.engine.blueprint.index.sites[0], num_experts=17)
        with pytest.raises(ValueError, match="there is no weight of 17 x"):
            wrap_router(llm.engine.model, site, None)


@pytest.mark.parametrize("how", ["blocks", "modules", "one at a time", "longrope"])
def test_every_runner_says_whose_tokens_it_has(how, tmp_path):
    """Every layer routes each place of each sequence once, in chunks and out of order as they come."""
    folder = tiny_checkpoint("phimoe_longrope", tmp_path) if how == "longrope" else TINYMOE
    kernel = "reference" if how == "modules" else "auto"
    settings = config("0.5", kernel=kernel, prefix_sharing=False, packed=how != "one at a time", max_tokens=7)
    with LLM(folder, settings) as llm:
        engine = llm.engine
        places = Places(len(engine.experts.kernels))
        engine.experts.routing.observers.append(places)
        said = llm.generate(PROMPTS, greedy(4))
        assert engine.is_packed == (how in ("blocks", "modules"))
    expected = {(0, n): [*range(len(p) + 3)] for n, p in enumerate(PROMPTS)}
    if how == "longrope":  # what is longer than 24 is computed again from its beginning, once
        expected[0, 3] = [*range(len(PROMPTS[3]) + 3)]
    answers = {(0, n, len(p) + i) for n, p in enumerate(PROMPTS) for i in range(3)}
    assert len(said) == len(PROMPTS)
    for seen, phase in zip(places.seen, places.answers):
        assert {key: sorted(set(each)) for key, each in seen.items()} == expected
        assert how == "longrope" or seen == expected
        assert phase == answers


def serve_watched(prompts: list[list[int]], dispatcher: str) -> tuple:
    """One rank: how often a forward began, and what its layers were told."""
    with process_groups() as groups:
        parallel = ParallelConfig(dispatcher=dispatcher)
        settings = replace(config("1.0", prefix_sharing=False), parallel=parallel)
        with LLM(TINYMOE, settings, groups=groups) as llm:
            places = Places(6)
            llm.engine.experts.routing.observers.append(places)
            llm.generate(prompts if groups.rank else [], greedy(4), use_tqdm=False)
            return places.begun, places.seen, places.answers


@pytest.mark.parametrize("dispatcher", ["all_to_all", "coherent"])
def test_ranks_say_whose_tokens_they_have(dispatcher):
    """One rank has all requests. With tokens that go home again the other joins with none; coherent, they move."""
    prompts = [p[:9] for p in PROMPTS]
    ranks = spawn(2, serve_watched, prompts, dispatcher)
    expected = {(1, n): [*range(len(p) + 3)] for n, p in enumerate(prompts)}
    answers = {(1, n, len(p) + i) for n, p in enumerate(prompts) for i in range(3)}
    assert ranks[0][0] == ranks[1][0] >= 4
    for layer in range(6):
        seen = [rank[1][layer] for rank in ranks]
        assert bool(seen[0]) == (dispatcher == "coherent")
        both = {key: sorted(seen[0].get(key, []) + seen[1].get(key, [])) for key in {**seen[0], **seen[1]}}
        assert both == expected
        assert ranks[0][2][layer] | ranks[1][2][layer] == answers
