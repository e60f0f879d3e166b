"""Where a Ray cluster is, and whether one answers there: Ray itself asks for minutes."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # what `ray status` asks with

from moe.cluster.policy import first_sentence

log = logging.getLogger(__name__)

_REACH_S = 5.0
_ANSWER_S = 10.0
_CLIENT = "ray://"
_CLIENT_PORT = "10001"  # where Ray Client listens if nothing else is said
_TOKEN = "if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
# Ray speaks gRPC, which begins as HTTP/2 does (RFC 9113, 3.4): each side at once with a frame of SETTINGS.
_SETTINGS = b"\x04"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)


def connect_ray(address: str | None) -> bool:
    """Whether this call did it. Raises ValueError if there is no cluster at `address`, or none can be started; one that
    was found on this machine (None, "auto") must be this user's."""
    if ray.is_initialized():
        return False
    told, address = _told(address), ray_address(address)
    if told:
        check_token(told)
    try:
        context: Any = ray.init(
            address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
    except Exception as error:  # of any kind: Ray has none of its own for this
        if address == "local":
            raise ValueError(f"Ray does not start on this machine: {first_sentence(error)}") from None
        raise ValueError(
            f"no Ray cluster answers at {told or 'this machine'}: {first_sentence(error)}; {_TOKEN}"
        ) from None
    if not told and address != "local":
        found = context.address_info
        try:
            check_owner(Path(found["session_dir"]), found["gcs_address"])
        except BaseException:
            ray.shutdown()
            raise
        log.warning("uses the Ray cluster at %s, which was found on this machine", found["gcs_address"])
    return True


def check_owner(session: Path, where: str) -> None:
    """Raises ValueError if the session's folder, and so the cluster at `where`, is another user's."""
    if (owner := session.stat().st_uid) != os.getuid():
        raise ValueError(
            f"the Ray cluster that was found on this machine is another user's ({where}, of user id {owner}, you are "
            f"{os.getuid()}): give its address to use it all the same (--address {where}), or start your own"
        )


def check_token(where: str) -> None:
    """Raises ValueError if Ray at this host and port refuses this process; `ray.init` would ask for half a minute."""
    if "/" in where or not where.rpartition(":")[2].isdigit():
        return
    try:
        GcsClient(address=where)
    except ray.exceptions.RayError as error:
        raise ValueError(f"the Ray cluster at {where} refuses this process: {error.args[0]}; {_TOKEN}") from None


def ray_address(address: str | None, answer_s: float = _ANSWER_S) -> str | None:
    """What to connect to, as `ray.init` takes it, where Ray answers. None becomes "local", a new cluster, if Ray has
    noted none of this machine, or that one does not answer: it may have been killed. Raises ValueError."""
    # Not the address that is noted: Ray gives a token of this user's to a cluster alone that it has found itself.
    told = _told(address)
    where = told or noted_address()
    if not where:
        return address or "local"
    host, _, port = where.removeprefix(_CLIENT).rpartition(":")
    if where.startswith(_CLIENT) and not host:
        host, port = port, _CLIENT_PORT
    if not port.isdigit() or "/" in host:
        return address  # of no form that we know: Ray says what is the matter
    try:
        why = _why_not_ray(host.strip("[]"), int(port), answer_s)
    except (OSError, OverflowError, UnicodeError) as error:
        why = str(error)
    if why is None:
        return address
    if address is None and not told:
        return "local"
    raise ValueError(f"no Ray cluster answers at {where}: {why}")


def check_inside(address: str | None) -> None:
    """Raises ValueError for Ray Client's address: its process is in no cluster, and hosts could not call it."""
    if (_told(address) or "").startswith(_CLIENT):
        raise ValueError(
            f"hosts call the process that asks for them, and through Ray Client ({_told(address)}) they cannot: start "
            "it on a machine of the cluster, or by `ray job submit`"
        )


def _told(address: str | None) -> str | None:
    return os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address


def noted_address() -> str | None:
    """Of this machine's last cluster, from the file that the documentation of `ray.init` names."""
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    note = Path(folder, "ray", "ray_current_cluster")
    return note.read_text().strip() if note.exists() else None


def _why_not_ray(host: str, port: int, answer_s: float) -> str | None:
    """None where it may be Ray. Raises OSError if nobody listens."""
    with socket.create_connection((host, port), timeout=_REACH_S) as line:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return None  # it answers those alone who have its certificate
        line.settimeout(answer_s)
        line.sendall(_PREFACE)
        try:
            with line.makefile("rb") as said:
                frame = said.read(9)
        except TimeoutError:
            return f"who listens there says nothing for {answer_s:g} s; if it is Ray, see whether its gcs_server runs"
    return None if frame[3:4] == _SETTINGS else "what listens there is not Ray"
