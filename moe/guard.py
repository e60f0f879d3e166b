"""Who may use a model at the moment: one thread, in the process that loaded it, until it is closed or broken.

While a call is inside, Ctrl-C is held back to a place where everything is whole (`check`, or the end of the call): an
exception that came between two lines of bookkeeping would leave blocks and slots that nobody gives back.
"""

import os
import signal
import threading
import time
from functools import cache
from types import FrameType
from typing import Any

_PATIENCE = 2.0  # seconds after which a second Ctrl-C no longer waits


class UnusableError(RuntimeError):
    """The model cannot be used any more, or not from here; the message says why and what to do."""


def check_threads(threads: int | None) -> None:
    """Raises UnusableError in a fork of a process that loaded a model, unless there will be one thread.

    Torch would wait forever for its others (OpenMP's), of which a fork has none. threads: the setting.
    """
    if threads is None and os.environ.get("OMP_NUM_THREADS"):
        import torch  # not above: who only names LLM does not wait for it

        threads = torch.get_num_threads()
    if threads != 1 and (parent := _first_to_load()) != os.getpid():
        raise UnusableError(
            f"process {os.getpid()} is a fork of {parent}, which had loaded a model, and has none of torch's threads; "
            "start it by multiprocessing's 'spawn', or compute with threads=1"
        )


@cache
def _first_to_load() -> int:
    return os.getpid()


class Guard:
    """A context that may be entered again by the thread that is in it. Costs two signal calls on the main thread."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._depth = 0
        self._previous: Any = None  # the handler of SIGINT that we stand in for
        self._pending: tuple[int, FrameType | None] | None = None
        self._since = 0.0
        self._why_unusable: str | None = None

    @property
    def is_usable_here(self) -> bool:
        return self._why_unusable is None and os.getpid() == self._pid

    def close(self, why: str = "is closed; load it again") -> None:
        """From now on every call is refused with this reason."""
        self._why_unusable = self._why_unusable or why

    def __enter__(self) -> "Guard":
        if os.getpid() != self._pid:
            raise UnusableError(
                f"{self.what} was loaded by process {self._pid} and cannot be used after a fork; load it in a "
                "process that multiprocessing's 'spawn' started"
            )
        if self._why_unusable is not None:
            raise UnusableError(f"{self.what} {self._why_unusable}")
        handler = self._hold_interrupts()  # from here on none can come between
        if not self._lock.acquire(blocking=False):
            self._release_interrupts(handler)
            raise UnusableError(f"{self.what} is in use by another thread; let one thread own it, or use `moe serve`")
        if self._depth == 0:
            self._previous = handler
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        is_over = self._depth == 0
        handler = self._previous if is_over else None
        pending = self._pending if is_over else None
        if is_over:
            self._previous = self._pending = None
        self._lock.release()
        self._release_interrupts(handler)
        if pending is not None and callable(handler):
            handler(*pending)

    def check(self) -> None:
        """Lets a Ctrl-C that came meanwhile through. For places where all is whole."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._previous(*pending)

    def _hold_interrupts(self) -> Any:
        """Returns the handler that was in place; None if nothing was changed."""
        if threading.current_thread() is not threading.main_thread() or self._depth:
            return None
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # ignored, or the system's default: nothing that raises
            return None
        signal.signal(signal.SIGINT, self._note)
        return handler

    @staticmethod
    def _release_interrupts(handler: Any) -> None:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._pending is not None and now - self._since > _PATIENCE:
            self.close("was interrupted in the middle of a step; load it again")
            self._pending = None
            self._previous(number, frame)
        elif self._pending is None:
            self._pending, self._since = (number, frame), now
