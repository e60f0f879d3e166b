"""Budgets in all their spellings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.offload.budget import Budget, format_bytes, parse_budget, resolve_slots
from moe.offload.slot_runs import slab_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", ("bytes", 6 << 30)),
        ("1.5 KiB", ("bytes", 1536)),
        ("800MB", ("bytes", 800_000_000)),
        ("100b", ("bytes", 100)),
        ("64", ("experts", 64)),
        (64, ("experts", 64)),
        ("1 expert", ("experts", 1)),
        ("64 experts", ("experts", 64)),
        ("1.0", ("fraction", 1.0)),
        ("100%", ("fraction", 1.0)),
        ("0.25", ("fraction", 0.25)),
        (0.25, ("fraction", 0.25)),
        (1.0, ("fraction", 1.0)),
        ("12.5%", ("fraction", 0.125)),
        (".5", ("fraction", 0.5)),
    ],
)
def test_parse(text, expected):
    assert parse_budget(text) == Budget(*expected)


@pytest.mark.parametrize(
    "text", ["", "much", "-1", "1.5", "6 GiBs", "nan", "inf", "-0.5", "64.0", "120%", "GiB", "0x10", True]
)
def test_refused(text):
    with pytest.raises(ValueError, match=r"offload\.budget .* is not understood; give bytes \(6GiB\)"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["1", " 1 ", "01", 1])
def test_a_bare_one_is_neither(text):
    with pytest.raises(
        ValueError, match=r"one expert or all of them: .* give 1\.0 or 100% for all, '1 expert' for one"
    ):
        parse_budget(text)


def test_resolve():
    sizes = {"sizes": [12 * MIB] * 2, "counts": [60, 40]}
    assert resolve_slots("120MiB", **sizes) == 10
    assert resolve_slots("131MiB", **sizes) == 10
    assert resolve_slots("64", **sizes) == 64
    assert resolve_slots("640", **sizes) == 100
    assert resolve_slots("0.29", **sizes) == 29  # 0.29 * 100 is 28.999…
    assert resolve_slots("0.001", **sizes) == 1
    assert resolve_slots("10GiB", **sizes) == resolve_slots("9" * 400 + "TiB", **sizes) == 100
    assert resolve_slots("9" * 400, **sizes) == 100
    assert resolve_slots("1 expert", **sizes) == 1
    assert resolve_slots(None, available_bytes=37 * MIB, **sizes) == 3
    assert resolve_slots(None, available_bytes=1 << 50, **sizes) == 100


def test_too_little():
    sizes = {"sizes": [int(12.6 * MIB)], "counts": [100]}
    for budget in ("12MiB", "0", "0.0", 0):
        with pytest.raises(ValueError, match=r"must be >= 1 expert \(12\.6 MiB\); raise offload\.budget"):
            resolve_slots(budget, **sizes)
    with pytest.raises(ValueError, match=r"left for experts .*\(5\.0 MiB\) must be >= 1 expert \(12\.6 MiB\)"):
        resolve_slots(None, available_bytes=5 * MIB, **sizes)
    with pytest.raises(ValueError, match=r"50 = 630\.0 MiB\) is more than the memory left .*\(100\.0 MiB\)"):
        resolve_slots("50", available_bytes=100 * MIB, **sizes)
    with pytest.raises(ValueError, match="not known"):
        resolve_slots(None, **sizes)


@given(st.integers(1, 1 << 44), st.integers(1, 10_000), st.integers(0, 1 << 50))
def test_bytes_are_never_exceeded(blob_bytes, total_experts, nbytes):
    if nbytes < blob_bytes:
        with pytest.raises(ValueError, match=r"raise offload\.budget"):
            resolve_slots(f"{nbytes}B", sizes=[blob_bytes], counts=[total_experts])
        return
    slots = resolve_slots(f"{nbytes}B", sizes=[blob_bytes], counts=[total_experts])
    assert 1 <= slots <= total_experts
    assert slots * blob_bytes <= nbytes
    assert slots == total_experts or (slots + 1) * blob_bytes > nbytes


@given(
    st.lists(st.tuples(st.integers(1, 1 << 30), st.integers(1, 300)), min_size=1, max_size=6), st.integers(0, 1 << 40)
)
def test_bytes_of_several_sizes(layers, nbytes):
    sizes, counts = [list(of) for of in zip(*layers)]
    if nbytes < max(sizes):
        with pytest.raises(ValueError, match=r"raise offload\.budget"):
            resolve_slots(f"{nbytes}B", sizes=sizes, counts=counts)
        return
    slots = resolve_slots(f"{nbytes}B", sizes=sizes, counts=counts)
    assert slab_bytes(sizes, counts, slots) <= nbytes
    assert slots == sum(counts) or slab_bytes(sizes, counts, slots + 1) > nbytes
    assert slots >= min(sum(counts), nbytes // max(sizes))  # no fewer than in slots of the largest


def test_format():
    assert [format_bytes(n) for n in (0, 1023, 1024, 12.6 * MIB, 6 << 30, 1 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "12.6 MiB", "6.0 GiB", "1024.0 TiB",
    ]  # fmt: skip
