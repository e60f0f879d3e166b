"""Files and batches of the service."""

import json
import pkgutil
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from moe.batch import result_line, run_batch
from moe.launch.uploads import Uploads, _newest_first
from moe.llm import LLM
from tests.launch.serving import batch_lines, finished, idle
from tests.moe.moe_cases import config
from tests.moe.test_batch_files import file_size_limit
from tests.patience import PATIENCE_S, until


def test_files_and_batches_by_the_official_client(client, right):
    file = client.files.create(file=("in.jsonl", batch_lines(20)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = finished(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 19, 1)
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(r["custom_id"] for r in results) == sorted(f"r{i}" for i in range(20) if i != 1)
    assert {r["response"]["body"]["choices"][0]["text"] for r in results} == {right.text}
    (failed,) = (json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines())
    assert "top_p" in failed["error"]["message"]
    assert batch.id in [b.id for b in client.batches.list()]
    assert {file.id, batch.output_file_id} <= {f.id for f in client.files.list()}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError, match="there is no file"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def test_lists_come_in_pages(served, client):
    mine = [client.files.create(file=(f"{i}.jsonl", batch_lines(2)), purpose="batch").id for i in range(3)]
    page = client.files.list(limit=2)
    assert len(page.data) == 2
    assert page.has_more
    assert [f.id for f in page] == [f.id for f in client.files.list()]  # the client asks for the pages that follow
    assert set(mine) <= {f.id for f in page}
    assert not client.files.list(limit=2, after=[f.id for f in page][-2]).has_more
    assert [f.id for f in page if f.id in mine] == mine[::-1], "the newest first, within a second, too"
    assert [f.id for f in client.files.list(limit=2, order="asc")] == [f.id for f in page][::-1]
    assert set(mine) <= {f.id for f in client.files.list(limit=1, purpose="batch")}
    assert not set(mine) & {f.id for f in client.files.list(purpose="batch_output")}
    for one in client.files.list(limit=1):  # each page comes after one that is deleted by then
        if one.id in mine:
            client.files.delete(one.id)
    assert not set(mine) & {f.id for f in client.files.list()}
    with httpx.Client(base_url=served.url, timeout=PATIENCE_S) as http:
        for path in ("files", "batches"):
            for query in (
                "limit=0",
                "limit=-1",
                "limit=abc",
                "limit=",
                "limit=99999999999999999999",
                "after=none",
                "order=up",
            ):
                refused = http.get(f"/v1/{path}?{query}")
                assert refused.status_code == 400, (path, query)
                assert refused.json()["error"]["param"] == query.split("=")[0]
        assert http.get("/v1/batches?limit=101").status_code == 400


def test_a_file_that_is_deleted_while_all_are_listed(served, client):
    class Folder:
        def glob(self, pattern):
            return [
                *(served.uploads.folder / "files").glob(pattern),
                served.uploads.folder / "files" / "file-gone.json",
            ]

    kept = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    assert kept.id in [record["id"] for record in _newest_first(Folder())]
    with httpx.Client(base_url=served.url, timeout=PATIENCE_S) as http:
        assert http.get(f"/v1/files/{'a' * 300}").status_code == 404  # longer than a name may be


def test_a_batch_whose_file_was_deleted(tmp_path):
    uploads = Uploads(None, tmp_path)
    uploads.close()
    file = uploads.add_file("in.jsonl", "batch", batch_lines(2))
    body = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file["id"]}
    batch = uploads.add_batch(body)
    uploads.delete_file(file["id"])
    uploads = Uploads(None, tmp_path)  # as after a restart
    until(lambda: uploads.batch(batch["id"])["status"] == "failed")
    found = uploads.batch(batch["id"])
    assert found["errors"]["data"][0]["message"] == f"the file {file['id']} was deleted before the batch had ended"
    uploads.close()


def test_lists_keep_their_order_when_the_clock_is_set_back(tmp_path, monkeypatch):
    hour, real = 3600 * 10**9, time.time_ns
    uploads = Uploads(None, tmp_path)
    uploads.close()
    first = uploads.add_file("1.jsonl", "batch", b"{}")["id"]
    monkeypatch.setattr(time, "time_ns", lambda: real() - hour)
    second = uploads.add_file("2.jsonl", "batch", b"{}")["id"]
    again = Uploads(None, tmp_path)  # as after a restart
    again.close()
    third = again.add_file("3.jsonl", "batch", b"{}")["id"]
    assert [record["id"] for record in again.files()] == [third, second, first]


def test_a_name_that_is_used_twice_and_a_file_that_is_no_utf8(served, client):
    """As batch files have it: the second line of the name is refused; what is split at wrong bytes is not begun."""
    lines = batch_lines(4).replace(b'"r3"', b'"r2"')
    failed = {}
    for name, content in {"twice": lines, "utf16": lines.decode().encode("utf-16")}.items():
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        failed[name] = finished(client, batch)
    assert (failed["twice"].request_counts.completed, failed["twice"].request_counts.failed) == (2, 2)
    assert "custom_id 'r2' was used by line 3" in client.files.content(failed["twice"].error_file_id).text
    assert failed["utf16"].status == "failed"
    assert "UTF-8 is wanted" in failed["utf16"].errors.data[0].message
    idle(served)


def test_a_batch_of_the_service_says_what_a_file_does(served, client, chat_llm, tmp_path):
    body = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0, "logprobs": 1, "prompt_logprobs": 1, "n": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    content = json.dumps(line).encode() + b"\n"
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    (said,) = client.files.content(finished(client, batch).output_file_id).text.splitlines()
    idle(served)
    (tmp_path / "in.jsonl").write_bytes(content)
    with LLM(chat_llm.engine.blueprint.folder, config("1.0")) as alone:
        run_batch(alone, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    one, other = (json.loads(text)["response"]["body"] for text in (said, (tmp_path / "out.jsonl").read_text()))
    assert [c.keys() for c in one["choices"]] == [c.keys() for c in other["choices"]]
    assert one["choices"][0]["prompt_logprobs"] == other["choices"][0]["prompt_logprobs"] != None  # noqa: E711
    assert [c["text"] for c in one["choices"]] == [c["text"] for c in other["choices"]]


@pytest.mark.parametrize("where", ["moe.llm.LLM.completion", "moe.launch.uploads.result_line"])
def test_what_fails_in_making_a_result_is_its_own(served, client, monkeypatch, where):
    module, _, name = where.rpartition(".")
    whole, calls = pkgutil.resolve_name(where), []

    def fail_once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise RecursionError("deep inside")
        return whole(*given)

    monkeypatch.setattr(pkgutil.resolve_name(module), name, fail_once)
    file = client.files.create(file=("in.jsonl", batch_lines(6)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = finished(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 4, 2)
    assert "deep inside" in client.files.content(batch.error_file_id).text
    idle(served)


def test_a_batch_that_cannot_be_worked_off_is_failed_and_the_next_is_served(served, client, monkeypatch):
    def fail(self, batch):
        monkeypatch.undo()
        raise KeyError("a fault of ours")

    monkeypatch.setattr(Uploads, "_work_off", fail)
    file = client.files.create(file=("in.jsonl", batch_lines(3)), purpose="batch")
    first, second = (
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        for _ in range(2)
    )
    assert {finished(client, first).status, finished(client, second).status} == {"failed", "completed"}


def test_what_is_finished_when_a_disk_is_full_can_be_fetched(served, client, right):
    file = client.files.create(file=("in.jsonl", batch_lines(30)), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    with file_size_limit(4000):
        batch = finished(client, client.batches.create(**asked))
    assert batch.status == "failed"
    assert "File too large: what is finished is in the files of this batch" in batch.errors.data[0].message
    idle(served)  # what was on its way was dropped
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {r["response"]["body"]["choices"][0]["text"] for r in results} == {right.text}
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (30, len(results), 1)
    assert 1 <= len({r["custom_id"] for r in results}) == len(results) < 29
    assert "top_p" in client.files.content(batch.error_file_id).text
    assert client.files.retrieve(batch.output_file_id).bytes == len(client.files.content(batch.output_file_id).content)
    kept = served.uploads.folder / "batches" / f"{batch.id}.jsonl"
    for id in (batch.output_file_id, batch.error_file_id):
        assert kept.exists()
        client.files.delete(id)
    assert not kept.exists()


def is_locked(path):
    """Told without a try, which the server would meet."""
    return f":{path.stat().st_ino} 0 EOF" in Path("/proc/locks").read_text()


def test_a_batch_goes_on_when_there_is_room_again(served, client, monkeypatch):
    """Not even its record could be written."""
    calls, begun, is_full = [], threading.Event(), threading.Event()

    def waits(*given):
        calls.append(given)
        if len(calls) == 3:
            begun.set()
            assert is_full.wait(PATIENCE_S)
        return result_line(*given)

    monkeypatch.setattr("moe.launch.uploads.result_line", waits)
    file = client.files.create(file=("in.jsonl", batch_lines(200)), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = client.batches.create(**asked)
    assert begun.wait(PATIENCE_S)
    results = served.uploads.folder / "batches" / f"{batch.id}.jsonl"
    with file_size_limit(10):
        is_full.set()
        until(lambda: not is_locked(results))  # the server lets go of it for a second
        assert client.batches.retrieve(batch.id).status == "in_progress"
    batch = finished(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 199, 1)
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(r["custom_id"] for r in results) == sorted(f"r{i}" for i in range(200) if i != 1)
    assert len([f for f in client.files.list() if f.filename.startswith(batch.id)]) == 2


def test_a_batch_is_cancelled(served, client):
    lines = batch_lines(2000).replace(b'"max_tokens": 12', b'"ignore_eos": true, "max_tokens": 900')  # many minutes
    file = client.files.create(file=("in.jsonl", lines), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    client.batches.cancel(batch.id)
    assert finished(client, batch).status == "cancelled"
    idle(served)


@pytest.mark.parametrize("said", ["{", "[]", "{}"])
def test_a_file_that_is_no_record_is_named(tmp_path, said):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine.json").write_text(said)
    with pytest.raises(ValueError, match=r"mine.json .*is no record of this server.* move it away"):
        Uploads(None, tmp_path)
