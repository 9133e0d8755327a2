"""A switch that forbids network calls."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class NetworkForbidden(RuntimeError):
    """Something tried to leave this machine while that was forbidden."""


@contextmanager
def no_network() -> Iterator[None]:
    """Within it, connecting to anything but this machine raises :class:`NetworkForbidden`, as does ``getaddrinfo``.

    It holds for every thread of the process, and for nothing that does not connect a socket of Python's. Local
    sockets and loopback addresses stay open. As a fixture::

        @pytest.fixture(autouse=True)
        def offline():
            with no_network():
                yield
    """
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _check_address(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _check_address(self, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        _check_host(host)
        return getaddrinfo(host, *args, **options)

    with (
        mock.patch.object(socket.socket, "connect", guarded_connect),
        mock.patch.object(socket.socket, "connect_ex", guarded_connect_ex),
        mock.patch.object(socket, "getaddrinfo", guarded_getaddrinfo),
    ):
        yield


def _check_address(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _check_host(address[0])


def _check_host(host: Any) -> None:
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        if ipaddress.ip_address(name.partition("%")[0]).is_loopback:
            return
    except ValueError:
        pass
    raise NetworkForbidden(f"a network call to {name!r}, and network calls are forbidden here")
