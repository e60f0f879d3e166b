"""What a run did, second by second: `--record FILE` writes it, `moe report FILE` shows it as one HTML file."""

import argparse
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.launch.console import err, out
from moe.launch.options import check_free
from moe.launch.page import recorded_page
from moe.placement.written import written_whole

_SHOWN = 900  # states that a page takes: more than it has pixels only make the file large


@contextmanager
def recording(path: Path | None, state: Callable[[], dict[str, Any]], seconds: float = 1.0) -> Iterator[None]:
    """Appends `state()` to the file as a line of JSON, every so many seconds and at the end. path: None = nowhere.

    A disk that is full ends the recording with a note, and not the run.
    """
    if path is None:
        yield
        return
    done = threading.Event()
    with path.open("wb", buffering=0) as file:

        def write() -> None:
            try:
                if not file.closed:
                    file.write((json.dumps(state()) + "\n").encode())
            except OSError as error:
                err.print(f"note: {path} ends here, the run goes on: {error.strerror}", style="yellow", markup=False)
                file.close()

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
            thread.join()  # no limit: after one look at the state, which has one
            write()


def report(args: argparse.Namespace) -> int:
    """Writes the page of a recorded run."""
    states = read_recording(args.run_file)
    target = args.out or args.run_file.with_suffix(".html")
    check_free(target, args)
    with written_whole(target) as part:
        part.write_text(recorded_page(states), encoding="utf-8")
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


def _is_state(one: Any) -> bool:
    """Whether it has what is read of it here and in a page."""
    kinds: dict[str, tuple[type, ...]] = {"time": (int, float), "tokens": (int,), "heat": (list,)}
    return isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in kinds.items())


def read_recording(path: Path) -> list[dict[str, Any]]:
    """At most some hundred states, evenly chosen. Raises ValueError for a file that is no recording."""
    try:
        *lines, cut = path.read_bytes().split(b"\n")  # the last is empty, or of a run that was killed while it wrote
        states = [json.loads(line) for line in lines]
        if not states or not all(_is_state(one) for one in states):
            raise ValueError("it has no states" + (" but one that was cut off" if cut else ""))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no recording of a run (serve or batch with --record): {error}") from None
    step = -(-len(states) // _SHOWN)
    return [*states[:-1:step], states[-1]]
