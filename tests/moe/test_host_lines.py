"""The line of a host: words behind it, its end, and time that does not count."""

import os
import socket
import threading
import time
from collections.abc import Sequence

import pytest

from moe.cluster.lines import BEAT_S, Lifeline, Lines
from moe.cluster.messages import Beat, Said
from moe.engine.sampling import Logprobs
from tests.patience import NEVER_S, PATIENCE_S, until


def hear_until(lines: Lines, condition) -> None:
    until(condition, lambda: lines.wait(0.01))


def beat(said: Sequence[Said]) -> Beat:
    return Beat(17, 4, 2, said)


@pytest.mark.parametrize(
    "said",
    [
        Said(1, (10,)),
        Said(2, (11,), "length"),
        Said(3, (), "error", error="no\nroom"),
        Said(4, (5,), None, (Logprobs(-0.1234567890123456789, {5: -0.1, 7: float("-inf")}, 1),)),
        Said(6, (5, 6), "length", (Logprobs(-1.0, {5: -1.0}, 1), Logprobs(-2.0, {}, 9))),
        Said(5, (6,), "stop", (), None, (Logprobs(-1.5, {}, 3), Logprobs(-2.5, {9: -2.5}, 1))),
    ],
)
def test_words_are_the_same_behind_a_line(said):
    beat = Beat(3, 4, 5, [said, Said(9, (9,))])
    line = beat.to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Beat.from_line(line) == beat


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"5 7",
        b"[1,2,3]",
        b"[1,2,3,4]",
        b"[1,2,3,[[]]]",
        b'{"a":1}',
        b"[1,2,3,[[1,2,3,[]]]]",
        b"[1,2,3,[[1,[2],null,[[]]]]]",
    ],
)
def test_what_is_no_beat_ends_the_line(line):
    with pytest.raises(ValueError, match="no beat of a host"):
        Beat.from_line(line)


@pytest.mark.parametrize("says", [b"another 5\n", b"word five\n", b"word\n", b"\xff\xfe 5\n", b"word " + b"5" * 300])
def test_a_stranger_is_hung_up_on(says):
    lines = Lines("127.0.0.1", "word")
    with socket.create_connection(("127.0.0.1", lines.port)) as stranger:
        stranger.sendall(says)
        hear_until(lines, lambda: lines._callers)
        hear_until(lines, lambda: not lines._callers)
        stranger.settimeout(PATIENCE_S)
        assert stranger.recv(1) == b""
    assert lines._lines == {}
    lines.close()


def test_who_calls_and_says_no_name_is_hung_up_on(monkeypatch):
    lines = Lines("127.0.0.1", "word")
    with socket.create_connection(("127.0.0.1", lines.port)):
        hear_until(lines, lambda: lines._callers)
        monkeypatch.setattr("moe.cluster.lines._CALL_S", 0.05)
        hear_until(lines, lambda: not lines._callers)
    lines.close()


def test_a_line_says_when_its_host_is_gone_or_given_up():
    lines = Lines("127.0.0.1", "word")
    child = os.fork()
    if not child:
        line = Lifeline("127.0.0.1", lines.port, "word", 3)
        line.start(beat)
        line.say([Said(5, (), "error", error="no room")])
        time.sleep(NEVER_S)
    assert lines.wait_for_words(3, 1, PATIENCE_S)
    line = lines.get(3)
    assert (line.steps, line.free_blocks, line.placed) == (17, 4, 2)
    assert lines.take_words()[0] == (3, [Said(5, (), "error", error="no room")])
    assert not line.is_closed
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not lines.wait_for_words(3, 2, NEVER_S)
    assert line.is_closed
    assert lines.get(5) is None
    is_told = threading.Event()
    Lifeline("127.0.0.1", lines.port, "word", 4, is_told.set).start(beat)
    hear_until(lines, lambda: lines.get(4) is not None)
    assert not lines.wait_for_words(4, 1, 0.0)
    lines.hang_up(4)
    assert is_told.wait(PATIENCE_S)
    assert lines.get(4).is_closed
    lines.hang_up(4)
    lines.close()


def test_what_comes_in_pieces_is_put_together_and_a_bad_beat_ends_the_line():
    lines = Lines("127.0.0.1", "word")
    with socket.create_connection(("127.0.0.1", lines.port)) as host:
        said = [Said(1, (), "error", error="x" * 200_000), Said(2, (7,))]
        text = b"word 3\n" + beat(said[:1]).to_line() + beat(said[1:]).to_line() + b"[17,4"
        sender = threading.Thread(
            target=lambda: [host.sendall(text[at : at + 9999]) for at in range(0, len(text), 9999)]
        )
        sender.start()
        assert lines.wait_for_words(3, 2, PATIENCE_S)
        sender.join(PATIENCE_S)
        assert [one for _, words in lines.take_words() for one in words] == said
        line = lines.get(3)
        hear_until(lines, lambda: line.unread == b"[17,4")
        host.sendall(b"]\n")
        hear_until(lines, lambda: line.is_closed)
    lines.close()


def test_who_speaks_waits_for_nobody_and_every_word_comes_in_order():
    """The controller does not read for longer than the line has room; beats go on between the words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host = Lifeline("127.0.0.1", server.getsockname()[1], "word", 3)
        there, _ = server.accept()
        there.settimeout(PATIENCE_S)
        host._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        host.start(beat)
        said = [Said(number, (number,), error="x" * (number % 7000)) for number in range(3000)]
        for first in range(0, 1000, 2):
            host.say(said[first : first + 2])
        assert host._late or host._is_sending, "the line had room for all"
        with there.makefile("rb") as words:
            assert words.readline() == b"word 3\n"
            come: list[Said] = []
            for number in range(1000, 3000):
                host.say(said[number : number + 1])
                if number % 3 == 0:
                    come += Beat.from_line(words.readline()).said
            while len(come) < len(said):
                come += Beat.from_line(words.readline()).said
            assert come == said

        def goes_at_once() -> bool:
            with host._changed:  # its own thread can do nothing
                if host._is_sending:
                    return False
                host.say(said[:1])
                return not host._late

        until(goes_at_once)
        there.close()


def test_time_in_which_nobody_was_heard_does_not_count():
    """The controller was stopped, or did other things: what has come meanwhile counts, most of the time does not."""
    lines = Lines("127.0.0.1", "word")
    with socket.create_connection(("127.0.0.1", lines.port)) as host:
        host.sendall(b"word 3\n" + Beat(5, 7, 0).to_line())
        hear_until(lines, lambda: (line := lines.get(3)) is not None and line.steps == 5)
        line = lines.get(3)
        time.sleep(3 * BEAT_S)
        assert lines.since(line) == (pytest.approx(2 * BEAT_S), pytest.approx(2 * BEAT_S))
        before = line.heard
        host.sendall(Beat(7, 7, 0).to_line() + Beat(9, 7, 0).to_line())
        lines.wait(PATIENCE_S)
        assert line.heard == line.moved == pytest.approx(before + 2 * BEAT_S)
        assert line.paces[-1] == pytest.approx(2 * BEAT_S / 4)
        before = line.heard
        for _ in range(4):  # it beats, and does not step
            host.sendall(Beat(9, 7, 0).to_line())
            time.sleep(BEAT_S / 4)
            lines.wait(PATIENCE_S)
        assert line.moved == before
        assert line.heard >= before + BEAT_S
    lines.close()
