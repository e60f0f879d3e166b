"""The service under load and faults: a server process, and callers in this one that stream, queue, dawdle and go away.

    python -m tests.launch.load_service [--streams 256 --queued 10000 --minutes 20] [--table FILE]

Every answer that ends is compared with what the model says alone. After each phase the server is looked at: nothing
open, every KV block and slot back, its memory. Faults of the continuous phase: reads of experts that fail, callers that
go away in the middle of everything, bodies that are cut off or nonsense, a server that is stopped for a second, idle
connections. Addresses of this machine alone.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ("Once upon a time, there was", "The cat", "In the morning Tom went to", "A", "She said that", "One day")


class FaultyStore:
    """A store whose reads fail while `fails` is set."""

    def __init__(self, store) -> None:
        self.store, self.fails = store, False

    def read_into(self, *arguments):
        if self.fails:
            raise OSError("the disk does not answer")
        return self.store.read_into(*arguments)

    def __getattr__(self, name):
        return getattr(self.store, name)


def serve(pipe, max_open: int, folder: str) -> None:
    """The server process. Says its port, then obeys: "check" answers what is wrong, "fail" makes reads fail."""
    from moe.launch.server import Limits, make_app, make_server
    from moe.launch.uploads import Uploads
    from moe.llm import LLM
    from moe.service import Service

    config = EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget="0.5"),
        batch=BatchConfig(max_tokens=512, max_sequences=64),
    )
    with LLM(ROOT / "examples" / "tinymoe", config) as llm:
        cache = llm.engine.experts.cache
        cache.store = store = FaultyStore(cache.store)
        service = Service(llm, max_open)
        limits = Limits(drain_seconds=2)
        server = make_server(make_app(service, Uploads(service, Path(folder)), limits), limits, "127.0.0.1", 0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        while (command := pipe.recv()) != "end":
            if command == "check":
                state = llm.engine.state()
                wrong = [] if service.why_ill is None else [service.why_ill]
                wrong += [] if (broken := llm.engine.why_not_whole()) is None else [broken]
                left = (service.stats.open, state.running, state.waiting, state.blocks - state.free_blocks)
                wrong += [f"open, running, waiting, blocks held: {left}"] if any(left) else []
                pipe.send("; ".join(wrong) or None)
            else:
                store.fails = command == "fail"
                pipe.send(None)
        server.should_exit = True
        thread.join()


@dataclass
class Seen:
    """What callers saw. gaps: seconds between two pieces of a stream; firsts: until its first."""

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str, rss: tuple[int, int]) -> str:
        def quantiles(values):
            if len(values) < 2:
                return "–"
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            return " / ".join(f"{1000 * cuts[p - 1]:.0f}" for p in (50, 99))

        ended = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
        memory = " → ".join(f"{one / 2**20:.0f}" for one in rss)
        times = f"{quantiles(self.firsts)} | {quantiles(self.gaps)}"
        return f"| {name} | {self.seconds:.0f} | {ended} | {times} | {memory} |"


class Callers:
    """Ways to call the server at `port`, none of them polite by necessity. right: greedy text by prompt and length."""

    def __init__(self, port: int, right: dict, seen: Seen) -> None:
        self.port, self.right, self.seen = port, right, seen
        self._doors = asyncio.Semaphore(256)  # connections that are being made

    async def call(self, body: dict, *, slow: float = 0.0, leave_after: float | None = None) -> None:
        """One request to its end, or until `leave_after` seconds. slow: seconds between two reads."""
        began = time.monotonic()
        try:
            async with self._doors:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
            try:
                await self._send(writer, json.dumps(body).encode())
                await asyncio.wait_for(self._read(reader, body, slow, began), leave_after)
            finally:
                writer.close()
        except TimeoutError:
            self.seen.outcomes["left"] += 1
        except OSError as error:
            self.seen.outcomes[f"connection failed ({type(error).__name__})"] += 1

    async def _send(self, writer, content: bytes, promised: int | None = None) -> None:
        length = len(content) if promised is None else promised
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()

    async def _read(self, reader, body: dict, slow: float, began: float) -> None:
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            await reader.read()
            self.seen.outcomes[f"{status}"] += 1
            return
        if not body.get("stream"):
            answer = json.loads(await reader.read())
            self._ended(body, answer["choices"][0]["text"], "answered")
            return
        text, last, failed = "", None, False
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            piece, now = json.loads(line[6:]), time.monotonic()
            if "error" in piece:
                failed = True
                continue
            text += piece["choices"][0]["text"]
            if last is None:
                self.seen.firsts.append(now - began)
            elif not slow:
                self.seen.gaps.append(now - last)
            if slow:
                await asyncio.sleep(slow)
            last = now
        if failed:
            self.seen.outcomes["stream ended with an error"] += 1
        else:
            self._ended(body, text, "read slowly" if slow else "streamed")

    def _ended(self, body: dict, text: str, how: str) -> None:
        self.seen.outcomes[how] += 1
        expected = self.right.get((body["prompt"], body["max_tokens"]))
        if body["temperature"] == 0 and expected not in (None, text):
            self.seen.wrong.append(f"{body}: {text!r} instead of {expected!r}")

    async def misbehave(self, kind: str) -> None:
        """One caller that breaks the rules of HTTP or of the format."""
        try:
            async with self._doors:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            if kind == "half a body":
                await self._send(writer, b'{"prompt": "A', promised=500)
            elif kind == "nonsense":
                await self._send(writer, b"\xff{" * 10)
                await asyncio.wait_for(reader.read(), PATIENCE_S)
            elif kind == "idle":
                await asyncio.sleep(1)
            else:
                writer.write(b"GET /%00 HTTP/9.9\r\n\r\n")
                await writer.drain()
            writer.close()
            self.seen.outcomes[f"broke the rules: {kind}"] += 1
        except OSError as error:
            self.seen.outcomes[f"connection failed ({type(error).__name__})"] += 1


def request(prompt: str, tokens: int, **more) -> dict:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0} | more


async def streams(callers: Callers, count: int, tokens: int) -> None:
    """All at once."""
    bodies = [request(PROMPTS[i % len(PROMPTS)], tokens, stream=True) for i in range(count)]
    await asyncio.gather(*map(callers.call, bodies))


async def queue(callers: Callers, count: int, beyond: int, tokens: int, seed: int) -> None:
    """`beyond` requests more than the queue takes, of which some stream slowly and some leave."""
    draw = random.Random(seed)
    calls = []
    for i in range(count + beyond):
        body = request(PROMPTS[i % len(PROMPTS)], tokens, stream=draw.random() < 0.2)
        kind = draw.random()
        if kind < 0.1:
            calls.append(callers.call(body, leave_after=draw.uniform(0.5, 20)))
        elif kind < 0.15:
            calls.append(callers.call(body | {"stream": True}, slow=0.05))
        else:
            calls.append(callers.call(body))
    await asyncio.gather(*calls)


async def faults(callers: Callers, seconds: float, at_once: int, tokens: int, seed: int, order) -> None:
    """Goes on for so long with `at_once` callers. order: tells the server process "fail", "mend", "stop", "go on"."""
    end, draw = time.monotonic() + seconds, random.Random(seed)

    async def caller() -> None:
        while time.monotonic() < end:
            kind, body = draw.random(), request(draw.choice(PROMPTS), tokens, stream=draw.random() < 0.5)
            if kind < 0.1:
                await callers.misbehave(draw.choice(("half a body", "nonsense", "idle", "no HTTP")))
            elif kind < 0.3:
                await callers.call(body, leave_after=draw.uniform(0.01, 1))
            elif kind < 0.4:
                await callers.call(body | {"stream": True}, slow=0.02)
            elif kind < 0.5:
                await callers.call(body | {"temperature": 1, "n": 3, "stream": False})
            elif kind < 0.6:
                await callers.call(body | {"temperature": 9e9})
            else:
                await callers.call(body)

    async def saboteur() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(draw.uniform(2, 6))
            first, then, pause = draw.choice((("fail", "mend", 0.3), ("stop", "go on", 1.0)))
            await asyncio.to_thread(order, first)
            await asyncio.sleep(pause)
            await asyncio.to_thread(order, then)
            callers.seen.outcomes[f"fault: {first}"] += 1

    await asyncio.gather(saboteur(), *(caller() for _ in range(at_once)))


class Server:
    """The server process."""

    def __init__(self, max_open: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, max_open, str(folder)), daemon=True)
        self.process.start()
        assert self.pipe.poll(PATIENCE_S), "the server did not start"
        self.port = self.pipe.recv()

    def order(self, what: str):
        """Its answer. "stop" and "go on" are signals."""
        if what in ("stop", "go on"):
            os.kill(self.process.pid, signal.SIGSTOP if what == "stop" else signal.SIGCONT)
            return None
        self.pipe.send(what)
        assert self.pipe.poll(PATIENCE_S), f"the server does not answer to {what!r}"
        return self.pipe.recv()

    def rss(self) -> int:
        """Bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) * 1024

    def settled(self) -> str | None:
        """What is wrong once everything has had time to end."""
        deadline = time.monotonic() + PATIENCE_S
        while (wrong := self.order("check")) is not None and time.monotonic() < deadline:
            time.sleep(0.2)
        return wrong

    def close(self) -> None:
        self.pipe.send("end")
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == 0, self.process.exitcode


def run(folder: Path, *, num_streams: int, num_queued: int, seconds: float, tokens: int, seed: int = 0):
    """The phases. Returns rows of the table, and sentences on what did not hold."""
    beyond = num_queued // 20
    server = Server(num_queued + num_streams, folder)
    rows, wrong, right = [], [], {}

    def phase(name: str, make) -> Seen:
        seen, before, start = Seen(), server.rss(), time.monotonic()
        asyncio.run(asyncio.wait_for(make(Callers(server.port, right, seen)), seconds + 1800))
        seen.seconds = time.monotonic() - start
        if (broken := server.settled()) is not None:
            wrong.append(f"after {name}: {broken}")
        wrong.extend(seen.wrong)
        rows.append(seen.row(name, (before, server.rss())))
        print(rows[-1], flush=True)
        return seen

    async def alone(callers: Callers) -> None:
        for prompt in PROMPTS:
            for length in (tokens, 4 * tokens):
                reader, writer = await asyncio.open_connection("127.0.0.1", callers.port)
                await callers._send(writer, json.dumps(request(prompt, length)).encode())
                answer = (await reader.read()).split(b"\r\n\r\n", 1)[1]
                right[prompt, length] = json.loads(answer)["choices"][0]["text"]
                callers.seen.outcomes["answered"] += 1
                writer.close()

    async def twice(callers: Callers) -> None:
        await streams(callers, num_streams, 4 * tokens)
        await streams(callers, num_streams, 4 * tokens)

    phase("one at a time", alone)
    seen = phase(f"{num_streams} streams at once, twice", twice)
    if seen.outcomes != {"streamed": 2 * num_streams}:
        wrong.append(f"streams: {seen.outcomes}")
    for again in (0, 1):
        seen = phase(
            f"{num_queued + num_streams + beyond} requests at once, {num_queued + num_streams} fit",
            lambda callers, again=again: queue(callers, num_queued + num_streams, beyond, tokens, seed + again),
        )
        if unknown := set(seen.outcomes) - {"answered", "streamed", "read slowly", "left", "429"}:
            wrong.append(f"queue: {unknown}")
    settled = server.rss()
    if seconds:
        seen = phase(
            f"faults for {seconds / 60:g} minutes",
            lambda callers: faults(callers, seconds, num_streams // 4, tokens, seed, server.order),
        )
        expected = ("answered", "streamed", "read slowly", "left", "400", "500", "stream ended", "broke", "fault")
        if unknown := [one for one in seen.outcomes if not one.startswith(expected)]:
            wrong.append(f"faults: {unknown}")
    phase("one at a time", alone)
    if server.rss() > settled + (32 << 20):
        wrong.append(f"memory grew from {settled} to {server.rss()} bytes")
    server.close()
    return rows, wrong


HEAD = (
    "| phase | seconds | how requests ended | first piece, median / 99 % (ms) | between pieces, median / 99 % (ms) | "
    "server's memory (MiB) |\n|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--folder", type=Path, required=True, help="an empty one")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    rows, wrong = run(
        args.folder,
        num_streams=args.streams,
        num_queued=args.queued,
        seconds=60 * args.minutes,
        tokens=args.tokens,
    )
    for sentence in wrong[:20]:
        print(sentence)
    if args.table is not None:
        command = f"--streams {args.streams} --queued {args.queued} --minutes {args.minutes:g} --tokens {args.tokens}"
        held = "\n".join(f"Did not hold: {sentence}" for sentence in wrong) or (
            "Every answer that ended was the one that the model gives alone; after each phase nothing was open, every "
            "KV block was back and the cache's books were right."
        )
        args.table.write_text(
            f"# The service under load and faults\n\n`python -m tests.launch.load_service {command}`: "
            f"{platform.machine()}, {os.cpu_count()} cores that others used meanwhile, the demo model in fp32 on one "
            f"thread, half of its experts in memory; callers and server share the cores. {held}\n\n"
            + "\n".join([HEAD, *rows])
            + "\n"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
