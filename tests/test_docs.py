"""Every command and every block of Python in README and docs: taken by the program, and run.

By default each is read by the parser that would read it, and imports are tried. Heavy, each is run, in the order of its
page, in a folder with the files that it names. What cannot be run here is listed with the reason.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import httpx
import pytest
from torch.distributed.run import get_args_parser

from moe.config import EngineConfig
from moe.launch import torchrun
from moe.launch.cli import _parser, main
from moe.launch.options import written_anew
from tests.docs import PAGES, ROOT, Shown, mentions_in, settings_in, shown_in
from tests.patience import PATIENCE_S
from tests.ports import free_port

SHOWN = [shown for page in PAGES for shown in shown_in(page)]
MENTIONS = [shown for page in PAGES for shown in mentions_in(page)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# A word of the docs, and what stands for it in a test.
STANDS_FOR = {"MODEL": "model", "PACKED": "packed", "FOLDER": "state", "…": "Once upon a time"}
NOT_RUN = {
    "make ": "installs, or runs these tests: tests/test_packaging.py and CI do",
    "pip ": "installs: tests/test_packaging.py and CI do",
    "ray ": "submits to a cluster: tests/moe/test_cluster.py",
    "moe ray ": "needs a cluster: tests/moe/test_cluster.py",
    "python -m moe.launch.ray_cluster": "starts a cluster: tests/moe/test_cluster.py",
    "python -m moe.kernels.aot": "minutes: tests/kernels/test_aot.py",
    "python -m tests.launch.kill_ranks": "hours; a sample in tests/launch/test_kill_ranks.py",
    "python -m tests.launch.fuzz_settings": "minutes; a sample in tests/launch/test_fuzz_settings.py",
    "store = connect": "a part of a program of several hosts: tests/comm/test_membership.py",
    "dataset.map_batches(Answers": "a line of examples/ray_data.py: tests/moe/test_cluster.py",
}


def why_not_run(shown: Shown) -> str | None:
    text = " ".join(shown.words) or shown.python
    return next(
        (reason for start, reason in NOT_RUN.items() if text.split()[0] == start or text.startswith(start)), None
    )


def flags_of(words) -> list[str]:
    return [word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word)]


def check_module(name: str, words, capsys) -> None:
    """The module is there and has these flags: by its help, or where loading it costs too much by its text."""
    if name == "moe.launch.torchrun":
        assert set(flags_of(words)) <= set(torchrun.parser()._option_string_actions)
        return
    if name == "moe.launch.ray_cluster":
        with pytest.raises(SystemExit):
            import_module(name).main(["--help"])
        text = capsys.readouterr().out
    else:
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        text = (path if path.exists() else path.with_suffix("") / "__main__.py").read_text()
    for flag in flags_of(words):
        assert flag in text, (name, flag)


def check_words(words, capsys, *, is_whole: bool = True) -> None:
    first, *rest = words
    if first == "moe":
        check_moe(rest, is_whole)
    elif first in ("ray", "compute-sanitizer"):
        if "python" in rest:
            check_words(rest[rest.index("python") :], capsys)
    elif first == "torchrun":
        if "-m" in rest:
            get_args_parser().parse_args(rest)
            check_module(rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :], capsys)
    elif first == "python":
        if rest[0] == "-c":
            check_python(rest[1])
        else:
            check_module(rest[1], rest[2:], capsys)
    elif first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
    else:
        assert first == "pip"
        wanted = re.fullmatch(rf"(?:\.|{PROJECT['name']})(?:\[(\w+)\])?", rest[-1])
        assert wanted, rest
        assert wanted[1] is None or wanted[1] in PROJECT["optional-dependencies"]


def check_moe(arguments, is_whole: bool) -> None:
    if is_whole:
        assert _parser().parse_args(arguments).run
        return
    commands = next(a for a in _parser()._actions if a.dest == "command").choices
    name, *others = arguments
    known = commands[name]._option_string_actions if name in commands else _parser()._option_string_actions
    assert name in commands or name in known, name
    assert set(flags_of(word.strip("[]") for word in others)) <= set(known), arguments


def check_python(code: str) -> None:
    """It is Python, and what it imports is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(node.module), alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert all(import_module(alias.name) for alias in node.names)


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_what_is_shown_is_taken(shown, capsys):
    if shown.python:
        check_python(shown.python)
    else:
        check_words(shown.words, capsys)


@pytest.mark.parametrize("shown", MENTIONS, ids=str)
def test_what_is_mentioned_is_there(shown, capsys):
    check_words(shown.words, capsys, is_whole=False)


@pytest.mark.parametrize("setting", sorted({s for page in PAGES for s in settings_in(page)}))
def test_settings_that_are_named_are_settings(setting):
    needs = ["routing.lookahead=x"] if setting.startswith("routing.pregate") else []  # what it stands on
    EngineConfig.load(None, [setting, *needs])


def test_the_first_screen_has_install_python_and_shell():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    words = [shown.words for shown in SHOWN if shown.page == "README.md" and shown.words[:1]]
    for start in (["pip", "install"], ["python", "-c"], ["moe", "generate"]):
        assert any(list(one[:2]) == start for one in words)
        assert f"    {' '.join(start)}" in first


def test_reasons_are_of_something_shown():
    for start in NOT_RUN:
        assert any((" ".join(s.words) or s.python).startswith(start) for s in SHOWN), start


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that the commands name. The model is the demo's, with a chat template."""
    made = tmp_path_factory.mktemp("docs")
    (made / "examples").symlink_to(ROOT / "examples")
    model = shutil.copytree(ROOT / "examples" / "tinymoe", made / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with (made / "in.jsonl").open("w") as file:
        for i in range(6):
            body = {"prompt": "Once upon a time", "max_tokens": 4 + i}
            line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    prompts = ["Once upon a time, there was a little", "One day, a cat and a dog", "Lily and her mom went to"] * 4
    (made / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    trace = ["trace", str(model), str(made / "prompts.jsonl"), str(made / "trace.npz")]
    assert main(trace) == 0
    return made


@pytest.mark.heavy
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_shown_runs(page, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    port, services, written = free_port(), [], set()
    try:
        for shown in shown_in(page):
            if why_not_run(shown) is not None:
                continue
            (folder / "out.jsonl").unlink(missing_ok=True)
            if shown.python:
                exec(compile(shown.python.replace(":8000", f":{port}"), page.name, "exec"), {})
                continue
            words = [STANDS_FOR.get(word, word).replace(":8000", f":{port}") for word in shown.words]
            if words[:2] == ["moe", "serve"]:
                services.append(start_service([*words[1:], "--port", str(port)], environment, port))
            elif words[0] == "moe":
                arguments = [*words[1:], *(["--once"] if words[1] == "top" else [])]
                for path in written_anew(_parser().parse_args(arguments)):
                    if path not in written:  # by this page; no command writes over what another page's have
                        path.unlink(missing_ok=True)
                    written.add(path)
                assert main(arguments) == 0, (shown, capfd.readouterr().err)
            else:
                program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
                subprocess.run([*program[words[0]], *words[1:]], check=True, env=environment, timeout=PATIENCE_S)
    finally:
        for service in services:
            service.terminate()
            service.wait(PATIENCE_S)


def start_service(arguments: list[str], environment: dict[str, str], port: int) -> subprocess.Popen[bytes]:
    service = subprocess.Popen([sys.executable, "-m", "moe", *arguments], env=environment)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        assert service.poll() is None, arguments
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200:
                return service
        except httpx.TransportError:
            time.sleep(0.2)
    service.kill()
    service.wait(PATIENCE_S)
    raise AssertionError(f"{arguments} does not answer at port {port}")
