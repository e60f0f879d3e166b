"""Ports for servers that a test starts with a number: nobody gets one in between."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """One that is free and below those that the system gives to whoever connects, or asks for any."""
    given = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(min(10000, given // 2), given)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
