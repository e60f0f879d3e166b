"""A sample of the absurd settings; the whole table is in bench/results/settings.md."""

import pytest

from tests.launch import fuzz_settings


@pytest.mark.parametrize("seed", range(100, 116))
def test_absurd_settings_run_or_are_refused_in_a_sentence(tmp_path, seed):
    seen = fuzz_settings.run(fuzz_settings.case_of(seed), tmp_path)
    assert seen.outcome in ("runs", "refused"), seen
    assert len(seen.said) < 1000


@pytest.mark.parametrize("device", ["hip", "meta", "mps", "xla", "", "cpu:-3"])
def test_devices_that_are_not_served(tmp_path, device):
    for way in ("command line", "Python"):
        seen = fuzz_settings.run(fuzz_settings.Case(0, way, {"device": device}), tmp_path)
        assert seen.outcome == "refused", seen
        assert "device" in seen.said
