"""One TCP connection from every host to the controller: its end is the end of the host, long before anyone else knows.

A host says its name once and then a `Beat`: every BEAT_S from a thread that does not step, and as soon as it has
something to say of its requests from the one that does. So the controller can tell a process that ended (the kernel
closes the line) from one that is silent (stopped, or out of reach), and hears every token, in order and once, without
a call of Ray.
"""

import contextlib
import hmac
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe.cluster.messages import Beat, Said

BEAT_S = 0.25
_CALL_S = 10.0  # for a connection, and for the name of who calls
_MOST_S = 2 * BEAT_S  # that count between two beats of this process: the rest is its own delay


@dataclass(slots=True)
class Line:
    """What is known of one host by its line. Times are of `Lines.now`."""

    connection: socket.socket
    heard: float
    moved: float
    steps: int = 0
    free_blocks: int = 0
    placed: int = 0
    num_said: int = 0  # words that have come
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
        self._changed = threading.Condition()  # around all that follows
        self._lines: dict[int, Line] = {}
        self._words: list[tuple[int, Sequence[Said]]] = []  # by host
        self._is_news = False
        self._open: set[socket.socket] = set()
        self._is_open = True
        self._beat = 0.0, time.monotonic()  # this process's last: in its own time, and by the clock
        threading.Thread(target=self._accept, name="moe-lines", daemon=True).start()
        threading.Thread(target=self._beat_too, name="moe-lines-beat", daemon=True).start()

    def get(self, host: int) -> Line | None:
        """None: it has not called yet."""
        with self._changed:
            return self._lines.get(host)

    def now(self) -> float:
        """Seconds that this process has lived through. What it was itself stopped for (Ctrl-Z, a debugger) or did not
        get to run for does not count: in that time it could not have heard anybody."""
        own, at = self._beat
        return own + min(time.monotonic() - at, _MOST_S)

    def since(self, line: Line) -> tuple[float, float]:
        """Seconds of `now` since a host's last sign of life and since its last finished step. A sign that has come and
        was not read yet is one."""
        with self._changed:
            now = self.now()
            return 0.0 if line.has_unread() else now - line.heard, now - line.moved

    def wait(self, seconds: float) -> None:
        """Until a host has said something of a request, or its line was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_news, seconds)
            self._is_news = False

    def wait_for_words(self, host: int, count: int, seconds: float) -> bool:
        """Until as many have come from a host as it says it has said. Returns whether they have."""

        def have_come() -> bool:
            line = self._lines.get(host)
            return line is not None and line.num_said >= count

        with self._changed:
            return self._changed.wait_for(have_come, seconds)

    def take_words(self) -> list[tuple[int, Sequence[Said]]]:
        """What hosts have said since the last call, in order."""
        with self._changed:
            words, self._words = self._words, []
            return words

    def begins(self, host: int) -> None:
        """Its steps are counted from now on: while it waited it had none to finish."""
        with self._changed:
            if (line := self._lines.get(host)) is not None:  # else it moves when it calls
                line.moved = self.now()

    def hang_up(self, host: int) -> None:
        """Tells a host that it was given up; no effect if its line is closed."""
        line = self.get(host)
        if line is not None:
            with contextlib.suppress(OSError):  # it was closed meanwhile
                line.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_open = False
        with self._changed:
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
                connection, _ = self._server.accept()  # no limit: `close` ends it
            except OSError:
                if not self._is_open:
                    return
                time.sleep(BEAT_S)  # no descriptor is free at the moment, say: hosts wait, and call again
                continue
            with self._changed:
                self._open.add(connection)
            threading.Thread(target=self._listen, args=(connection,), name="moe-line", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        host = None
        try:
            connection.settimeout(_CALL_S)
            with connection.makefile("rb") as words:
                hello = words.readline(256).decode(errors="replace").split()  # no limit: the connection has one
                if len(hello) != 2 or not hmac.compare_digest(hello[0], self._word) or not hello[1].isdigit():
                    return
                connection.settimeout(None)
                host = int(hello[1])
                now = self.now()
                with self._changed:
                    self._lines[host] = Line(connection, now, now)
                while beat := words.readline():  # no limit: who is silent is the policy's affair
                    self._note(host, Beat.from_line(beat))
        except (OSError, ValueError):
            return  # the line broke: the same as its end
        finally:
            with self._changed:
                self._open.discard(connection)
                if host is not None:
                    self._lines[host].is_closed = self._is_news = True
                    self._changed.notify_all()
            connection.close()

    def _note(self, host: int, beat: Beat) -> None:
        now = self.now()
        with self._changed:
            line = self._lines[host]
            if beat.steps != line.steps:
                line.paces = [*line.paces[-31:], (now - line.heard) / (beat.steps - line.steps)]
                line.moved, line.steps = now, beat.steps
            line.heard, line.free_blocks, line.placed = now, beat.free_blocks, beat.placed
            if beat.said:
                line.num_said += len(beat.said)
                self._words.append((host, beat.said))
                self._is_news = True
                self._changed.notify_all()


class Lifeline:
    """A host's end. on_end: called when the controller is gone, or has given this host up."""

    def __init__(
        self, address: str, port: int, word: str, host: int, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._socket = socket.create_connection((address, port), timeout=_CALL_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(f"{word} {host}\n".encode())
        self._socket.settimeout(None)  # a controller that is stopped reads later; one that has ended hangs up
        self._on_end = on_end
        self._beat: Callable[[Sequence[Said]], Beat] | None = None
        self._changed = threading.Condition()  # around all that follows, and around `send` by the thread that steps
        self._late = bytearray()  # what the line had no room for
        self._is_sending = False  # the thread of the line sends what it has taken of that
        self.num_said = 0  # words, since the beginning

    def start(self, beat: Callable[[Sequence[Said]], Beat]) -> None:
        """From now on the host says `beat(())` every BEAT_S, and `beat(said)` of words."""
        self._beat = beat
        threading.Thread(target=self._run, name="moe-lifeline", daemon=True).start()

    def say(self, said: Sequence[Said]) -> None:
        """For the thread that steps: it waits for nobody. What the line has no room for is sent later, in order."""
        assert self._beat is not None, "start first"
        with self._changed:
            self.num_said += len(said)
            line = self._beat(said).to_line()
            if not (self._is_sending or self._late):
                line = line[self._send_now(line) :]
            if line:
                self._late += line
                self._changed.notify_all()

    def _send_now(self, line: bytes) -> int:
        """How many bytes went."""
        try:
            return self._socket.send(line, socket.MSG_DONTWAIT)
        except OSError:
            return 0  # there is no room, or the line broke, which its own thread will see

    def _run(self) -> None:
        assert self._beat is not None
        while True:
            with self._changed:
                self._is_sending = False
                self._changed.wait_for(lambda: bool(self._late), BEAT_S)
                line, self._late = bytes(self._late) or self._beat(()).to_line(), bytearray()
                self._is_sending = True
            try:
                self._socket.sendall(line)
            except OSError:
                return self._on_end()
