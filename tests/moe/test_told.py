"""What this program says on purpose is told from what an operation or a library ends in."""

import numpy as np
import pytest

from moe.config import EngineConfig
from moe.launch.cli import run_guarded
from moe.offload.budget import parse_budget
from moe.told import is_told


def raised(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind
        call()
    return caught.value


@pytest.mark.parametrize(
    "call", [lambda: parse_budget("much"), lambda: EngineConfig(threads=0), lambda: EngineConfig.load(None, ["x"])]
)
def test_sentences_of_ours(call):
    assert is_told(raised(call))


@pytest.mark.parametrize(
    "call",
    [
        lambda: EngineConfig.load("\0"),  # in a function of ours, by the system
        lambda: np.ones(3) + np.ones(4),
        lambda: int("x"),
        lambda: np.load(__file__),
        lambda: parse_budget(),
    ],
)
def test_what_operations_and_libraries_say(call):
    assert not is_told(raised(call))


def test_a_fault_of_ours_is_not_shown_as_the_users(capsys):
    args = type("Args", (), {"debug": False})()
    assert run_guarded("moe x", args, lambda: parse_budget("much")) == 2
    assert "not understood" in capsys.readouterr().err
    assert run_guarded("moe x", args, lambda: int((np.ones(3) + np.ones(4))[0])) == 1
    assert "moe x: a fault of the program, ValueError: operands could not" in capsys.readouterr().err
