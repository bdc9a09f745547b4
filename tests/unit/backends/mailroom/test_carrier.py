"""Either client carries one POST once: no redirects, cookies, decompression or second tries, and says how far it came."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

from pjv2.backends.mailroom.carrier import CarrierTrouble as Failed
from pjv2.backends.mailroom.carrier import HttpxCarrier, ReqwestCarrier, Trouble, read_ca_file
from pjv2.errors import WrongUsage

TYPE = {"Content-Type": "message/ohttp-req"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def canned(answer: bytes | None, *, hold: bool = False):
    """A server that answers every request with the same bytes; yields its URL and the requests it saw."""
    seen: list[bytes] = []
    held = asyncio.Event()
    tasks: set[asyncio.Task] = set()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                seen.append(head + await reader.readexactly(length))
                if hold:
                    await held.wait()
                if answer is None or not answer.startswith(b"HTTP"):
                    return
                writer.write(answer)
                await writer.drain()
                if b"short" in answer:
                    return
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        held.set()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(params=["pyreqwest", "httpx"])
async def carrier(request):
    if request.param == "pyreqwest":
        carrier = ReqwestCarrier()
        yield carrier
        await carrier.close()
    else:
        async with httpx.AsyncClient(
            trust_env=False, headers={"X-App": "1"}, cookies={"app": "1"}, follow_redirects=True, auth=("a", "b")
        ) as client:
            yield HttpxCarrier(client)


async def test_a_post_arrives_once_with_its_body_and_nothing_that_tells_clients_apart(carrier):
    async with canned(OK) as (url, seen):
        answer = await carrier.post(f"{url}/https://payjo.in/", TYPE, b"envelope", 5)
    assert (answer.status, answer.body) == (200, b"ok")
    assert len(seen) == 1
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /https://payjo.in/ HTTP/1.1\r\n")
    assert body == b"envelope"
    assert b"content-type: message/ohttp-req" in head.lower()
    for telling in (b"cookie", b"authorization", b"x-app", b"python", b"referer", b"accept-encoding: gzip"):
        assert telling not in head.lower()


async def test_redirects_are_not_followed(carrier):
    async with canned(OK) as (other, seen_other):
        redirect = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {other}/\r\nContent-Length: 0\r\n\r\n".encode()
        async with canned(redirect) as (url, seen):
            answer = await carrier.post(url, TYPE, b"x", 5)
    assert answer.status == 307
    assert len(seen) == 1
    assert seen_other == []


async def test_cookies_are_not_sent_back(carrier):
    async with canned(b"HTTP/1.1 200 OK\r\nSet-Cookie: who=me\r\nContent-Length: 2\r\n\r\nok") as (url, seen):
        for _ in range(2):
            await carrier.post(url, TYPE, b"x", 5)
    assert b"who=me" not in seen[1]


async def test_nothing_is_decompressed(carrier):
    async with canned(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b") as (url, _):
        assert (await carrier.post(url, TYPE, b"x", 5)).body == b"\x1f\x8b"


async def test_an_answer_is_read_one_byte_beyond_its_limit_and_no_further(carrier):
    async with canned(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1_000_000)) as (url, _):
        assert len((await carrier.post(url, TYPE, b"x", 5)).body) == 8193


async def test_header_names_come_in_lower_case(carrier):
    async with canned(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n") as (url, _):
        answer = await carrier.post(url, TYPE, b"x", 5)
    assert (answer.status, answer.headers["retry-after"]) == (503, "7")


async def test_a_closed_port_is_told_as_unreachable(carrier):
    async with canned(OK) as (url, _):
        pass
    with pytest.raises(Failed) as caught:
        await carrier.post(url, TYPE, b"x", 5)
    assert caught.value.trouble is Trouble.CONNECT


async def test_silence_is_told_as_a_timeout(carrier, monkeypatch):
    monkeypatch.setattr("pjv2.backends.mailroom.carrier.CONNECT_TIMEOUT", 0.1)
    async with canned(OK, hold=True) as (url, seen):
        with pytest.raises(Failed) as caught:
            await carrier.post(url, TYPE, b"x", 0.1)
    assert caught.value.trouble is Trouble.TIMEOUT
    assert len(seen) == 1


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"])
async def test_a_connection_cut_in_the_middle_is_told_as_broken_and_not_tried_again(carrier, answer):
    async with canned(answer) as (url, seen):
        with pytest.raises(Failed) as caught:
            await carrier.post(url, TYPE, b"x", 5)
    assert caught.value.trouble is Trouble.BROKEN
    assert len(seen) == 1


async def test_proxies_of_the_environment_are_ignored(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    carrier = ReqwestCarrier()
    async with canned(OK) as (url, _):
        assert (await carrier.post(url, TYPE, b"x", 5)).status == 200
    await carrier.close()


async def test_an_extra_trust_root_is_trusted_and_without_it_nobody_is(tls_world):
    url = tls_world.relays[0].url
    trusting, plain = ReqwestCarrier(ca_file=tls_world.ca_file), ReqwestCarrier()
    assert (await trusting.post(f"{url}/nowhere", TYPE, b"x", 5)).status == 400
    with pytest.raises(Failed) as caught:
        await plain.post(url, TYPE, b"x", 5)
    assert caught.value.trouble is Trouble.CONNECT
    await trusting.close()
    await plain.close()


async def test_a_closed_httpx_client_is_the_applications_mistake():
    client = httpx.AsyncClient(trust_env=False)
    await client.aclose()
    with pytest.raises(WrongUsage, match="closed"):
        await HttpxCarrier(client).post("http://127.0.0.1:9/", TYPE, b"x", 1)


def test_a_ca_file_that_holds_no_certificate_is_refused(tmp_path):
    with pytest.raises(WrongUsage, match="cannot be read"):
        read_ca_file(tmp_path / "none.pem")
    (tmp_path / "bad.pem").write_text("hello")
    with pytest.raises(WrongUsage, match="no certificate"):
        read_ca_file(tmp_path / "bad.pem")
