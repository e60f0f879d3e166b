"""What `moe info` keeps: given back whole, and for the same files alone."""

import os

import pytest

from moe.models.blueprint import read_blueprint
from moe.models.summarise import summarise
from moe.summary import MOST_KEPT, keep, kept, state_of
from tests.families import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "m")


def test_what_is_kept_is_given_back_whole(model, tmp_path):
    file, blueprint = tmp_path / "new" / "models.json", read_blueprint(model)
    summary = summarise(blueprint)
    assert kept(model, file) is None
    keep(model, state_of(model), summary, file)
    assert kept(model, file) == summary
    assert summary.num_experts == blueprint.num_experts
    assert summary.expert_bytes == blueprint.expert_bytes
    assert summary.largest_blob == max(layout.nbytes for layout in blueprint.index.layouts)


@pytest.mark.parametrize("change", ["time", "size", "name", "more"])
def test_a_folder_that_changed_is_unknown(model, tmp_path, change):
    file, path = tmp_path / "models.json", model / "generation_config.json"
    path.write_text("{}")
    keep(model, state_of(model), summarise(read_blueprint(model)), file)
    assert kept(model, file) is not None
    if change == "time":
        found = path.stat()
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    elif change == "size":
        path.write_text("{ }")
    elif change == "name":
        path.rename(model / "generation.json")
    else:
        (model / "more.json").write_text("{}")
    assert kept(model, file) is None


def test_other_programs_know_nothing_of_it(model, tmp_path, monkeypatch):
    file = tmp_path / "models.json"
    keep(model, state_of(model), summarise(read_blueprint(model)), file)
    monkeypatch.setattr("moe.summary.version", lambda name: "another")
    assert kept(model, file) is None


def test_the_latest_are_kept_and_a_damaged_file_is_written_anew(model, tmp_path):
    file, summary = tmp_path / "models.json", summarise(read_blueprint(model))
    file.write_text("{")
    assert kept(model, file) is None
    others = [tmp_path / str(n) for n in range(MOST_KEPT)]
    for folder in (model, *others):
        folder.mkdir(exist_ok=True)
        keep(folder, state_of(folder), summary, file)
    assert kept(model, file) is None
    assert kept(others[0], file) == kept(others[-1], file) == summary
