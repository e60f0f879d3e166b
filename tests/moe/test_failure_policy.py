"""When a host is given up, and how many are started instead."""

import pytest

from moe.cluster.policy import FailurePolicy
from moe.config import ClusterConfig, EngineConfig


def test_the_silence_limit_grows_with_slow_steps():
    policy = FailurePolicy(ClusterConfig(silence_s=3, silence_steps=10, stuck_s=60))
    assert policy.silence_limit([]) == policy.silence_limit([0.1]) == 3
    assert policy.silence_limit([1.0, 1.0, 9.0]) == 10
    assert policy.is_hung(3.1, 0, False, [])
    assert not policy.is_hung(3.1, 0, False, [1.0])
    assert policy.is_hung(0, 61, True, [])
    assert not policy.is_hung(0, 61, False, [])  # it has nothing to do
    assert not policy.does_not_leave(19.9, [1.0])  # it is in a step that takes so long
    assert policy.does_not_leave(20.1, [1.0])


def test_replacements_and_spares():
    policy = FailurePolicy(ClusterConfig(spares=1))
    assert policy.hosts_to_start(3, 3, 1) == 0
    assert policy.hosts_to_start(3, 2, 0) == 2
    assert FailurePolicy(ClusterConfig(replaces=False)).hosts_to_start(3, 1, 0) == 0
    with pytest.raises(ValueError, match=r"silence_s \(0.0\) must be positive"):
        ClusterConfig(silence_s=0)


def test_settings_of_a_cluster():
    asked = EngineConfig.load(None, ["cluster.labels=a=b,c/d=e", "cluster.gpus_per_host=0.5"]).cluster
    assert (asked.label_selector(), asked.gpus_per_host) == ({"a": "b", "c/d": "e"}, 0.5)
    with pytest.raises(ValueError, match=r"cluster.labels \('H100'\) must look like"):
        EngineConfig.load(None, ["cluster.labels=H100"])
    with pytest.raises(ValueError, match=r"cluster.silence_s \('soon'\) must be a number"):
        EngineConfig.load(None, ["cluster.silence_s=soon"])
    with pytest.raises(ValueError, match=r"cluster.least_in_memory \(-1.0\) must be >= 0"):
        ClusterConfig(least_in_memory=-1)
