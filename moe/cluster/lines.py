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
_MOST_S = 2 * BEAT_S  # that count between two beats of this process: the rest is its own delay


@dataclass(slots=True)
class Line:
    """What is known of one host by its line. Times are of `Lines.now`."""

    connection: socket.socket
    heard: float
    moved: float
    steps: int = 0
    free_blocks: int = 0
    is_closed: bool = False
    paces: list[float] = field(default_factory=list)  # seconds a step, of the last beats

    def has_unread(self) -> bool:
        if self.is_closed:
            return False
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False  # nothing there, or the line broke


class Lines:
    """The controller's end. Its threads end with `close`."""

    def __init__(self, address: str, word: str) -> None:
        self._server = socket.create_server((address, 0))
        self.port: int = self._server.getsockname()[1]
        self._word = word
        self._lock = threading.Lock()
        self._lines: dict[int, Line] = {}
        self._open: set[socket.socket] = set()
        self._is_open = True
        self._beat = 0.0, time.monotonic()  # this process's last: in its own time, and by the clock
        threading.Thread(target=self._accept, name="moe-lines", daemon=True).start()
        threading.Thread(target=self._beat_too, name="moe-lines-beat", daemon=True).start()

    def get(self, host: int) -> Line | None:
        """None: it has not called yet."""
        with self._lock:
            return self._lines.get(host)

    def now(self) -> float:
        """Seconds that this process has lived through. What it was itself stopped for (Ctrl-Z, a debugger) or did not
        get to run for does not count: in that time it could not have heard anybody."""
        own, at = self._beat
        return own + min(time.monotonic() - at, _MOST_S)

    def since(self, line: Line) -> tuple[float, float]:
        """Seconds of `now` since a host's last sign of life and since its last finished step. A sign that has come and
        was not read yet is one."""
        with self._lock:
            now = self.now()
            return 0.0 if line.has_unread() else now - line.heard, now - line.moved

    def hang_up(self, host: int) -> None:
        """Tells a host that it was given up; no effect if its line is closed."""
        line = self.get(host)
        if line is not None:
            with contextlib.suppress(OSError):  # it was closed meanwhile
                line.connection.shutdown(socket.SHUT_RDWR)

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
            time.sleep(BEAT_S)
            (own, at), now = self._beat, time.monotonic()
            self._beat = own + min(now - at, _MOST_S), now

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
                now = self.now()
                with self._lock:
                    self._lines[host] = Line(connection, now, now)
                while beat := words.readline(64):
                    self._note(host, *map(int, beat.split()))
        except (OSError, ValueError):
            return  # the line broke: the same as its end
        finally:
            with self._lock:
                self._open.discard(connection)
                if host is not None:
                    self._lines[host].is_closed = True
            connection.close()

    def _note(self, host: int, steps: int, free_blocks: int) -> None:
        now = self.now()
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
