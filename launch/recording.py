"""What a run did, second by second: `--record FILE` writes it, `moe report FILE` shows it as one HTML file."""

import argparse
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.launch.console import out
from moe.launch.page import recorded_page

_SHOWN = 900  # states that a page takes: more than it has pixels only make the file large


@contextmanager
def recording(path: Path | None, state: Callable[[], dict[str, Any]], seconds: float = 1.0) -> Iterator[None]:
    """Appends `state()` to the file as a line of JSON, every so many seconds and at the end. path: None = nowhere."""
    if path is None:
        yield
        return
    done = threading.Event()
    with path.open("w") as file:

        def write() -> None:
            file.write(json.dumps(state()) + "\n")
            file.flush()

        def run() -> None:
            while not done.wait(seconds):
                write()

        write()
        thread = threading.Thread(target=run, name="moe-recording", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            write()


def report(args: argparse.Namespace) -> int:
    """Writes the page of a recorded run."""
    states = read_recording(args.run_file)
    target = args.out or args.run_file.with_suffix(".html")
    target.write_text(recorded_page(states))
    out.print(f"{target}: {len(states)} states over {states[-1]['time'] - states[0]['time']:.0f} s", markup=False)
    last = states[-1]
    if "planned_rate" in last:
        planned, rate = last["planned_rate"], last["decode_rate"]
        out.print(
            f"decoding: {rate:.1f} tokens/s, planned {planned:.1f} ({last['planned_binds']} binds), "
            f"{planned / rate - 1:+.0%} off",
            markup=False,
        )
    return 0


def read_recording(path: Path) -> list[dict[str, Any]]:
    """At most some hundred states, evenly chosen. Raises ValueError for a file that is no recording."""
    try:
        states = [json.loads(line) for line in path.read_text().splitlines()]
        if not states or not all({"time", "tokens", "heat"} <= set(one) for one in states):
            raise ValueError("it has no states")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no recording of a run (serve or batch with --record): {error}") from None
    step = -(-len(states) // _SHOWN)
    return [*states[:-1:step], states[-1]]
