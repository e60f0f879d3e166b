"""The commands and Python that README and docs show, found in their Markdown."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMANDS = ("moe", "python", "pip", "make", "torchrun", "ray", "compute-sanitizer")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Shown(NamedTuple):
    """Of a page: a command's words, or a block of Python."""

    page: str
    words: tuple[str, ...]
    python: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words) or self.python.splitlines()[0]}"[:90]


def is_command(line: str) -> bool:
    return line.split(" ", 1)[0] in _COMMANDS


def shown_in(page: Path) -> list[Shown]:
    """In their order: blocks of Python, and commands that stand on a line of their own."""
    text = page.read_text()
    fences = [fence for fence in _FENCE.finditer(text) if fence[1] == "python"]
    found = [(fence.start(), Shown(page.name, (), fence[2])) for fence in fences]
    without_python = re.sub(r"^```python\n.*?^```", lambda m: " " * len(m[0]), text, flags=re.MULTILINE | re.DOTALL)
    at = 0
    for line in without_python.splitlines(keepends=True):
        stripped = line.strip()
        if is_command(stripped) and (line.startswith("    ") or _in_fence(without_python, at)):
            found.append((at, Shown(page.name, tuple(shlex.split(stripped, comments=True)))))
        at += len(line)
    return [shown for _, shown in sorted(found, key=lambda one: one[0])]


def mentions_in(page: Path) -> list[Shown]:
    """Commands inside sentences; they may leave arguments out."""
    text = _FENCE.sub("", page.read_text())
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if is_command(span) and " " in span]
    return [Shown(page.name, tuple(shlex.split(span))) for span in spans]


def settings_in(page: Path) -> list[str]:
    """What stands after `--set`."""
    return re.findall(r"--set ([a-z_.]+=[^\s`|)]+)", page.read_text())


def _in_fence(text: str, at: int) -> bool:
    return len(re.findall(r"^```", text[:at], re.MULTILINE)) % 2 == 1
