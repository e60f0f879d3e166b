"""Models for tests of commands and of the service, made or served once for each file of tests."""

import shutil
from types import SimpleNamespace

import openai
import pytest

from moe.launch.server import Limits
from moe.launch.uploads import Uploads
from moe.llm import LLM
from moe.params import SamplingParams
from moe.service import Service
from tests.families import tiny_checkpoint
from tests.launch.serving import PROMPT, run_server
from tests.moe.moe_cases import check_whole, config
from tests.moe.test_openai import TEMPLATE, chat_folder


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe") / "model", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def small_copy(small_model, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(small_model, tmp_path / "model")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"), TEMPLATE + "{%- if tools %}{{ ' <tool_call>' }}{%- endif %}")


@pytest.fixture(scope="module")
def chat_llm(chat_model):
    with LLM(chat_model, config("0.5", max_tokens=64, max_sequences=8)) as llm:
        yield llm


@pytest.fixture(scope="module")
def served(chat_llm, tmp_path_factory):
    service = Service(chat_llm, max_open=8)
    uploads = Uploads(service, tmp_path_factory.mktemp("state"))
    url, stop = run_server(service, uploads, Limits(drain_seconds=1))
    yield SimpleNamespace(url=url, service=service, uploads=uploads)
    stop()
    check_whole(chat_llm)


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def right(chat_model):
    """What the model says greedily, from an LLM of its own."""
    with LLM(chat_model, config("1.0")) as llm:
        text = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].outputs[0].text
        chat = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=12))[0].outputs[0].text
    return SimpleNamespace(text=text, chat=chat)
