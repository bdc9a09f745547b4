"""The lab's relay forwards what it cannot read, refuses what deployed relays refuse, and remembers every byte."""

from __future__ import annotations

import asyncio
import ssl

import httpx
import pytest
import trustme

from pjv2.backends.system import SystemEntropy
from pjv2.errors import OurMistake
from pjv2.lab.directory import Directory
from pjv2.lab.relay import Relay
from pjv2.wire.mailbox import MailboxReply, MailboxRequest, encapsulate_request, relay_target, short_id
from pjv2.wire.secp import SecretKey

RNG = SystemEntropy()
TYPE = {"Content-Type": "message/ohttp-req"}


@pytest.fixture
async def directory():
    async with Directory(long_poll=0.1) as directory:
        yield directory


@pytest.fixture
async def relay():
    async with Relay() as relay:
        yield relay


@pytest.fixture
async def client():
    async with httpx.AsyncClient(trust_env=False) as client:
        yield client


def mailbox() -> str:
    return short_id(SecretKey.generate(RNG).public)


def envelope(directory, name, method="POST", body=b"hello"):
    return encapsulate_request(directory.url, directory.keys, MailboxRequest(method, name, body), RNG)


async def test_an_envelope_is_carried_to_the_gateway_and_back(client, relay, directory):
    name = mailbox()
    for method, body, expected in (("POST", b"hello", MailboxReply(200)), ("GET", b"", MailboxReply(200, b"hello"))):
        sealed, pending = envelope(directory, name, method, body)
        response = await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
        assert response.status_code == 200
        assert len(response.content) == 8192
        assert response.headers["access-control-allow-origin"] == "*"
        assert pending.open(response.content) == expected


async def test_the_relay_never_sees_a_mailbox_id_and_its_memory_shows_that(client, relay, directory):
    name = mailbox()
    sealed, _ = envelope(directory, name)
    await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
    assert relay.saw(name.encode()) == 0
    assert relay.saw(sealed) == 1
    assert relay.saw(b"message/ohttp-req") == 1
    assert directory.log[-1].mailbox == name


async def test_the_directory_sees_the_relays_address_and_the_relay_the_clients(directory):
    async with (
        Relay(host="127.0.0.3") as relay,
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(local_address="127.0.0.9")) as client,
    ):
        sealed, _ = envelope(directory, mailbox())
        await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
        record = relay.log[-1]
        assert (record.client, record.method, record.target) == ("127.0.0.9", "POST", directory.url)
        assert (record.bytes_in, record.bytes_out, record.status) == (8192, 8192, 200)
        assert {seen.peer for seen in directory.log} == {"127.0.0.3"}


async def test_the_relay_knocks_before_it_forwards_and_remembers_the_answer(client, relay, directory):
    for _ in range(3):
        sealed, _ = envelope(directory, mailbox())
        await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
    assert [record.method for record in directory.log] == ["GET", "POST", "POST", "POST"]


async def test_a_server_that_has_not_opted_in_is_404(client, relay):
    async with Relay() as other:  # any web server that knows nothing of allowed purposes
        response = await client.post(relay_target(relay.url, other.url), content=b"x", headers=TYPE)
    assert response.status_code == 404


async def test_an_unreachable_gateway_is_404_before_it_opted_in_and_502_after(client, relay, directory):
    target = relay_target(relay.url, directory.url)
    directory.offline = True
    assert (await client.post(target, content=b"x", headers=TYPE)).status_code == 404
    directory.offline = False
    assert (await client.post(target, content=b"x", headers=TYPE)).status_code == 400
    directory.offline = True
    assert (await client.post(target, content=b"x", headers=TYPE)).status_code == 502


async def test_a_gateway_of_the_same_operator_is_refused_with_403(client, directory):
    async with Relay(self_loop_tag=directory.self_loop_tag) as own:
        sealed, _ = envelope(directory, mailbox())
        response = await client.post(relay_target(own.url, directory.url), content=sealed, headers=TYPE)
    assert response.status_code == 403


async def test_other_requests_are_refused_with_their_own_status(client, relay, directory):
    target = relay_target(relay.url, directory.url)
    assert (await client.post(target, content=b"x")).status_code == 415
    assert (await client.post(target, content=b"x", headers={"Content-Type": "text/plain"})).status_code == 415
    assert (await client.post(f"{relay.url}/ftp://x/", content=b"x", headers=TYPE)).status_code == 400
    assert (await client.post(f"{target}path", content=b"x", headers=TYPE)).status_code == 400
    assert (await client.post(f"{relay.url}/", content=b"x", headers=TYPE)).status_code == 400
    assert (await client.get(target)).status_code == 405
    assert (await client.get(f"{relay.url}/health")).status_code == 200
    options = await client.options(target)
    assert options.status_code == 204
    assert options.headers["access-control-allow-methods"] == "CONNECT, GET, OPTIONS, POST"


async def test_the_gateways_own_refusals_pass_unchanged(client, relay, directory):
    sealed, _ = envelope(directory, mailbox())
    directory.rotate_keys()
    response = await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/problem+json")


async def test_a_gateway_connection_that_was_closed_while_idle_is_replaced(client, relay, directory):
    target = relay_target(relay.url, directory.url)
    name = mailbox()
    await client.post(target, content=envelope(directory, name)[0], headers=TYPE)
    await directory.restart()
    sealed, pending = envelope(directory, name, "GET", b"")
    response = await client.post(target, content=sealed, headers=TYPE)
    assert pending.open(response.content) == MailboxReply(200, b"hello")


async def test_a_cut_gateway_answer_is_502_and_the_envelope_is_not_sent_again(client, relay, directory):
    directory.cut_after = 20
    sealed, _ = envelope(directory, mailbox())
    response = await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
    assert response.status_code == 502
    assert [record.method for record in directory.log].count("POST") == 1


async def test_connect_tunnels_to_gateways_that_opted_in():
    ca = trustme.CA()
    server, trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    ca.issue_cert("127.0.0.1").configure_cert(server)
    ca.configure_trust(trust)
    async with Directory(ssl_context=server) as directory, Relay(gateway_tls=trust) as relay:
        proxy = httpx.Proxy(relay.url)
        async with httpx.AsyncClient(proxy=proxy, verify=trust, trust_env=False) as client:
            response = await client.get(f"{directory.url}/.well-known/ohttp-gateway")
        assert response.content == directory.keys.encode()
        assert relay.saw(b"ohttp-keys") == 0  # what passed was TLS
    assert (relay.log[-1].method, relay.log[-1].target) == ("CONNECT", directory.url)
    assert relay.log[-1].bytes_out > 74


async def test_connect_is_refused_where_nobody_opted_in(relay, directory):
    directory.offline = True
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        writer.write(f"CONNECT 127.0.0.1:{directory.port} HTTP/1.1\r\n\r\n".encode())
        assert b" 404 " in await reader.readline()
    finally:
        writer.transport.abort()


async def test_a_count_over_forgotten_bytes_is_refused(client, directory):
    async with Relay(memory=1000) as relay:
        sealed, _ = envelope(directory, mailbox())
        await client.post(relay_target(relay.url, directory.url), content=sealed, headers=TYPE)
        with pytest.raises(OurMistake, match="more than it remembers"):
            relay.saw(b"x")


async def test_relay_faults_can_be_switched_on(client, relay, directory):
    target = relay_target(relay.url, directory.url)
    relay.refuse_next(1)
    assert (await client.post(target, content=b"", headers=TYPE)).status_code == 503
    relay.status = 403
    assert (await client.post(target, content=b"", headers=TYPE)).status_code == 403
    relay.status = None
    relay.cut_after = 5
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(target, content=b"", headers=TYPE)
