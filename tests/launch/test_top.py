"""`moe top`."""

import re
import sys
from types import SimpleNamespace

from moe.launch.cli import main
from moe.launch.console import out
from moe.launch.server import Limits
from tests.launch.serving import run_server


def test_top(served, capfd, monkeypatch):
    assert main(["top", served.url, "--once"]) == 0
    assert "48 of 96 in slots" in capfd.readouterr().out
    assert main(["top", "http://127.0.0.1:9", "--once"]) == 2
    assert "does not answer" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main(["top", served.url, "--once"]) == 2
    assert "pip install 'moeflow[serve]'" in capfd.readouterr().err


def test_top_goes_on_when_a_service_is_started_again(capsys, monkeypatch):
    """Totals begin anew: no rate is below nothing."""
    face = SimpleNamespace(llm=None, why_ill=None, close=lambda seconds: None)
    state = {
        "model": "m",
        "ill": None,
        "open": 0,
        "running": 0,
        "waiting": 0,
        "free_blocks": 1,
        "blocks": 1,
        "slots": 1,
    }
    state |= {"experts": 1, "hits": 0, "misses": 0, "stall_seconds": 0, "first_token_p50": 0, "token_p99": None}
    told = [
        state | {"time": at, "tokens": tokens, "bytes_read": 0} for at, tokens in ((1, 500), (2, 7), (3, 9), (4, 9))
    ]
    monkeypatch.setattr("moe.launch.server.live_state", lambda *_: told[0])
    url, stop = run_server(face, SimpleNamespace(close=lambda: None), Limits())
    acts = iter([lambda: told.pop(0), lambda: told.pop(0), stop])
    seen = []

    class Shown:
        def __init__(self, table, **_):
            seen.append(table)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, table):
            seen.append(table)

    def sleep(seconds):
        if (act := next(acts, None)) is None:
            raise KeyboardInterrupt
        act()

    monkeypatch.setattr("rich.live.Live", Shown)
    monkeypatch.setattr("moe.launch.live.time", SimpleNamespace(sleep=sleep))
    assert main(["top", url]) == 130
    *tables, last = seen
    for table in tables:
        out.print(table)
    assert re.findall(r"tokens/s +\S (\S+)", capsys.readouterr().out) == ["0.0", "0.0", "2.0"]
    assert "does not answer as a moe service" in last
