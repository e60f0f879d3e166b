"""`moe.Client` beside a service of ours."""

import asyncio
import fcntl
import json

import pytest

from moe.client import AsyncClient, Client, ServerError
from tests.launch.serving import PROMPT, batch_lines, idle


def test_our_client(served, right, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(batch_lines(12))
    with Client(served.url) as client:
        assert client.generate(PROMPT, max_tokens=12, temperature=0) == right.text
        assert "".join(client.stream(PROMPT, max_tokens=12, temperature=0)) == right.text
        assert client.chat("Hello", max_tokens=12, temperature=0) == right.chat
        messages = [{"role": "user", "content": "Hello"}]
        assert "".join(client.stream(messages, max_tokens=12, temperature=0)) == right.chat
        with pytest.raises(ServerError, match="400: top_p"):
            client.generate(PROMPT, top_p=9)
        seen = []
        out = tmp_path / "out.jsonl"
        assert client.batch(tmp_path / "in.jsonl", out, at_once=20, on_progress=lambda *p: seen.append(p)) == 1
        assert seen[-1] == (12, 12)
        whole = out.read_bytes()
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]) + b'{"id": "line-')  # killed meanwhile
        client.batch(tmp_path / "in.jsonl", out)
        ids = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]
        assert sorted(ids) == sorted(f"r{i}" for i in range(12))
        with out.open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match="another process is writing"):
                client.batch(tmp_path / "in.jsonl", out)
        (tmp_path / "notes").write_text("mine\n")
        with pytest.raises(ValueError, match="is no result of this input"):
            client.batch(tmp_path / "in.jsonl", tmp_path / "notes")

    async def several():
        async with AsyncClient(served.url) as client:
            texts = await asyncio.gather(*(client.generate(PROMPT, max_tokens=12, temperature=0) for _ in range(3)))
            return texts, [piece async for piece in client.stream(PROMPT, max_tokens=12, temperature=0)]

    async def leaves():
        async def listen(client):
            async for _ in client.stream(PROMPT, max_tokens=900, ignore_eos=True):
                pass

        async with AsyncClient(served.url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(listen(client), 0.3)

    asyncio.run(leaves())  # in the middle of a piece, which another thread waits for
    idle(served)
    texts, pieces = asyncio.run(several())
    assert texts == [right.text] * 3
    assert "".join(pieces) == right.text
    with Client("http://127.0.0.1:9", retries=0) as nobody, pytest.raises(ServerError, match="does not answer"):
        nobody.generate("A")
