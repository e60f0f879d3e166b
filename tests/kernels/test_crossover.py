"""The crossover table: it stores what was measured, chooses by it, and refuses to guess."""

import time

import pytest
import torch

from moe.kernels.crossover import CrossoverTable, LayerKey, Measured, machine_name, medians_us

LAYER = LayerKey(num_experts=8, top_k=2, hidden_size=32, intermediate_size=32, world_size=1, dtype="float32")
OTHER = LayerKey(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, world_size=1, dtype="float32")
CPU = torch.device("cpu")


def test_choice_follows_the_measurements(tmp_path):
    table = CrossoverTable(tmp_path / "table.json", "machine")
    table.rows = [
        Measured(layer=LAYER, tokens=16, single_us=10.0, grouped_us=20.0),
        Measured(layer=LAYER, tokens=1, single_us=9.0, grouped_us=8.0),
        Measured(layer=LAYER, tokens=64, single_us=30.0, grouped_us=25.0),
        Measured(layer=OTHER, tokens=64, single_us=1.0, grouped_us=25.0),
    ]
    choices = {n: table.choose(LAYER, n) for n in (0, 1, 2, 16, 17, 64, 65)}
    assert choices == {
        0: "grouped",
        1: "grouped",
        2: "single",
        16: "single",
        17: "grouped",
        64: "grouped",
        65: "grouped",
    }
    assert table.choose(OTHER, 64) == "single"
    assert table.choose(OTHER, 65) == "grouped"


def test_measured_is_stored_per_machine(tmp_path):
    path, calls = tmp_path / "new" / "table.json", []
    table = CrossoverTable(path, machine_name(CPU))
    with pytest.raises(ValueError, match=r"call measure\(\) once on this machine"):
        table.choose(LAYER, 1)
    table.measure(
        LAYER, lambda n: calls.append(("single", n)), lambda n: time.sleep(0.01), CPU, tokens=(1, 4), repeats=3
    )
    assert calls == [("single", n) for n in (1, 4) for _ in range(4)]  # a warm-up and three
    again = CrossoverTable(path, machine_name(CPU))
    assert again.rows == table.rows
    assert again.is_measured(LAYER)
    assert not again.is_measured(OTHER)
    assert again.choose(LAYER, 4) == "single"  # nothing against 10 ms
    another = CrossoverTable(path, "another machine")
    assert not another.is_measured(LAYER)
    another.measure(OTHER, lambda n: None, lambda n: None, CPU, tokens=(1,), repeats=1)
    assert CrossoverTable(path, machine_name(CPU)).rows == table.rows  # kept


def test_candidates_take_turns():
    order = []
    medians = medians_us([lambda: order.append("a"), lambda: order.append("b")], CPU, 3)
    assert order == ["a", "b"] * 4
    assert len(medians) == 2
