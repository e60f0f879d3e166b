"""A sample of the load on the service, and its own OpenAPI document against what it answers."""

import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seed_of
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from moe.launch.server import Limits
from moe.launch.uploads import Uploads
from moe.llm import LLM
from moe.params import SamplingParams
from moe.service import QueueFull, Service
from tests.launch.load_service import run
from tests.launch.serving import run_server
from tests.moe.moe_cases import TINYMOE, check_whole, config
from tests.moe.test_openai import TEMPLATE, chat_folder
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.heavy


def test_load_and_faults(tmp_path):
    """The whole run is in bench/results/service_load.md."""
    rows, wrong = run(tmp_path, num_streams=32, num_queued=300, seconds=12, tokens=8)
    assert not wrong
    assert len(rows) == 6


def test_ten_thousand_requests_fit_and_the_next_is_429(tmp_path):
    """Nothing is stepped until the queue is full, so that no request can end before."""
    with LLM(TINYMOE, config("1.0", max_tokens=256, max_sequences=4)) as llm:
        service, go_on = Service(llm, max_open=10_000), threading.Event()
        url, stop = run_server(service, Uploads(service, tmp_path), Limits(drain_seconds=1))
        try:
            service._commands.put(go_on.wait)
            params = SamplingParams(max_tokens=4, ignore_eos=True)
            tickets = [service.submit([[1, 2, 3]], params, lambda _: None) for _ in range(10_000)]
            with pytest.raises(QueueFull, match="10000 requests are open"):
                service.submit([[1, 2, 3]], params, lambda _: None)
            refused = httpx.post(f"{url}/v1/completions", json={"model": "tinymoe", "prompt": "A"}, timeout=PATIENCE_S)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "queue_full"
            assert (service.stats.open, service.stats.refused) == (10_000, 2)
        finally:
            go_on.set()
        for ticket in tickets[:-8]:
            service.cancel(ticket)
        deadline = time.monotonic() + PATIENCE_S
        while service.stats.open:
            assert time.monotonic() < deadline, service.stats
            time.sleep(0.01)
        assert all(ticket.num_finished == 1 for ticket in tickets[-8:])
        stop()
        check_whole(llm)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = chat_folder(tmp_path_factory.mktemp("chat"), TEMPLATE + "{% if tools %}<tool_call>{% endif %}")
    # A short context: what is fuzzed may ask for 128 samples of it.
    with LLM(folder, config("1.0", max_tokens=256, max_sequences=64, max_context=12)) as llm:
        service = Service(llm, max_open=64)
        uploads = Uploads(service, tmp_path_factory.mktemp("state"))
        url, stop = run_server(service, uploads, Limits(drain_seconds=1))
        yield SimpleNamespace(url=url, service=service)
        stop()
        check_whole(llm)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.mark.parametrize("seed", range(2))
def test_the_document_and_the_answers_agree(served, seed):
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    seen = set()
    for found in document.get_all_operations():
        operation = found.ok()
        seen.add(f"{operation.method} {operation.path}")

        def ask(case):
            case.call_and_validate(checks=CHECKS, timeout=PATIENCE_S)

        quick = settings(max_examples=25, deadline=None, database=None, derandomize=False)
        quick = settings(quick, suppress_health_check=list(HealthCheck))
        seed_of(seed)(quick(given(case=operation.as_strategy())(ask)))()
    assert len(seen) >= 14
    assert served.service.why_ill is None
