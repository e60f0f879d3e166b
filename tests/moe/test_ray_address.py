"""Where a Ray cluster is looked for, and what listens there: nobody, something else, or what may be Ray."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray")
from moe.cluster.address import check_owner, ray_address
from moe.cluster.controller import ClusterEngine
from moe.config import EngineConfig
from tests.moe.moe_cases import TINYMOE
from tests.patience import PATIENCE_S


@pytest.mark.parametrize(
    ("address", "of_environment", "note", "found"),
    [
        (None, None, None, "local"),
        ("auto", None, None, "auto"),
        (None, None, "127.0.0.1:9", "local"),  # a cluster of this machine that was killed
        ("auto", None, "127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9: "),
        (None, "127.0.0.1:9", None, "no Ray cluster answers at 127.0.0.1:9: "),
        ("ray://127.0.0.1:9", None, None, "no Ray cluster answers at ray://127.0.0.1:9: "),
        ("ray://[::1]:9", None, None, "no Ray cluster answers at ray://[::1]:9: "),
        ("127.0.0.1:9", "127.0.0.1:8", None, "no Ray cluster answers at 127.0.0.1:9: "),
        ("http://127.0.0.1:9", None, None, "http://127.0.0.1:9"),  # Ray says what is the matter
    ],
)
def test_nobody_is_asked_for_minutes_at_an_address_where_nobody_listens(
    address, of_environment, note, found, monkeypatch, tmp_path
):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", of_environment or "")
    if note is not None:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(note)
    if not found.startswith("no Ray"):
        assert ray_address(address) == found
    else:
        with pytest.raises(ValueError, match=re.escape(found)):
            ray_address(address)


def test_a_cluster_that_is_found_must_be_this_users(tmp_path):
    check_owner(tmp_path, "127.0.0.1:6379")
    if os.getuid() == 0:
        os.chown(tmp_path, 4321, -1)
    others = tmp_path if os.getuid() == 0 else Path("/")
    with pytest.raises(ValueError, match=r"is another user's \(127.0.0.1:6379, of user id (4321|0), .*\(--address 127"):
        check_owner(others, "127.0.0.1:6379")


def test_hosts_are_not_asked_for_through_ray_client(monkeypatch):
    with pytest.raises(ValueError, match=r"through Ray Client \(ray://there:10001\) they cannot: start it on"):
        ClusterEngine(TINYMOE, EngineConfig(), 2, address="ray://there:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://here")
    with pytest.raises(ValueError, match=r"through Ray Client \(ray://here\) they cannot"):
        ClusterEngine(TINYMOE, EngineConfig(), 2)


@contextmanager
def listener(says: bytes | None) -> Iterator[str]:
    """Its address. says: to whoever calls, before it hangs up; None: nothing, and it does not hang up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            caller, _ = server.accept()
            with caller:
                caller.recv(1000)
                if says is not None:
                    caller.sendall(says)
                else:
                    caller.recv(1)  # until the caller hangs up

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is not Ray"),
        (b"", "what listens there is not Ray"),
        (None, "who listens there says nothing for 0.2 s; if it is Ray, see whether its gcs_server runs"),
        (b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\xff\xff", None),  # as an HTTP/2 server begins
    ],
    ids=["http", "hangs up", "silent", "http2"],
)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_listens_may_not_be_ray(says, sentence, scheme):
    with listener(says) as where:
        if sentence is None:
            assert ray_address(scheme + where, 20) == scheme + where
        else:
            with pytest.raises(ValueError, match=re.escape(f"no Ray cluster answers at {scheme}{where}: {sentence}")):
                ray_address(scheme + where, 0.2 if says is None else 20)
