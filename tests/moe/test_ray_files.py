"""What is written for clusters: the commands of the page, the file for `ray up`, the stage for Ray Data."""

import re
import shlex

import numpy as np
import pytest
import yaml

from moe.launch import ray_cluster
from moe.launch.cli import _parser
from moe.launch.options import engine_config
from moe.launch.ray_data import Answers
from tests.moe.moe_cases import ROOT, TINYMOE


def test_answers_of_a_column():
    stage = Answers(TINYMOE, ("dtype=float32", "offload.budget=0.5"), column="text", max_tokens=4, temperature=0)
    rows = np.empty(3, object)
    rows[:] = ["Once upon a time", [5, 6, 7], [1] * 5000]
    found = stage({"text": rows, "number": np.arange(3)})
    assert found["number"].tolist() == [0, 1, 2]
    assert [len(tokens) for tokens in found["answer_tokens"]] == [4, 4, 0]
    assert found["finish_reason"].tolist() == ["length", "length", "error"]
    assert found["error"][0] is None
    assert "5000" in found["error"][2]
    with pytest.raises(ValueError, match="no column 'text' in prompt"):
        stage({"prompt": rows})


def test_the_stage_of_the_example_leaves_a_core_of_two_to_read_and_write():
    text = (ROOT / "examples" / "ray_data.py").read_text()
    actors, cores = (float(re.search(rf"{name}=([\d.]+),", text)[1]) for name in ("concurrency", "num_cpus"))
    assert actors * cores + 1 <= 2  # else Ray Data waits without end


def test_a_job_does_not_answer_into_the_copy_that_ray_deletes(tmp_path, monkeypatch, capsys):
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    (copy := tmp_path / f"{packaging.RAY_PKG_PREFIX}01").mkdir()
    (copy / "in.jsonl").write_text("")
    monkeypatch.chdir(copy)
    served = []
    monkeypatch.setattr(ray_cluster, "is_served", lambda *files: served.append(files) or True)
    command = ["model", "in.jsonl", "out.jsonl", "--hosts", "1"]
    assert ray_cluster.main(command) == 2
    assert "which Ray deletes; give an absolute path" in capsys.readouterr().err
    command[2] = str(tmp_path / "out.jsonl")
    assert ray_cluster.main(command) == 0
    assert len(served) == 1


def test_commands_and_files_for_clusters_can_be_read():
    """Every command of the page, and what `ray up` would read."""
    text = (ROOT / "docs" / "ray.md").read_text() + (ROOT / "examples/launch/laptop_hosts.sh").read_text()
    commands = re.findall(r"-m moe\.launch\.ray_cluster (.*)", text.replace("\\\n", " "))
    assert len(commands) == 3
    for command in commands:
        assert ray_cluster.make_parser().parse_args(shlex.split(command)).hosts >= 3
    cluster = yaml.safe_load((ROOT / "examples/launch/ray_cluster.yaml").read_text())
    head, workers = (cluster["available_node_types"][name] for name in ("head", "expert_host"))
    asked = re.search(r"moe (serve .*?)'", (ROOT / "examples/launch/ray_cluster.yaml").read_text(), re.S)[1]
    args = _parser().parse_args(shlex.split(asked.replace("#", "").replace("\\\n", " ")))
    wanted = engine_config(args).cluster
    assert wanted.label_selector().items() <= workers["labels"].items()
    assert (workers["resources"]["GPU"], head["resources"]["GPU"]) == (1, 0)
    assert workers["min_workers"] < args.hosts + wanted.spares <= workers["max_workers"], "one machine is yet to start"
    assert wanted.room_s >= 1200
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(cluster))
