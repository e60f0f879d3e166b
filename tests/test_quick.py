"""The quick bench names what moved and nothing else; what is committed of it follows from its figures."""

import json
from xml.etree import ElementTree

import pytest

from bench import quick
from bench.curves import Curve, picture, ticks

OLD = {quick.REFERENCE: [10.0, 10.2], "decode, ms a step": [5.0, 5.2, 5.1], "read, MB": [30.0, 31.0]}


@pytest.mark.parametrize(
    ("figures", "names"),
    [
        ({}, []),
        ({"decode, ms a step": [5.5, 5.3, 5.6]}, []),  # apart, but less than a tenth
        ({"decode, ms a step": [5.1, 7.0, 7.1]}, []),  # a round lies among the old ones
        ({"decode, ms a step": [6.1, 7.0, 7.1]}, ["decode, ms a step: 1.37 times"]),
        ({"decode, ms a step": [3.0, 3.2]}, ["decode, ms a step: 0.61 times"]),
        ({quick.REFERENCE: [14.0, 14.2], "decode, ms a step": [7.0, 7.1]}, []),  # the machine is slower
        ({quick.REFERENCE: [14.0, 14.2]}, []),
        ({quick.REFERENCE: [14.0, 14.2], "read, MB": [60.0, 61.0]}, ["read, MB: 1.98 times"]),
        ({"new": [1.0]}, ["new: no figure before"]),
    ],
)
def test_only_what_moved_beyond_noise_is_named(figures, names):
    said = quick.moved(OLD, {**OLD, **figures})
    assert len(said) == len(names)
    assert all(line.startswith(name) for line, name in zip(said, names))


def test_a_figure_that_is_gone_is_named():
    assert quick.moved({**OLD, "old": [1.0]}, OLD) == ["old: no figure now"]


def test_what_is_committed_follows_from_the_figures():
    body = json.loads((quick.RESULTS / "quick.json").read_text())
    assert (quick.RESULTS / "quick.md").read_text() == quick.table(body)
    assert (quick.RESULTS / "quick.svg").read_text() == quick.drawn(body)
    assert body["seconds"] < 180
    for name, points in body["measured"].items():
        assert [x for x, _ in points] == [x for x, _ in body["theory"][name]]


def test_a_picture_has_every_point_inside():
    points = [(1, 2.0), (8, 40.0), (64, 3000.0)]
    root = ElementTree.fromstring(picture([Curve("a < b", "x", points, points), Curve("c", "x", points, points)]))
    wide, high = map(float, root.attrib["viewBox"].split()[2:])
    circles = [one for one in root.iter() if one.tag.endswith("circle")]
    assert len(circles) == 2 * len(points) + 1  # and the key's
    assert all(0 < float(c.attrib["cx"]) < wide and 0 < float(c.attrib["cy"]) < high for c in circles)


def test_ticks():
    assert ticks(0.9, 25) == [1, 2, 5, 10, 20]
