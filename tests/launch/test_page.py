"""The live page and the page of a recorded run, in headless Chromium where there is one."""

import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from moe.launch.cli import main
from moe.launch.page import PAGE, recorded_page
from moe.launch.recording import read_recording, recording
from moe.launch.server import Limits
from tests.launch.serving import run_server
from tests.moe.moe_cases import TINYMOE
from tests.patience import PATIENCE_S
from tests.placement.test_written import files_of_at_most

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")


def states(count=60):
    """Of a run on four hosts of which one is lost."""
    found = []
    for t in range(count):
        ranks = 4 if t < 40 else 3
        found.append(
            {
                **{"model": "</script><b>model", "time": 1.7e9 + t, "ill": None, "open": t, "running": min(t, 16)},
                **{"waiting": 2, "tokens": 100 * t, "free_blocks": 10, "blocks": 40, "slots": 48, "experts": 96},
                **{"hits": 50 * t, "misses": 10 * t, "bytes_read": t << 20, "stall_seconds": 0.2 * t},
                **{"first_token_p50": 0.03, "token_p99": None},
                "heat": [[bool((e + l + t) % 2) for e in range(16)] for l in range(6)],
                "plan": [[(e + l) % ranks for e in range(16)] for l in range(6)],
                "events": [{"time": 1.7e9 + 40, "what": "host 3 was lost"}] if t >= 40 else [],
            }
        )
    return found


def as_file(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page)
    return file.as_uri()


def browse(address, tmp_path, width, *options):
    """The document after its script ran, and its picture."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--timeout=20000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1400", "--virtual-time-budget=3000"]
    dom = subprocess.run(
        [*command, *options, "--dump-dom", address], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    picture = tmp_path / "page.png"
    subprocess.run(
        [*command, *options, f"--screenshot={picture}", address], capture_output=True, timeout=PATIENCE_S, check=True
    )
    return dom.stdout, picture


class Texts(HTMLParser):
    @classmethod
    def of(cls, dom):
        parser = cls()
        parser.feed(dom)
        return " | ".join(parser.found)

    def __init__(self):
        super().__init__()
        self.found, self.is_script = [], False

    def handle_starttag(self, tag, attributes):
        self.is_script = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.is_script = False

    def handle_data(self, data):
        if not self.is_script and data.strip():
            self.found.append(data.strip())


@pytest.mark.heavy
@in_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_recorded_run_is_drawn(tmp_path, width):
    dom, picture = browse(as_file(recorded_page(states()), tmp_path), tmp_path, width)
    texts = Texts.of(dom)
    for expected in ("100.0", "59", "16 / 2", "30 of 40", "48 of 96", "83.3 %", "1.0 MiB/s", "≤ 30 ms", "20 %"):
        assert expected in texts, (expected, texts)
    for axis in ("layer 0", "expert 0", "15", "before:", "now:", "host 3 was lost"):
        assert axis in texts, (axis, texts)
    assert "<b>model" not in dom.split("<script>")[0]  # text, not markup
    lines = re.findall(r'<polyline points="([^"]+)"', dom)
    assert len(lines) == 4
    for line in lines:
        assert all(math.isfinite(float(v)) for point in line.split() for v in point.split(","))
        assert len(line.split()) == 60
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width
    assert len({tuple(p) for p in (pixels[::7, ::7, :3] * 255).astype(int).reshape(-1, 3)}) > 20  # it is no blank page


@pytest.mark.heavy
@in_browser
def test_a_service_that_does_not_answer_is_said(tmp_path):
    dom, _ = browse(as_file(PAGE, tmp_path), tmp_path, 800)
    assert "the service does not answer" in dom


@pytest.mark.heavy
@in_browser
def test_the_page_of_a_service_with_a_key_that_is_started_again(tmp_path, monkeypatch):
    """Its totals begin anew while the page is open: no rate is below nothing."""
    face = SimpleNamespace(llm=None, why_ill=None, close=lambda seconds: None)
    told = [states(7)[n] for n in (4, 5, 6, 0, 1)]
    monkeypatch.setattr("moe.launch.server.live_state", lambda *_: told.pop(0) if told[1:] else told[0])
    url, stop = run_server(face, SimpleNamespace(close=lambda: None), Limits(), "secret")
    try:
        without, _ = browse(url, tmp_path, 800)
        assert "the service asks for its key" in without
        dom, _ = browse(f"{url}/#secret", tmp_path, 800)
        assert "model" in Texts.of(dom)
        assert "the service" not in dom.split("<script>")[0]
        assert len(told) < 3, "it was looked at after the new start"
        assert not re.search(r">-\d", dom.split("<script>")[0])
    finally:
        stop()


def test_nothing_comes_from_elsewhere():
    page = recorded_page(states(2))
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]  # a name, nothing to fetch
    with pytest.raises(ValueError, match="no state"):
        recorded_page([])


def test_a_run_is_recorded_and_reported(tmp_path, capfd):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "A", "max_tokens": 4}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    run = tmp_path / "run.jsonl"
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    assert main(["batch", str(TINYMOE), *files, "--record", str(run)]) == 0
    recorded = [json.loads(line) for line in run.read_text().splitlines()]
    assert recorded[0]["tokens"] == 0
    assert recorded[-1]["tokens"] >= 4
    assert main(["report", str(run)]) == 0
    assert "2 states" in capfd.readouterr().out or len(recorded) > 2
    assert '"tokens": 0' in run.with_suffix(".html").read_text()
    (tmp_path / "other").write_text("{}\n")
    assert main(["report", str(tmp_path / "other")]) == 2
    assert "is no recording of a run" in capfd.readouterr().err


def test_a_recording_that_was_cut_and_one_of_other_kinds(capsys, tmp_path):
    whole = "".join(json.dumps(state) + "\n" for state in states(5))
    run = tmp_path / "run.jsonl"
    run.write_text(whole + whole[:77])  # killed while it wrote
    assert main(["report", str(run)]) == 0
    assert "5 states over 4 s" in capsys.readouterr().out
    for bad in (
        "",
        whole[:77],
        "[]\n",
        "5\n",
        '{"time": "x", "tokens": 1, "heat": []}\n',
        '{"time": 1}\n',
        "[" * 99999,
    ):
        run.write_text(bad)
        assert main(["report", str(run)]) == 2
        assert f"{run} is no recording of a run" in capsys.readouterr().err


def test_a_full_disk_ends_the_recording_and_not_the_run(capsys, tmp_path):
    run = tmp_path / "run.jsonl"
    line = len(json.dumps(states(1)[0])) + 1
    with files_of_at_most(line + 10), recording(run, lambda: states(1)[0], seconds=1e-3):
        time.sleep(0.1)
    assert f"{run} ends here, the run goes on" in " ".join(capsys.readouterr().err.split())
    assert len(read_recording(run)) == 1
