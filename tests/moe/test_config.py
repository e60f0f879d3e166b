"""Defaults, then the TOML file, then --set; unknown keys and bad values are refused with what would be right."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from tests.test_layout import FOLDERS, sources


def test_layers_of_settings(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'dtype = "bfloat16"\nthreads = 2\n[offload]\nbudget = 0.25\nstore = "mmap"\n'
        "[batch]\nmax_tokens = 64\nprefix_sharing = false\n"
    )
    config = EngineConfig.load(
        file, ["offload.store=ram", "batch.max_tokens=128", "threads=none", "batch.packed=false"]
    )
    assert config == EngineConfig(
        dtype="bfloat16",
        offload=OffloadConfig(budget="0.25", store="ram"),
        batch=BatchConfig(max_tokens=128, prefix_sharing=False, packed=False),
    )
    assert EngineConfig.load() == EngineConfig()
    assert EngineConfig.load(None, ["offload.direct=true"]).offload.direct is True
    assert EngineConfig.load(None, ["offload.direct=none"]).offload.direct is None
    assert EngineConfig.load(None, ["batch.max_tokens=64", "batch.max_tokens=32"]).batch.max_tokens == 32
    assert config.with_budget("3").offload == dataclasses.replace(config.offload, budget="3")


def test_what_the_program_says_of_settings_names_settings():
    """In every sentence and docstring of the code: a remedy that names no setting is none."""
    known = {line.partition(" = ")[0] for line in EngineConfig().describe().splitlines()}
    groups = {name.partition(".")[0] for name in known if "." in name}
    dotted = re.compile(rf"(?<![\w./])(?:{'|'.join(groups)}|kernel)\.[a-z]\w*")
    said = set()
    for path in [path for folder in FOLDERS for path in sources(folder)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = {name for name in dotted.findall(node.value) if not name.endswith((".py", ".md", ".cubin"))}
                assert names <= known, (path, node.lineno, names - known)
                said |= names
    assert len(said) > 20


def test_describe_names_every_setting_once():
    lines = EngineConfig().describe().splitlines()
    assert "offload.budget = None" in lines
    assert "batch.max_tokens = 512" in lines
    assert len(lines) == len(set(lines)) > 15
    settings = [line.replace(" = ", "=").replace("'", "") for line in lines]
    settings = [s.replace("None", "none").replace("True", "true").replace("False", "false") for s in settings]
    assert EngineConfig.load(None, settings) == EngineConfig()  # what is printed can be given back


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bugdet=1", r"unknown setting bugdet; known: .*batch.*dtype.*offload"),
        ("offload.bugdet=1", r"unknown setting offload.bugdet; known: offload.bits, offload.budget"),
        ("batch.max.tokens=1", r"unknown setting batch.max; known: batch.block_size"),
        ("offload", "must look like offload.budget=0.25"),
        ("offload=3", "offload is a group of settings"),
        ("threads.x=3", "threads"),
        ("threads=many", r"threads \('many'\) must be a whole number"),
        ("threads=1.5", "whole number"),
        ("threads=0", r"threads \(0\) must lie in \[1, 1024\]"),
        ("dtype=float8", r"dtype \('float8'\) must be one of auto, float32, bfloat16, float16"),
        ("kernel=cuda", r"kernel \('cuda'\) must be one of"),
        ("offload.policy=fifo", "must be one of lru, lfu"),
        ("offload.store=s3", "must be one of file, mmap, ram"),
        ("offload.direct=maybe", "must be true or false"),
        ("offload.readers=-1", r"offload.readers \(-1\) must lie in \[0, 1024\]"),
        ("batch.packed=", "must be true or false"),
        ("batch.max_tokens=0", r"batch.max_tokens \(0\) must be >= 1"),
        ("batch.max_tokens=4", r"batch.max_tokens \(4\) must be >= batch.max_sequences \(16\)"),
        ("batch.kv_tokens=3", r"batch.kv_tokens \(3\) must be >= batch.block_size \(16\)"),
        ("max_context=0", "max_context"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig.load(None, [setting])


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("dtype = ", "is not a valid TOML file"),
        ("\xff\xfe", "is UTF-16 or UTF-32"),
        ("\xe9", "is not UTF-8 text"),
        ("dtype = 4", "must be one of"),
        ("dtype = []", "must be one of"),
        ("offload = 3", "offload is a group of settings"),
        ("[threads]\nx = 1", "must be a whole number"),
        ("threads = true", "must be a whole number"),
        ("[batch]\npacked = []", "must be true or false"),
        ("[batch]\npacked = {a = 1}", "must be true or false"),
        ("[offload]\nbudget = [1]", "budget"),
        ("[offload.budget]\nx = 1", "budget"),
    ],
)
def test_bad_files(tmp_path, toml, message):
    file = tmp_path / "run.toml"
    file.write_bytes(toml.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        EngineConfig.load(file)


@pytest.mark.parametrize(("written", "kept"), [("1.0", "1.0"), ("64", "64"), ("0.25", "0.25"), ("1e-1", "0.1")])
def test_a_budget_means_the_same_wherever_it_is_written(tmp_path, written, kept):
    file = tmp_path / "run.toml"
    file.write_text(f"[offload]\nbudget = {written}\n")
    number = float(written) if "." in written or "e" in written else int(written)
    assert EngineConfig.load(file).offload.budget == OffloadConfig(budget=number).budget == kept
    assert EngineConfig().with_budget(number).offload.budget == kept
    if kept == written:
        assert EngineConfig.load(None, [f"offload.budget={written}"]).offload.budget == kept


def test_a_budget_of_one_is_refused_wherever_it_is_written(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[offload]\nbudget = 1\n")
    for write in (
        lambda: EngineConfig.load(file),
        lambda: EngineConfig.load(None, ["offload.budget=1"]),
        lambda: OffloadConfig(budget=1),
        lambda: EngineConfig().with_budget(1),
        lambda: LLM("nowhere", experts_in_memory=1),
    ):
        with pytest.raises(ValueError, match="could be one expert or all of them"):
            write()


def test_values_are_checked_when_python_gives_them():
    assert BatchConfig(max_tokens="64") == BatchConfig(max_tokens=64)
    for make, message in (
        (lambda: BatchConfig(max_tokens=1.5), r"batch.max_tokens \(1.5\) must be a whole number"),
        (lambda: BatchConfig(packed="maybe"), "batch.packed"),
        (lambda: EngineConfig(dtype="int4"), "dtype"),
        (lambda: EngineConfig(batch={"max_tokens": 3}), "batch is a group of settings"),
        (lambda: EngineConfig(device="cp\0u"), "device .* must be text"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        EngineConfig.load(tmp_path / "none.toml")


def test_caches_are_where_the_user_has_them(monkeypatch, tmp_path):
    """As the XDG specification says: an unset, empty or relative XDG_CACHE_HOME is ~/.cache. A setting goes first."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for value, folder in ((None, "home"), ("", "home"), ("relative", "home"), (str(tmp_path / "x"), "x")):
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        cache = tmp_path / ".cache" if folder == "home" else tmp_path / "x"
        config = EngineConfig()
        assert (config.probe_path, config.crossover_path) == (cache / "moe/probe.json", cache / "moe/crossover.json")
        set_ = EngineConfig(probe_file="~/p", crossover_table="c.json")
        assert (set_.probe_path, set_.crossover_path) == (tmp_path / "p", Path("c.json"))
