"""Keys come through CONNECT with TLS inside, also where the relay itself is spoken to over TLS, and through SOCKS5."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from pjv2.backends.mailroom.carrier import CarrierTrouble, Trouble
from pjv2.backends.mailroom.tunnel import (
    DirectDialer,
    FetchRefused,
    SocksDialer,
    SocksProxy,
    fetch_keys_from_loopback,
    fetch_keys_through,
    retry_after,
)
from pjv2.errors import WrongUsage
from pjv2.lab.directory import Directory
from pjv2.lab.relay import Relay


async def fetch(relay, directory, trust, dialer=None, **more):
    return await fetch_keys_through(relay, directory, tls=trust, dialer=dialer or DirectDialer(), isolate="x", **more)


async def test_keys_come_through_tls_inside_tls(tls_world):
    keys = await fetch(tls_world.relays[0].url, tls_world.directory.url, tls_world.trust)
    assert keys == tls_world.directory.keys
    assert tls_world.relays[0].saw(b"ohttp-gateway") == 0  # what we asked was sealed from it


async def test_keys_come_through_a_relay_in_plain_http(tls_world):
    async with Relay(gateway_tls=tls_world.trust) as relay:
        assert await fetch(relay.url, tls_world.directory.url, tls_world.trust) == tls_world.directory.keys


async def test_keys_come_through_socks_names_resolved_there(tls_world, socks):
    relay = tls_world.relays[0]
    socks.route["relay.example.com"] = relay.port
    dialer = SocksDialer(SocksProxy.parse(socks.url))
    keys = await fetch(f"https://relay.example.com:{relay.port}", tls_world.directory.url, tls_world.trust, dialer)
    assert keys == tls_world.directory.keys
    assert socks.asked == [("relay.example.com", relay.port)]
    assert socks.users == ["x"]
    with pytest.raises(CarrierTrouble) as caught:
        await fetch("https://other.example.com", tls_world.directory.url, tls_world.trust, dialer)
    assert caught.value.trouble is Trouble.CONNECT


async def test_a_relay_that_lies_about_the_directory_is_found_out_by_the_certificate(tls_world):
    other = ssl.create_default_context()  # does not trust the directory's certificate
    async with Relay(gateway_tls=tls_world.trust) as relay:
        with pytest.raises(FetchRefused, match="certificate"):
            await fetch(relay.url, tls_world.directory.url, other)


async def test_an_untrusted_relay_is_unreachable(tls_world):
    with pytest.raises(CarrierTrouble) as caught:
        await fetch(tls_world.relays[0].url, tls_world.directory.url, ssl.create_default_context())
    assert caught.value.trouble is Trouble.CONNECT


async def test_a_relay_that_refuses_is_told_apart_from_a_directory_that_does(tls_world):
    relay = tls_world.relays[0]
    relay.status = 503
    with pytest.raises(FetchRefused, match="refused to tunnel") as caught:
        await fetch(relay.url, tls_world.directory.url, tls_world.trust)
    assert (caught.value.by_directory, caught.value.status) == (False, 503)
    relay.status = None
    relay.offline = True
    with pytest.raises(CarrierTrouble) as unreachable:
        await fetch(relay.url, tls_world.directory.url, tls_world.trust)
    assert unreachable.value.trouble is Trouble.CONNECT


async def test_a_silent_relay_is_given_up_after_the_time_allowed(tls_world):
    tls_world.relays[0].stall = True
    with pytest.raises(CarrierTrouble) as caught:
        await fetch(tls_world.relays[0].url, tls_world.directory.url, tls_world.trust, timeout_after=0.2)
    assert caught.value.trouble is Trouble.TIMEOUT


async def test_http_directories_are_never_asked_through_a_relay(trust):
    with pytest.raises(WrongUsage, match="only https"):
        await fetch("http://127.0.0.1:1", "http://127.0.0.1:2", trust)


async def test_a_directory_on_this_machine_is_asked_directly():
    async with Directory() as directory:
        assert await fetch_keys_from_loopback(directory.url) == directory.keys
        directory.offline = True
        with pytest.raises(CarrierTrouble) as caught:
            await fetch_keys_from_loopback(directory.url)
    assert caught.value.trouble is Trouble.CONNECT


async def answered_with(data: bytes):
    """What fetching from a server that answers `data` comes to."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await fetch_keys_from_loopback(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


@pytest.mark.parametrize("form", ["length", "close", "chunked", "informational"])
async def test_every_way_to_delimit_an_answer_is_understood(form):
    async with Directory() as directory:
        keys = directory.keys
    body = keys.encode()
    answers = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: 74\r\n\r\n" + body,
        "close": b"HTTP/1.0 200 OK\r\n\r\n" + body,
        "chunked": (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"40\r\n" + body[:64] + b"\r\na;x=y\r\n" + body[64:] + b"\r\n0\r\n\r\n"
        ),
        "informational": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 74\r\n\r\n" + body,
    }
    assert await answered_with(answers[form]) == keys


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 65603\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(65_603),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10043\r\n" + bytes(65_603),
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
    ],
)
async def test_what_is_no_key_is_the_directorys_refusal(data):
    with pytest.raises(FetchRefused) as caught:
        await answered_with(data)
    assert caught.value.by_directory


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 74\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 40_000,
    ],
)
async def test_what_is_no_http_is_a_broken_connection(data):
    with pytest.raises(CarrierTrouble) as caught:
        await answered_with(data)
    assert caught.value.trouble is Trouble.BROKEN


def test_only_proxies_that_resolve_names_are_taken():
    assert SocksProxy.parse("socks5h://127.0.0.1:9050").url("u") == "socks5h://u:u@127.0.0.1:9050"
    assert SocksProxy.parse("socks5h://[::1]:9050").url("u") == "socks5h://u:u@[::1]:9050"
    for bad in (
        "socks5://127.0.0.1:9050",
        "http://127.0.0.1:8118",
        "socks5h://127.0.0.1",
        "socks5h://u:p@h:1",
        "socks5h://h:x",
    ):
        with pytest.raises(WrongUsage):
            SocksProxy.parse(bad)


def test_retry_after_is_read_in_seconds():
    assert [retry_after(value) for value in ("7", None, "", "Wed, 21 Oct", "-1", "9" * 20)] == [7.0] + [None] * 5
