"""Every number of a run, read from the plain records of the folders that count it.

A counted field is declared where it is counted, once: its name, and in the field's metadata `help`, `unit` ("bytes",
"seconds", "tokens" or nothing), `kind` ("counter" unless it is a "gauge" or "histogram") and, for a field that is a
list, `index`, the label that tells its places apart. Reports, the gather over ranks and Prometheus' text iterate what
is found here; nothing below moe/ imports this file.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe.histogram import Histogram


class Metric(NamedTuple):
    """One declared number."""

    name: str
    help: str
    unit: str
    kind: str
    label: str | None


class Sample(NamedTuple):
    """Its value under these labels."""

    metric: Metric
    labels: tuple[tuple[str, str], ...]
    value: float | Histogram


Source = tuple[Any, Mapping[str, str]]  # a record, and the labels of everything in it


def declared(record: Any) -> list[Metric]:
    """The metrics of a record or its class, in the order of its fields."""
    return [
        Metric(
            one.name,
            one.metadata["help"],
            one.metadata.get("unit", ""),
            one.metadata.get("kind", "counter"),
            one.metadata.get("index"),
        )
        for one in dataclasses.fields(record)
        if "help" in one.metadata
    ]


def read(sources: Iterable[Source]) -> Iterator[Sample]:
    """Every number of these records."""
    for record, labels in sources:
        for metric in declared(record):
            value = getattr(record, metric.name)
            if metric.label is None:
                yield Sample(metric, tuple(labels.items()), value)
            else:
                for place, part in enumerate(value):
                    yield Sample(metric, (*labels.items(), (metric.label, str(place))), part)


def totals(sources: Iterable[Source]) -> dict[Metric, float]:
    """Sums over all labels; of histograms the greatest bound that half of one's values do not exceed."""
    sums: dict[Metric, float] = {}
    for sample in read(sources):
        before = sums.get(sample.metric, 0.0)
        if isinstance(sample.value, Histogram):
            sums[sample.metric] = max(before, sample.value.quantile(0.5))
        else:
            sums[sample.metric] = before + float(sample.value)
    return sums


def shown(value: float, unit: str) -> str:
    """A number with its unit, as people read it."""
    if unit == "bytes":
        power = next((p for p in range(4) if abs(value) < 1024 ** (p + 1)), 4)
        return f"{value:.0f} B" if power == 0 else f"{value / 1024**power:.1f} {'KMGT'[power - 1]}iB"
    if unit == "seconds":
        return f"{value:.2f} s" if value == 0 or abs(value) >= 0.1 else f"{1000 * value:.3g} ms"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def title(metric: Metric) -> str:
    """The name as a row of a report has it."""
    name = metric.name.replace("_", " ").removesuffix(" seconds").removesuffix(" bytes")
    return f"{name}, median" if metric.kind == "histogram" else name


def changed(rows: Sequence[Mapping[Metric, float]]) -> list[Metric]:
    """Those that are not zero everywhere, in the order of their declaration."""
    return [metric for metric in rows[0] if any(row.get(metric) for row in rows)]


def exposition(sources: Iterable[Source]) -> str:
    """The text format that Prometheus scrapes."""
    lines: list[str] = []
    by_metric: dict[Metric, list[Sample]] = {}
    for sample in read(sources):
        by_metric.setdefault(sample.metric, []).append(sample)
    for metric, samples in by_metric.items():
        unit = f"_{metric.unit}" if metric.unit and not metric.name.endswith(metric.unit) else ""
        name = f"moe_{metric.name}{unit}" + ("_total" if metric.kind == "counter" else "")
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        for sample in samples:
            lines += _lines_of(name, sample)
    return "\n".join(lines) + "\n"


def _lines_of(name: str, sample: Sample) -> Iterator[str]:
    if not isinstance(sample.value, Histogram):
        yield f"{name}{_labels(sample.labels)} {float(sample.value):.17g}"
        return
    seen = 0
    for bound, count in zip((*sample.value.bounds, None), sample.value.counts):
        seen += count
        edge = "+Inf" if bound is None else f"{bound:g}"
        yield f"{name}_bucket{_labels((*sample.labels, ('le', edge)))} {seen}"
    yield f"{name}_sum{_labels(sample.labels)} {sample.value.total:.17g}"
    yield f"{name}_count{_labels(sample.labels)} {seen}"


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{key}="{escaped(value)}"' for key, value in labels)
    return f"{{{inside}}}" if inside else ""
