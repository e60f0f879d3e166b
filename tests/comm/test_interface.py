"""Over which interface ranks of other machines are reached."""

import os
import socket

import pytest
import torch.distributed as dist

from moe.comm import interface
from moe.comm.interface import choose_interface, interface_towards


def addresses():
    """Of this machine's interfaces that are no loopback, by name."""
    found = interface._v4_interfaces()
    return {name: socket.inet_ntoa(packed) for name, packed in found.items() if packed[0] != 127}


def test_the_interface_that_has_the_address_is_found():
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("localhost") is None
    if not addresses():
        pytest.skip("this machine has no interface but loopback")
    for name, address in addresses().items():
        assert interface_towards(address) == name


@pytest.mark.parametrize(("said", "found"), [(None, "eth7"), ("ib0", "ib0")])
def test_gloo_is_told_unless_somebody_has(said, found, monkeypatch):
    """By whatever prefix the store is reached; a store on this machine says nothing."""
    monkeypatch.setattr(os, "environ", {} if said is None else {"GLOO_SOCKET_IFNAME": said})
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    choose_interface(dist.PrefixStore("a", dist.PrefixStore("b", store)))
    assert os.environ.get("GLOO_SOCKET_IFNAME") == said
    asked = []
    monkeypatch.setattr(interface, "interface_towards", lambda host: asked.append(host) or "eth7")
    choose_interface(dist.PrefixStore("a", dist.PrefixStore("b", store)))
    assert os.environ["GLOO_SOCKET_IFNAME"] == found
    assert asked == ([] if said else ["127.0.0.1"])
