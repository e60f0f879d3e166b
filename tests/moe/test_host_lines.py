"""The line of a host: words behind it, its end, and time that does not count."""

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence

import pytest

from moe.cluster.lines import Lifeline, Line, Lines
from moe.cluster.messages import Beat, Said
from moe.engine.sampling import Logprobs
from tests.distributed import MULTIPROCESSING


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def beat(said: Sequence[Said]) -> Beat:
    return Beat(17, 4, 2, said)


@pytest.mark.parametrize(
    "said",
    [
        Said(1, 10),
        Said(2, 11, "length"),
        Said(3, None, "error", error="no\nroom"),
        Said(4, 5, None, Logprobs(-0.1234567890123456789, {5: -0.1, 7: float("-inf")}, 1)),
        Said(5, 6, "stop", None, None, (Logprobs(-1.5, {}, 3), Logprobs(-2.5, {9: -2.5}, 1))),
    ],
)
def test_words_are_the_same_behind_a_line(said):
    beat = Beat(3, 4, 5, [said, Said(9, 9)])
    line = beat.to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Beat.from_line(line) == beat


@pytest.mark.parametrize(
    "line", [b"", b"5 7", b"[1,2,3]", b"[1,2,3,4]", b"[1,2,3,[[]]]", b'{"a":1}', b"[1,2,3,[[1,2,3,[]]]]"]
)
def test_what_is_no_beat_ends_the_line(line):
    with pytest.raises(ValueError, match="no beat of a host"):
        Beat.from_line(line)


def test_a_line_says_when_its_host_is_gone_or_given_up_and_refuses_strangers():
    lines = Lines("127.0.0.1", "word")
    stranger = socket.create_connection(("127.0.0.1", lines.port))
    stranger.sendall(b"another 5\n")
    assert stranger.recv(1) == b""  # hung up
    child = os.fork()
    if not child:
        line = Lifeline("127.0.0.1", lines.port, "word", 3)
        line.start(beat)
        line.say([Said(5, None, "error", error="no room")])
        time.sleep(60)
    assert lines.wait_for_words(3, 1, 20)
    line = lines.get(3)
    assert (line.steps, line.free_blocks, line.placed) == (17, 4, 2)
    assert lines.take_words()[0] == (3, [Said(5, None, "error", error="no room")])
    lines.wait(20)
    assert not lines.get(3).is_closed
    os.kill(child, 9)
    os.waitpid(child, 0)
    until(lambda: lines.get(3).is_closed)
    assert lines.get(5) is None
    is_told = threading.Event()
    Lifeline("127.0.0.1", lines.port, "word", 4, is_told.set).start(beat)
    until(lambda: lines.get(4) is not None)
    assert not lines.wait_for_words(4, 1, 0.0)
    lines.hang_up(4)
    assert is_told.wait(20)
    until(lambda: lines.get(4).is_closed)
    lines.hang_up(4)
    lines.close()


def test_who_speaks_waits_for_nobody_and_every_word_comes_in_order():
    """The controller does not read for longer than the line has room; beats go on between the words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host = Lifeline("127.0.0.1", server.getsockname()[1], "word", 3)
        there, _ = server.accept()
        there.settimeout(20)
        host._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        host.start(beat)
        said = [Said(number, number, error="x" * (number % 7000)) for number in range(3000)]
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


def test_a_sign_that_nobody_has_read_yet_is_one():
    """The thread that reads it did not get to run."""
    lines, (here, there) = Lines("127.0.0.1", "word"), socket.socketpair()
    line = Line(here, heard=-100.0, moved=-50.0)
    assert lines.since(line)[0] >= 100
    there.sendall(Beat(5, 7, 0).to_line())
    silent, stuck = lines.since(line)
    assert silent == 0.0
    assert stuck >= 50
    here.recv(100)
    assert lines.since(line)[0] >= 100
    there.close()
    here.close()
    lines.close()


def test_time_in_which_the_controller_was_stopped_does_not_count():
    """Its process is stopped again and again, for longer than a host may be silent: nobody is given up."""
    receiver, sender = MULTIPROCESSING.Pipe(duplex=False)
    child = MULTIPROCESSING.Process(target=watch_a_line, args=(sender,), daemon=True)
    child.start()
    assert receiver.recv() == "watches"
    for seconds in (2.5, 0.9, 0.9, 0.9):
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.05)
    assert receiver.recv() < 2.0
    child.join(10)


def watch_a_line(sender) -> None:
    lines = Lines("127.0.0.1", "word")
    Lifeline("127.0.0.1", lines.port, "word", 1).start(beat)
    until(lambda: lines.get(1) is not None)
    sender.send("watches")
    started, longest = time.monotonic(), 0.0
    while time.monotonic() - started < 6:
        longest = max(longest, lines.since(lines.get(1))[0])
    sender.send(longest)
