"""A server in a thread of the test's process, and what tests ask of it."""

import json
import threading
import time

from moe.launch.server import make_app, make_server
from tests.patience import PATIENCE_S, until

PROMPT = "Once upon a time, there was"


def run_server(service, uploads, limits, api_key=None):
    server = make_server(make_app(service, uploads, limits, api_key), limits, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (port,) = {s.getsockname()[1] for one in server.servers for s in one.sockets}

    def stop():
        server.should_exit = True
        thread.join()

    return f"http://127.0.0.1:{port}", stop


def idle(served):
    until(lambda: served.service.stats.open == 0)
    state = served.service.llm.engine.state()
    assert (state.running, state.waiting, state.free_blocks) == (0, 0, state.blocks)


def batch_lines(count):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(count)]
    lines[1] = {**lines[1], "body": {**body, "top_p": 7}}
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def finished(client, batch):
    deadline = time.monotonic() + PATIENCE_S
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch
