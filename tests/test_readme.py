"""What the README shows is run, and what any page links to is there."""

import re
import shlex
from pathlib import Path

from moe.launch.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "named Lily. She loved to play" in capsys.readouterr().out


def test_every_command_line_is_one_that_the_program_takes():
    lines = [line.partition("#")[0].strip() for line in README.splitlines() if line.startswith("moe ")]
    assert len(lines) >= 9
    for line in lines:
        args = _parser().parse_args(shlex.split(line)[1:])
        assert args.run


def test_every_link_leads_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bench" / "results").glob("*.md")]
    links = [
        (page.name, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert len(pages) > 40
    assert links == []
