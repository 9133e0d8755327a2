"""The switch that forbids network calls."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request

import pytest

from popi.testing import NetworkForbidden, no_network


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "2001:db8::1"])
def test_what_is_not_this_machine_is_forbidden(host: str) -> None:
    with no_network():
        with pytest.raises(NetworkForbidden, match=host):
            socket.create_connection((host, 80), timeout=1)
        with pytest.raises(NetworkForbidden, match=host):
            socket.getaddrinfo(host, 80)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as sock, pytest.raises(NetworkForbidden):
            sock.connect_ex((host, 80))


def test_libraries_and_threads_are_held_to_it() -> None:
    caught: list[Exception] = []

    def call() -> None:
        try:
            urllib.request.urlopen("http://192.0.2.1/", timeout=1)
        except NetworkForbidden as error:
            caught.append(error)

    with no_network():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(caught) == 1


async def test_asyncio_is_held_to_it() -> None:
    with no_network(), pytest.raises(NetworkForbidden):
        await asyncio.open_connection("example.org", 80)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_stays_open(host: str) -> None:
    with (
        no_network(),
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection((host, server.getsockname()[1]), timeout=5) as client,
    ):
        assert client.getpeername()[0] == "127.0.0.1"


def test_the_switch_goes_back() -> None:
    before = (socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo)
    with pytest.raises(KeyError), no_network():
        raise KeyError
    assert (socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo) == before
