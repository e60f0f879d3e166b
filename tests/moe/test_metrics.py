"""Every number is declared once, and reports and Prometheus' text read it from there."""

import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe.comm.wire import Traffic
from moe.engine.one_memory import SplitStats
from moe.engine.stats import State, StepStats
from moe.histogram import Histogram
from moe.llm import LLM
from moe.metrics import changed, declared, exposition, read, shown, title, totals
from moe.offload.layer_stats import LayerStats
from moe.offload.more_bits import Served, UpgradeStats
from tests.moe.moe_cases import TINYMOE, config, greedy


@pytest.mark.parametrize("record", [StepStats, State, SplitStats, LayerStats, Traffic, UpgradeStats, Served])
def test_every_counted_field_is_declared_with_its_help(record):
    names = {m.name for m in declared(record)}
    fields = {f.name for f in dataclasses.fields(record)}
    assert names == fields - {"rank", "world_size", "nodes", "carries"}
    for metric in declared(record):
        assert metric.help[0].isupper()
        assert not metric.help.endswith(".")
        assert ("seconds" in metric.name or "bytes" in metric.name) <= (metric.unit in ("seconds", "bytes"))


def test_a_new_counter_is_in_reports_and_exposition_without_another_line():
    @dataclasses.dataclass
    class New:
        apples: int = dataclasses.field(default=3, metadata={"help": "Apples", "unit": ""})
        by_rank: list = dataclasses.field(default_factory=lambda: [1, 2], metadata={"help": "By rank", "index": "rank"})

    sources = [(New(), {"layer": "0"}), (New(), {"layer": "1"})]
    sums = totals(sources)
    assert {m.name: v for m, v in sums.items()} == {"apples": 6, "by_rank": 6}
    assert [m.name for m in changed([sums, sums])] == ["apples", "by_rank"]
    assert len(list(read(sources))) == 2 + 4
    assert 'moe_by_rank_total{layer="1",rank="1"} 2' in exposition(sources)


def test_exposition_is_what_prometheus_reads():
    with LLM(TINYMOE, config("0.25")) as llm:
        llm.generate(["Once upon a time"] * 3, greedy(5))
        families = {f.name: f for f in text_string_to_metric_families(exposition(llm.engine.metric_sources()))}
        hits = sum(s.value for s in families["moe_hits"].samples)
        assert hits == sum(s.hits for s in llm.engine.layer_stats()) > 0
        assert len(families["moe_bytes_read_bytes"].samples if "moe_bytes_read_bytes" in families else [1] * 6) == 6
        first = {s.name: s.value for s in families["moe_time_to_first_token_seconds"].samples if "le" not in s.labels}
        assert first["moe_time_to_first_token_seconds_count"] == 3
        assert families["moe_slots"].samples[0].value == 24
        assert families["moe_free_blocks"].samples[0].value == families["moe_blocks"].samples[0].value


def test_labels_are_escaped():
    odd = 'a"b\\c\nd'
    (family,) = text_string_to_metric_families(
        exposition([(LayerStats(), {"layer": odd})]).split("# HELP moe_misses")[0]
    )
    assert family.samples[0].labels["layer"] == odd


def test_histogram():
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0
    for value in (0.001, 0.02, 0.02, 5.0, 1e9):
        histogram.add(value)
    assert histogram.number == 5
    assert 0.02 <= histogram.quantile(0.5) <= 0.032
    assert histogram.quantile(0.01) == pytest.approx(0.001)
    assert histogram.quantile(1.0) == histogram.bounds[-1]


def test_a_histogram_in_a_report_is_its_median():
    """Not how many values it has, which with the unit of one would be another figure."""
    ranks = [StepStats() for _ in range(2)]
    for seconds in (0.001, 0.02, 0.02):
        ranks[1].time_to_first_token.add(seconds)
    (metric,) = [m for m in totals([(ranks[0], {})]) if m.kind == "histogram"]
    assert totals([(ranks[0], {})])[metric] == 0
    value = totals([(one, {}) for one in ranks])[metric]
    assert value == ranks[1].time_to_first_token.quantile(0.5)
    assert (title(metric), shown(value, metric.unit)) == ("time to first token, median", "32 ms")


def test_shown():
    assert [shown(v, "bytes") for v in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [shown(v, "seconds") for v in (1.234, 0.1, 0.0123, 0)] == ["1.23 s", "0.10 s", "12.3 ms", "0.00 s"]
    assert (shown(3.0, ""), shown(0.12345, "")) == ("3", "0.123")
