"""Forecasts of routing: fitted in closed form, without effect on tokens, or as a pre-gate whose cost is measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from moe.config import EngineConfig, RoutingConfig
from moe.evaluate import evaluate
from moe.fit import fit_lookahead
from moe.launch.cli import main
from moe.layer.distil import distilled
from moe.layer.pregate import Pregate
from moe.layer.ridge import Forecast, Regression, RidgeFit
from moe.layer.routers import PlainRouter
from moe.layer.routing import Routing, StepContext
from moe.llm import LLM
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import TINYMOE, RoutingLog, config, demo_reference, engine_says, random_prompts

WINDOWS = random_prompts((40, 33, 21, 40, 40, 17, 40, 29, 16, 40, 40), vocab_size=2048, seed=5)
PROMPTS = random_prompts((9, 1, 30), vocab_size=2048, seed=6)


@pytest.fixture(scope="module")
def lookahead(tmp_path_factory):
    """Of the demo model, fitted with a quarter of its experts in memory."""
    path = tmp_path_factory.mktemp("lookahead") / "demo.safetensors"
    with LLM(TINYMOE, config("0.25", max_tokens=64)) as llm:
        forecast, recalls = fit_lookahead(llm, WINDOWS, distances=2)
        llm.engine.experts.cache.check()
    assert forecast.kind == "logits"
    assert {(r.layer, r.distance) for r in recalls} == {(n, d) for n in range(6) for d in (1, 2) if n + d < 6}
    assert all(0 <= r.first <= r.first_two <= 1 for r in recalls)
    forecast.save(path)
    return path


def foretold(base: EngineConfig, path, pregate="off", prefetch="off") -> EngineConfig:
    routing = RoutingConfig(lookahead=None if path is None else str(path), pregate=pregate)
    return replace(base, routing=routing, offload=replace(base.offload, prefetch=prefetch))


def test_regressions_are_those_of_all_rows_at_once():
    """Streamed in odd pieces, T = 0 too, as numpy solves all rows with the penalty as rows of their own."""
    rng, hidden, experts, ridge = np.random.default_rng(0), 5, [4, 6, 3], 2.5
    fit = RidgeFit(hidden, experts, 2, 2, None)
    x = [rng.normal(size=(90, hidden)).astype(np.float32) for _ in experts]
    ids = [np.argsort(rng.random((90, e)), axis=1)[:, :2] for e in experts]
    ids[1][7] = -1  # a token without experts
    for rows in (slice(0, 1), slice(1, 1), slice(1, 70), slice(70, 90)):
        fit.begin(StepContext())
        for layer in range(3):
            routing = Routing(layer, torch.from_numpy(ids[layer][rows]), torch.empty(0))
            fit.routed(torch.from_numpy(x[layer][rows]), routing, StepContext())
    found = fit.forecast(ridge).regressions
    assert set(found) == {(0, 1), (0, 2), (1, 1)}
    for (layer, distance), one in found.items():
        y = np.zeros((90, experts[layer + distance]))
        for token, chosen in enumerate(ids[layer + distance]):
            y[token, chosen[chosen >= 0]] = 1
        a = np.concatenate([x[layer], np.ones((90, 1))], axis=1).astype(np.float64)
        padded = np.concatenate([a, np.sqrt(ridge) * np.eye(hidden + 1)])
        weight = np.linalg.lstsq(padded, np.concatenate([y, np.zeros((hidden + 1, y.shape[1]))]), rcond=None)[0]
        np.testing.assert_allclose(one.weight.numpy(), weight, rtol=1e-4, atol=1e-6)  # stored in fp32
        np.testing.assert_allclose(one.spread.numpy(), np.sqrt(((y - a @ weight) ** 2).mean(0)), rtol=1e-4)


def test_probability_is_of_being_among_the_best():
    weight = torch.tensor([[3.0, 2.0, 1.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    regression = {(0, 1): Regression(weight, torch.full((4,), 0.5))}
    forecast = Forecast("logits", 2, regression)
    said = forecast.probability(0, 1, torch.ones(1, 1))[0]
    expected = torch.special.ndtr((weight[0] - 1.5) / 0.5)
    assert torch.allclose(said, expected)
    assert forecast.probability(0, 1, torch.ones(0, 1)).shape == (0, 4)
    assert Forecast("logits", 4, regression).probability(0, 1, torch.ones(2, 1)).tolist() == [[1.0] * 4] * 2


def test_a_fit_that_was_stopped_goes_on(tmp_path):
    sums = tmp_path / "sums"

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done >= 8:
            raise Stopped

    with LLM(TINYMOE, config("0.25", max_tokens=64)) as llm:
        whole, _ = fit_lookahead(llm, WINDOWS, distances=1)
        with pytest.raises(Stopped):
            fit_lookahead(llm, WINDOWS, distances=1, sums=sums, progress=stop)
        seen = []
        again, _ = fit_lookahead(llm, WINDOWS, distances=1, sums=sums, progress=lambda done, _: seen.append(done))
        assert seen[0] == 8
        for key, one in whole.regressions.items():
            assert torch.equal(one.weight, again.regressions[key].weight)
        seen.clear()  # other texts begin anew
        fit_lookahead(llm, WINDOWS[::-1], distances=1, sums=sums, progress=lambda done, _: seen.append(done))
        assert seen[0] == 0


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("budget", ["0.5", "3"])
def test_learned_prefetch_changes_no_token(lookahead, has_file, budget):
    with LLM(TINYMOE, config("1.0")) as llm:
        expected = engine_says(llm, PROMPTS).tokens
    with LLM(TINYMOE, foretold(config(budget), lookahead if has_file else None, prefetch="learned")) as llm:
        ahead = llm.engine.experts.lookahead
        ahead.prefetcher._trial = None
        if not has_file:
            ahead.guess.FEWEST, ahead.guess._solved_at = 16, [8] * 5
        assert [engine_says(llm, PROMPTS).tokens for _ in range(3)] == [expected] * 3
        if budget == "0.5":
            assert sum(s.useful_bytes + s.late_bytes for s in llm.engine.layer_stats()) > 0
        if not has_file:
            assert set(ahead.guess.forecast.regressions) == {(n, 1) for n in range(5)}


def test_sigmoid_routers_are_foretold_by_their_choice(tmp_path):
    """Groups, sigmoids and corrections are not modelled: what is foretold is the selection itself."""
    folder = tiny_checkpoint("deepseek_v3", tmp_path / "model")
    windows = random_prompts((40,) * 10, seed=3)
    with LLM(folder, config("0.5", max_tokens=64)) as llm:
        forecast, recalls = fit_lookahead(llm, windows, distances=1)
        top_k, num_experts = llm.engine.blueprint.top_k, llm.engine.blueprint.index.sites[0].num_experts
    assert forecast.kind == "selection"
    assert np.mean([r.first for r in recalls]) > top_k / num_experts  # better than any experts at all
    forecast.save(tmp_path / "file")
    for pregate in ("restrict:8", "replace"):
        with pytest.raises(ValueError, match=r"no softmax over plain logits; set routing\.pregate=off"):
            LLM(folder, foretold(config("1.0"), tmp_path / "file", pregate))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # a router's own logits are rounded to bf16
def test_all_experts_as_candidates_is_exact(lookahead, dtype):
    for kernel, width in (("auto", 16), ("reference", 99)):
        with LLM(TINYMOE, config("0.5", kernel=kernel, dtype=dtype)) as llm:
            expected = engine_says(llm, PROMPTS)
        with LLM(TINYMOE, foretold(config("0.5", kernel=kernel, dtype=dtype), lookahead, f"restrict:{width}")) as llm:
            said = engine_says(llm, PROMPTS)
            assert any(f"restrict:{width} changes what the model says" in note for note in llm.notes)
            found = evaluate(llm, WINDOWS[:3])
        assert said.tokens == expected.tokens
        assert all(map(torch.equal, said.logits, expected.logits))
        assert (found.kl, found.agreement, found.loss) == (0.0, 1.0, found.exact_loss)


def test_tokens_whose_experts_were_all_foretold_keep_their_routing():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    forecast = Forecast("logits", 2, {(0, 1): Regression(torch.zeros(5, 6), None)})
    gate = Pregate(forecast, [PlainRouter(weight, None, 2, True)] * 2, 3)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    candidates = gate._foretell[0](x, 3, None, True)[0]
    outside = next(e for e in range(6) if e not in candidates[1])
    ids = torch.stack([candidates[0, [2, 0]], torch.tensor([candidates[1, 0], outside]), candidates[2, [1, 2]]])
    weights = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.25, 0.75]])  # as of a router that rounds
    routed = [gate.route(x, Routing(layer, ids, weights), StepContext()) for layer in range(2)][1]
    for row in (0, 2):
        assert torch.equal(routed.topk_ids[row], ids[row])
        assert torch.equal(routed.topk_weights[row], weights[row])
    assert set(routed.topk_ids[1].tolist()) <= set(candidates[1].tolist())


@pytest.mark.parametrize(("pregate", "width"), [("restrict:2", 2), ("restrict:4", 4), ("replace", 2)])
def test_nothing_outside_the_forecast_is_used(lookahead, pregate, width):
    """And what others are in the batch, or how a prompt is cut, makes no difference."""
    with LLM(TINYMOE, foretold(config("0.5", max_tokens=64), lookahead, pregate, "learned")) as llm:
        inputs, log, experts = [], RoutingLog(6), llm.engine.experts

        class Inputs:
            def begin(self, step):
                pass

            def routed(self, x, routing, step):
                inputs.append((routing.layer, x.clone()))

        experts.routing.observers += [log, Inputs()]
        together = engine_says(llm, PROMPTS).tokens
        chosen = log.take()
        forecast = Forecast.load(lookahead, [16] * 6, 192)
        x = [torch.cat([one for layer, one in inputs if layer == n]) for n in range(6)]
        for layer in range(1, 6):
            candidates = forecast.scores(layer - 1, 1, x[layer - 1]).topk(width).indices
            ids = torch.from_numpy(chosen[layer].topk_ids).long()
            assert (ids[:, :, None] == candidates[:, None, :]).any(-1).all()
            weights = torch.from_numpy(chosen[layer].topk_weights)
            assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))
    with LLM(TINYMOE, foretold(config("0.25", max_tokens=7), lookahead, pregate)) as llm:
        assert [engine_says(llm, [prompt]).tokens[0] for prompt in PROMPTS] == together


def test_evaluate_is_the_models_own_loss(lookahead, tmp_path):
    windows = WINDOWS[:3]
    with LLM(TINYMOE, config("0.5")) as llm:
        exact = evaluate(llm, windows)
        assert llm.engine.scheduler.pool.num_available == llm.engine.scheduler.pool.num_blocks
    model = demo_reference(torch.float32)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(torch.tensor([w])).logits[0, :-1], torch.tensor(w[1:]), reduction="sum")
            for w in windows
        ]
    count = sum(len(w) - 1 for w in windows)
    assert exact.num_tokens == count
    assert exact.loss == pytest.approx(float(sum(losses)) / count, rel=1e-5)  # fp32, sums of another order
    assert (exact.exact_loss, exact.agreement, exact.kl) == (exact.loss, 1.0, 0.0)
    with LLM(TINYMOE, foretold(config("0.5"), lookahead, "restrict:2")) as llm:
        restricted = evaluate(llm, windows)
    assert restricted.exact_loss == pytest.approx(exact.loss, rel=1e-6)
    assert restricted.kl > 0
    assert restricted.agreement < 1
    with LLM(tiny_checkpoint("mixtral", tmp_path / "other"), config()) as other, LLM(TINYMOE, config("0.5")) as llm:
        with pytest.raises(ValueError, match="2048 tokens in its vocabulary, other 97"):
            evaluate(llm, windows, against=other)


def test_what_does_not_fit_is_refused(lookahead, tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"is no lookahead file .*; make one with `moe fit-lookahead`"):
            LLM(TINYMOE, foretold(config(), path, prefetch="learned"))
    with pytest.raises(ValueError, match="must be off, replace or restrict:4"):
        RoutingConfig(pregate="restrict:0", lookahead="x")
    with pytest.raises(ValueError, match="make it with `moe fit-lookahead`"):
        RoutingConfig(pregate="replace")
    with pytest.raises(ValueError, match=r"restrict:1 leaves fewer experts than a token takes \(2\)"):
        LLM(TINYMOE, foretold(config(), lookahead, "restrict:1"))
    with pytest.raises(ValueError, match="it has no experts in slots; set"):
        LLM(tiny_checkpoint("nllb_moe", tmp_path / "whole"), foretold(config(), lookahead, "restrict:2"))
    other = tiny_checkpoint("mixtral", tmp_path / "mixtral")
    with pytest.raises(ValueError, match="it was fitted to another"):
        LLM(other, foretold(config(), lookahead, prefetch="learned"))
    for name, content in {"text": b"no tensors at all", "none": None}.items():
        path = tmp_path / name
        if content is None:
            save_file({"a": torch.zeros(1)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="is no lookahead file"):
            LLM(TINYMOE, foretold(config(), path, prefetch="learned"))


def test_the_commands(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "lookahead.safetensors"
    text.write_text("Once upon a time there was a little dog who liked to run in the park. " * 40)
    common = [str(TINYMOE), str(text), "--window", "48", "--limit", "10", "--set", "dtype=float32"]
    assert main(["fit-lookahead", *common, "-o", str(out), "--experts-in-memory", "0.25"]) == 0
    assert "every fifth kept apart to judge; foretells logits" in capsys.readouterr().out
    assert list(tmp_path.glob("*.sums*")) == []
    assert main(["fit-lookahead", *common, "-o", str(tmp_path / "few"), "--limit", "4"]) == 0
    assert "4 windows, fewer than five: none is left to judge it by; foretells" in capsys.readouterr().out
    settings = ["--set", f"routing.lookahead={out}", "--set", "routing.pregate=restrict:4"]
    assert main(["evaluate", *common, *settings]) == 0
    assert "routing.pregate=restrict:4: 470 tokens: loss " in capsys.readouterr().out
    assert main(["evaluate", *common]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("470 tokens: loss ")
    assert "the exact run itself, so there is none to compare it with: set routing.pregate=restrict:M" in said
    assert main(["evaluate", str(TINYMOE), str(tmp_path / "missing.txt")]) == 2


def test_distilling_brings_the_gate_nearer_to_its_router():
    """A router that is no linear function of what the gate sees; the divergence falls, the rest stays as it was."""
    torch.manual_seed(0)
    x = [torch.randn(3000, 8)]
    x.append(torch.tanh(2 * x[0] @ torch.randn(8, 8)))
    x.append(x[1] + 0.1)
    routers = [PlainRouter(torch.randn(6, 8), None, 2, True) for _ in x]
    fit = RidgeFit(8, [6, 6, 6], 2, 2, routers)
    fit.begin(StepContext())
    for layer, rows in enumerate(x):
        fit.routed(rows, Routing(layer, routers[layer].logits(rows).topk(2).indices, torch.empty(0)), StepContext())
    closed = fit.forecast()
    trained = distilled(closed, x, routers, 300)

    def divergence(forecast, layer):
        said, wanted = forecast.scores(layer, 1, x[layer]), routers[layer + 1].logits(x[layer + 1])
        return float(F.kl_div(said.log_softmax(1), wanted.softmax(1), reduction="batchmean"))

    assert divergence(trained, 0) < 0.97 * divergence(closed, 0)
    assert divergence(trained, 1) < divergence(closed, 1) + 1e-3  # linear: the closed form is right
    assert trained.regressions[0, 2] is closed.regressions[0, 2]
    residual = trained.scores(0, 1, x[0]) - routers[1].logits(x[1])
    residual = residual - residual.mean(1, keepdim=True)
    assert torch.allclose(trained.regressions[0, 1].spread, residual.square().mean(0).sqrt(), rtol=1e-3)
    again = distilled(closed, x, routers, 300)
    assert torch.equal(again.regressions[0, 1].weight, trained.regressions[0, 1].weight)
    with pytest.raises(ValueError, match="leave --steps out"):
        distilled(Forecast("selection", 2, closed.regressions), x, routers, 1)


def test_a_fit_is_distilled_on_some_of_its_windows(monkeypatch):
    """As many tokens as memory is meant for, of which the last forward may bring a part."""
    monkeypatch.setattr("moe.layer.distil.MOST_TOKENS", 100)
    kept = []
    with LLM(TINYMOE, config("0.25", max_tokens=64)) as llm:
        monkeypatch.setattr("moe.fit.distilled", lambda f, x, routers, steps: kept.append((x, routers, steps)) or f)
        fit_lookahead(llm, WINDOWS, distances=1, steps=7)
    ((x, routers, steps),) = kept
    assert [rows.shape for rows in x] == [(100, 192)] * 6
    assert (len(routers), steps) == (6, 7)
