"""Finds the network interface that routes to another host."""

from __future__ import annotations

import socket

import psutil


def interface_to(host: str) -> str | None:
    """Name of the interface (``eth0``, ``ib0`` …) that routes to ``host`` (IPv4 or IPv6); None if there is no address
    or route.

    No packet is sent: connecting a UDP socket only selects the route.
    """
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue  # no route by this family
            own = _plain(probe.getsockname()[0])
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.family == family and _plain(a.address) == own for a in addresses):
                return name
    return None


def _plain(address: str) -> str:
    """Without the interface of a link-local IPv6 address: ``fe80::1%eth0``."""
    return address.partition("%")[0]
