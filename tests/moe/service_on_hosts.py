"""A service on hosts of a cluster, and what its callers see of losses there: for tests/moe/test_cluster.py, which has a
cluster."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray

from moe.cluster.remote import RemoteEngine
from moe.cluster.resident import Controllers
from moe.launch.cli import _parser, main
from moe.launch.options import engine_config
from moe.launch.serve import loaded
from moe.launch.server import Limits
from moe.launch.uploads import Uploads
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.plan import Plan
from moe.service import Service
from tests.launch.serving import run_server
from tests.moe.ray_session import DEMO, SETTINGS, config_of, until
from tests.patience import PATIENCE_S


def check_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Callers see the loss of a host, of the controller and a change of the number of hosts as a pause."""
    prompt, length = "Once upon a time, there was", 150
    with LLM(DEMO, config_of("max_context=256")) as alone:
        right = alone.generate(prompt, SamplingParams(max_tokens=length, ignore_eos=True))[0].outputs[0].text
    settings = [f"--set={one}" for one in (*SETTINGS, "max_context=256", "cluster.room_s=5", "cluster.answer_s=15")]
    settings.append("--set=cluster.cpus_per_host=1")
    args = _parser().parse_args(["serve", str(DEMO), "--hosts", "2", "--controller", "test", *settings])
    with loaded(args, engine_config(args)) as llm:
        service = Service(llm)
        url, stop = run_server(service, Uploads(service, tmp_path), Limits(drain_seconds=1))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

        def streamed(fault: Callable[[], Any]) -> str:
            text = ""
            ask = {"prompt": prompt, "max_tokens": length, "extra_body": {"ignore_eos": True}, "stream": True}
            stream = client.completions.create(model="tinymoe", temperature=0, **ask)
            for number, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if number == 10:
                    fault()
            return text

        def kill_one() -> None:
            os.kill(llm.engine.status().hosts[0].pid, signal.SIGKILL)

        def serving() -> int:
            return sum(host.what == "serves" for host in llm.engine.status().hosts)

        def stop_controller() -> None:
            children = psutil.Process().children(recursive=True)  # zombies have no command line
            alive = [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
            (controller,) = [one for one in alive if "".join(one.cmdline()).startswith("ray::Controller")]
            controller.suspend()

        assert streamed(lambda: None) == right
        assert streamed(kill_one) == right
        for number in (3, 2):
            assert streamed(partial(main, ["ray", "scale", str(number), "--controller", "test"])) == right
            assert serving() == number
        assert main(["ray", "scale", "40", "--controller", "test"]) == 2
        assert "40 hosts would share 16 experts" in capsys.readouterr().err
        assert main(["ray", "scale", "16", "--controller", "test"]) == 2
        said = capsys.readouterr().err  # the bundle of the host that left may be one that fits
        assert re.search(r"16 hosts do not serve, (2 do or will: .* for 14|3 do or will: .* for 13) bundles", said)
        assert main(["ray", "scale", "2", "--controller", "test"]) == 0
        assert main(["ray", "status", "--controller", "test"]) == 0
        assert "tinymoe: serving, generation" in capsys.readouterr().out
        assert httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.count("lost_hosts") > 0
        live = httpx.get(f"{url}/live", timeout=PATIENCE_S).json()
        assert (live["slots"] >= 64, len(live["plan"]), len(live["events"]) > 3) == (True, 6, True)  # by loaded shares
        with client.completions.create(model="tinymoe", prompt=prompt, max_tokens=200, stream=True) as stream:
            next(iter(stream))
        deadline = time.monotonic() + PATIENCE_S
        while llm.engine.status().counts.open_requests:
            assert time.monotonic() < deadline
        before, plan = llm.engine._actor, llm.engine.plan.hosted
        assert (plan != Plan.contiguous(*plan.shape).hosted).any(), "hosts that came and went have changed it"
        assert streamed(lambda: ray.kill(before)) == right
        assert (llm.engine.plan.hosted == plan).all(), "the successor begins with the plan as it was"
        assert streamed(stop_controller) == right
        assert (llm.engine.plan.hosted == plan).all(), "of one that was stopped, too"
        with pytest.raises(SystemExit, match="2"):
            main(["ray", "scale", "0", "--controller", "test"])
        copy = shutil.copytree(DEMO, tmp_path / "other")
        with pytest.raises(ValueError, match=r"the controller 'test' serves .*tinymoe, not .*other"):
            RemoteEngine(copy, engine_config(args), 2, Controllers("test"))
        # A server that was lost without a word leaves its controller; the next one takes it over.
        other = RemoteEngine(DEMO, engine_config(args), 2, Controllers("test"))
        request = other.add_request([5, 6, 7], SamplingParams(max_tokens=24))
        until(other, lambda: request.finish_reason is not None)
        with pytest.raises(openai.InternalServerError, match="another server has taken"):
            client.completions.create(model="tinymoe", prompt=prompt)
        stop()
    assert main(["ray", "status", "--controller", "test"]) == 0  # it is the other's
    other.close()
    assert main(["ray", "status", "--controller", "test"]) == 2
    with pytest.raises(ValueError, match="Ray has no room"):
        RemoteEngine(DEMO, config_of("cluster.cpus_per_host=50", "cluster.room_s=2"), 2, Controllers("test"))
    assert main(["ray", "stop", "--controller", "test"]) == 2
