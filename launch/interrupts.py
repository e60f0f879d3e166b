"""Ctrl-C while modules are loaded, which takes seconds and is no place for an exception.

One that is raised there becomes another in packages that import lazily ("Could not import module"), ends C++ that calls
Python by abort, and may leave threads that the end of the process waits for.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_end_imports(sentence: str | None) -> Iterator[None]:
    """Ends the process with status 130 where Ctrl-C meets an import; elsewhere it is KeyboardInterrupt, as ever.

    sentence: printed then. Whatever else handles SIGINT stays; so does all where this is not the main thread.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        now: FrameType | None = sys._getframe(1)
        while now is not None:
            if now.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, f"{sentence}\n".encode() if sentence else b"")
                os._exit(130)
            now = now.f_back
        raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread()
    is_ours = is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
