"""The network interface over which this machine reaches the others.

gloo by itself listens on the address that the machine's own name has, which many distributions map to 127.0.1.1: ranks
of other machines are then told to connect to themselves.
"""

import fcntl
import os
import socket
import struct
from ipaddress import ip_address
from pathlib import Path

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def choose_interface(store: Store) -> None:
    """Has gloo listen where this machine reaches the server of the store from, unless somebody has said where."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if _VARIABLE not in os.environ and isinstance(store, TCPStore):
        name = interface_towards(store.host)
        if name is not None:
            os.environ[_VARIABLE] = name


def interface_towards(host: str) -> str | None:
    """None for this machine by a loopback address, and where no interface has the address. Sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own = ip_address(probe.getsockname()[0].partition("%")[0])
    if own.is_loopback:
        return None
    found = (_v4_interfaces() if own.version == 4 else _v6_interfaces()).items()
    return next((name for name, packed in found if packed == own.packed), None)


def _v4_interfaces() -> dict[str, bytes]:
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                question = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, question)  # no limit: the kernel answers from its tables
            except OSError:  # it has no such address
                continue
            found[name] = answer[20:24]
    return found


def _v6_interfaces() -> dict[str, bytes]:
    lines = Path("/proc/net/if_inet6").read_text().splitlines()
    return {line.split()[5]: bytes.fromhex(line.split()[0]) for line in lines}
