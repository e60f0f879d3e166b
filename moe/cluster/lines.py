"""One TCP connection from every host to the controller: its end is the end of the host, long before anyone else knows.

A host says its name once and then, from a thread that does not step, how many steps it has finished and
how many KV blocks are free. So the controller
can tell a process that ended (the kernel closes the line) from one that is silent (stopped, or out of reach).
"""

import contextlib
import hmac
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

BEAT_S = 0.25
_PAUSE_S = 1.0  # since this process's own last beat: then it is this process that was stopped


@dataclass(slots=True)
class Line:
    """What is known of one host by its line. Times are of time.monotonic."""

    heard: float
    moved: float
    steps: int = 0
    free_blocks: int = 0
    is_closed: bool = False
    paces: list[float] = field(default_factory=list)  # seconds a step, of the last beats


class Lines:
    """The controller's end. Its threads end with `close`."""

    def __init__(self, address: str, word: str) -> None:
        self._server = socket.create_server((address, 0))
        self.port: int = self._server.getsockname()[1]
        self._word = word
        self._lock = threading.Lock()
        self._lines: dict[int, Line] = {}
        self._open: set[socket.socket] = set()
        self._of: dict[int, socket.socket] = {}  # by host
        self._is_open = True
        self._beat = self._resumed = time.monotonic()
        threading.Thread(target=self._accept, name="moe-lines", daemon=True).start()
        threading.Thread(target=self._beat_too, name="moe-lines-beat", daemon=True).start()

    def get(self, host: int) -> Line | None:
        """None: it has not called yet."""
        with self._lock:
            return self._lines.get(host)

    def since(self, line: Line) -> tuple[float, float]:
        """Seconds since a host's last sign of life and since its last finished step, as far as this process can tell:
        what it was itself stopped for (Ctrl-Z, a debugger) does not count."""
        at = time.monotonic()
        if at - self._beat > _PAUSE_S:
            return 0.0, 0.0
        return at - max(line.heard, self._resumed), at - max(line.moved, self._resumed)

    def hang_up(self, host: int) -> None:
        """Tells a host that it was given up; no effect if its line is closed."""
        with self._lock:
            connection = self._of.get(host)
        if connection is not None:
            with contextlib.suppress(OSError):  # it was closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_open = False
        with self._lock:
            sockets = [self._server, *self._open]
        for one in sockets:
            # A close alone would leave the thread that waits in accept or recv there.
            with contextlib.suppress(OSError):  # the other end was closed first
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _beat_too(self) -> None:
        while self._is_open:
            now = time.monotonic()
            if now - self._beat > _PAUSE_S:
                self._resumed = now
            self._beat = now
            time.sleep(BEAT_S)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return  # closed
            with self._lock:
                self._open.add(connection)
            threading.Thread(target=self._listen, args=(connection,), name="moe-line", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        host = None
        try:
            with connection.makefile("rb") as words:
                hello = words.readline(256).decode(errors="replace").split()
                if len(hello) != 2 or not hmac.compare_digest(hello[0], self._word) or not hello[1].isdigit():
                    return
                host = int(hello[1])
                now = time.monotonic()
                with self._lock:
                    self._lines[host] = Line(now, now)
                    self._of[host] = connection
                while beat := words.readline(64):
                    self._note(host, *map(int, beat.split()))
        except (OSError, ValueError):
            return  # the line broke: the same as its end
        finally:
            with self._lock:
                self._open.discard(connection)
                if host is not None:
                    self._lines[host].is_closed = True
                    del self._of[host]
            connection.close()

    def _note(self, host: int, steps: int, free_blocks: int) -> None:
        now = time.monotonic()
        with self._lock:
            line = self._lines[host]
            if steps != line.steps:
                line.paces = [*line.paces[-31:], (now - line.heard) / (steps - line.steps)]
                line.moved, line.steps = now, steps
            line.heard, line.free_blocks = now, free_blocks


class Lifeline:
    """A host's end. on_end: called when the controller is gone, or has given this host up."""

    def __init__(
        self, address: str, port: int, word: str, host: int, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._socket = socket.create_connection((address, port), timeout=10)
        self._socket.sendall(f"{word} {host}\n".encode())
        self.steps, self.free_blocks, self._on_end = 0, 0, on_end
        threading.Thread(target=self._beat, name="moe-lifeline", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self._socket.sendall(f"{self.steps} {self.free_blocks}\n".encode())
            except OSError:
                return self._on_end()
            time.sleep(BEAT_S)
