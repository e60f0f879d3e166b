"""One TCP connection from every host to the controller: its end is the end of the host, long before anyone else knows.

A host says its name once and then a `Beat`: every BEAT_S from a thread that does not step, and whenever its desk has
something to say of its requests from the one that does. So the controller can tell a process that ended (the kernel
closes the line) from one that is silent (stopped, or out of reach), and hears every token, in order and once, without
a call of Ray. It reads them where it waits for them: no thread of its own stands between.
"""

import hmac
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe.cluster.messages import Beat, Said

BEAT_S = 0.25
_CALL_S = 10.0  # for a connection, and for the name of who calls
_NAME_BYTES = 256
_READ_BYTES = 1 << 16  # at a time, of one host
_MOST_S = 2 * BEAT_S  # that count between two looks of this process: the rest is its own delay


@dataclass(slots=True, eq=False)
class Line:
    """What is known of one host by its line. Times are of `Lines.now`."""

    connection: socket.socket
    heard: float
    moved: float
    host: int | None = None  # until it has said its name
    steps: int = 0
    free_blocks: int = 0
    placed: int = 0
    num_said: int = 0  # words that have come
    is_closed: bool = False
    paces: list[float] = field(default_factory=list)  # seconds a step, of the last looks
    unread: bytearray = field(default_factory=bytearray)  # the beginning of a beat


class Lines:
    """The controller's end. One thread, which hears hosts when it waits for them; `get`, `now` and `since` from any."""

    def __init__(self, address: str, word: str) -> None:
        self._server = socket.create_server((address, 0))
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self._word = word.encode()
        self._selector = selectors.DefaultSelector()  # a host's data is its line, the server's is None
        self._selector.register(self._server, selectors.EVENT_READ)
        self._callers: set[Line] = set()  # who have not said their name
        self._lines: dict[int, Line] = {}
        self._words: list[tuple[int, Sequence[Said]]] = []  # by host
        self._looked = 0.0, time.monotonic()  # at the last look: `now`, and by the clock

    def get(self, host: int) -> Line | None:
        """None: it has not called yet."""
        return self._lines.get(host)

    def now(self) -> float:
        """Seconds in which hosts were heard. What this process was itself stopped for (Ctrl-Z, a debugger), did not get
        to run for or did other things in does not count: in that time it heard nobody."""
        own, at = self._looked
        return own + min(time.monotonic() - at, _MOST_S)

    def since(self, line: Line) -> tuple[float, float]:
        """Seconds of `now` since a host's last sign of life and since its last finished step."""
        now = self.now()
        return now - line.heard, now - line.moved

    def wait(self, seconds: float) -> None:
        """Hears what has come since the last call; where nothing has, until something comes, for up to `seconds`."""
        events = self._selector.select(seconds)
        now = self.now()
        self._looked = now, time.monotonic()
        for key, _ in events:
            if key.data is None:
                self._accept(now)
            else:
                self._hear(key.data, now)
        for line in [one for one in self._callers if now - one.heard > _CALL_S]:
            self._end(line)

    def wait_for_words(self, host: int, count: int, seconds: float) -> bool:
        """Until as many have come from a host as it says it has said. Returns whether they have."""
        until = time.monotonic() + seconds
        while True:
            line = self.get(host)
            if line is not None and line.num_said >= count:
                return True
            left = until - time.monotonic()
            if left <= 0 or (line is not None and line.is_closed):
                return False
            self.wait(min(left, BEAT_S))

    def take_words(self) -> list[tuple[int, Sequence[Said]]]:
        """What hosts have said since the last call, in order."""
        words, self._words = self._words, []
        return words

    def begins(self, host: int) -> None:
        """Its steps are counted from now on: while it waited it had none to finish."""
        if (line := self.get(host)) is not None:  # else it moves when it calls
            line.moved = self.now()

    def hang_up(self, host: int) -> None:
        """Tells a host that it was given up; no effect if its line is closed."""
        line = self.get(host)
        if line is not None and not line.is_closed:
            self._end(line)

    def close(self) -> None:
        for line in (*self._lines.values(), *self._callers):
            if not line.is_closed:
                self._end(line)
        self._selector.close()
        self._server.close()

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._server.accept()  # no limit: it does not block
        except OSError:
            time.sleep(0.01)  # no descriptor is free at the moment, say: who calls waits
            return
        connection.setblocking(False)
        line = Line(connection, now, now)
        self._callers.add(line)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _hear(self, line: Line, now: float) -> None:
        try:
            come = line.connection.recv(_READ_BYTES)  # no limit: it does not block
            line.unread += come
            if line.host is None:
                self._take_name(line)
            if line.host is not None and b"\n" in line.unread:
                *beats, line.unread = line.unread.split(b"\n")
                self._take(line, line.host, [Beat.from_line(beat) for beat in beats], now)
        except (OSError, ValueError):
            come = b""  # the line broke, or somebody else speaks: the same as its end
        line.heard = now
        if not come:
            self._end(line)

    def _take_name(self, line: Line) -> None:
        """Raises ValueError if it is no host's."""
        name, end, rest = line.unread.partition(b"\n")
        word, _, number = name.partition(b" ")
        if len(name) > _NAME_BYTES or (end and not (hmac.compare_digest(word, self._word) and number.isdigit())):
            raise ValueError("who calls is no host of ours")
        if end:
            line.host, line.unread = int(number), rest
            self._lines[line.host] = line
            self._callers.remove(line)

    def _take(self, line: Line, host: int, beats: Sequence[Beat], now: float) -> None:
        last = beats[-1]
        if last.steps != line.steps:
            line.paces = [*line.paces[-31:], (now - line.heard) / (last.steps - line.steps)]
            line.moved, line.steps = now, last.steps
        line.free_blocks, line.placed = last.free_blocks, last.placed
        for said in (beat.said for beat in beats if beat.said):
            line.num_said += len(said)
            self._words.append((host, said))

    def _end(self, line: Line) -> None:
        line.is_closed = True
        self._callers.discard(line)
        self._selector.unregister(line.connection)
        line.connection.close()


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
