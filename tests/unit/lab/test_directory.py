"""The lab's directory answers as deployed directories do, refusals included."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from pjv2.backends.system import SystemEntropy
from pjv2.lab.directory import MAILBOX_TTL, Directory
from pjv2.wire import bhttp, ohttp
from pjv2.wire.mailbox import MailboxReply, MailboxRequest, encapsulate_request, short_id
from pjv2.wire.ohttp import KEY_PROBLEM_TYPE, KeyConfig
from pjv2.wire.secp import SecretKey

RNG = SystemEntropy()
GATEWAY = "/.well-known/ohttp-gateway"


@pytest.fixture
async def directory():
    async with Directory(long_poll=0.3) as directory:
        yield directory


@pytest.fixture
async def client(directory):
    async with httpx.AsyncClient(base_url=directory.url, trust_env=False) as client:
        yield client


def mailbox() -> str:
    return short_id(SecretKey.generate(RNG).public)


async def ask(client, directory, method, name, body=b"", keys=None) -> MailboxReply:
    request = MailboxRequest(method, name, body)
    envelope, pending = encapsulate_request(directory.url, keys or directory.keys, request, RNG)
    response = await client.post(GATEWAY, content=envelope, timeout=5)
    assert response.status_code == 200
    assert "content-type" not in response.headers
    return pending.open(response.content)


async def raw_inner(client, directory, method, path, authority="x", body=b"") -> httpx.Response:
    padded = bhttp.encode_request(method, "https", authority, path, body, ohttp.PADDED_BHTTP_REQUEST_BYTES, RNG)
    envelope, _ = ohttp.encapsulate(directory.keys, padded, RNG)
    return await client.post(GATEWAY, content=envelope)


async def test_keys_are_served_at_both_addresses(client, directory):
    for path in (GATEWAY, "/ohttp-keys", f"{GATEWAY}?allowed_purposes=1"):
        response = await client.get(path)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/ohttp-keys")
        assert KeyConfig.parse(response.content) == directory.keys
        assert response.headers["access-control-allow-origin"] == "*"


async def test_allowed_purposes_are_45_bytes(client):
    response = await client.get(f"{GATEWAY}?allowed_purposes")
    assert response.headers["content-type"] == "application/x-ohttp-allowed-purposes"
    assert response.content == b"\x00\x01\x2aBIP77 454403bb-9f7b-4385-b31f-acd2dae20b7e"


async def test_health_tells_the_versions(client):
    assert (await client.get("/health")).json() == {"versions": [1, 2]}
    async with Directory(v1=False) as plain, httpx.AsyncClient(base_url=plain.url, trust_env=False) as other:
        assert (await other.get("/health")).json() == {"versions": [2]}


async def test_unknown_paths_are_404(client):
    for method, path in (("GET", "/nothing"), ("DELETE", "/"), ("POST", "/a/b"), ("PUT", f"/{mailbox()}")):
        assert (await client.request(method, path)).status_code == 404


@pytest.mark.parametrize("damage", ["other key", "one bit", "short"])
async def test_an_envelope_that_does_not_open_is_answered_with_a_key_problem(client, directory, damage):
    keys = KeyConfig(1, SecretKey.generate(RNG).public) if damage == "other key" else directory.keys
    envelope, _ = encapsulate_request(directory.url, keys, MailboxRequest("GET", mailbox()), RNG)
    if damage == "one bit":
        envelope = envelope[:-1] + bytes((envelope[-1] ^ 1,))
    if damage == "short":
        envelope = envelope[:-1]
    response = await client.post(GATEWAY, content=envelope)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/problem+json")
    assert response.json() == {"type": KEY_PROBLEM_TYPE, "title": "key identifier unknown"}


async def test_the_first_message_stays_and_can_be_read_again(client, directory):
    name = mailbox()
    for body in (b"first", b"second", b"first"):
        assert await ask(client, directory, "POST", name, body) == MailboxReply(200)
    for _ in range(2):
        assert await ask(client, directory, "GET", name) == MailboxReply(200, b"first")


async def test_a_poll_waits_and_then_answers_202(client, directory):
    assert await ask(client, directory, "GET", mailbox()) == MailboxReply(202)


async def test_other_inner_requests_are_404_inside(client, directory):
    for method, path in (("DELETE", f"/{mailbox()}"), ("GET", "/a/b"), ("GET", "health")):
        padded = bhttp.encode_request(method, "https", "x", path, b"", ohttp.PADDED_BHTTP_REQUEST_BYTES, RNG)
        envelope, opener = ohttp.encapsulate(directory.keys, padded, RNG)
        response = await client.post(GATEWAY, content=envelope)
        assert response.status_code == 200
        assert bhttp.decode_response(opener.open(response.content)).status == 404


async def test_refusals_of_opened_requests_come_back_in_the_open_and_empty(client, directory):
    cases = (
        (await raw_inner(client, directory, "GET", "/tooshort"), 400),
        (await raw_inner(client, directory, "GET", f"/{mailbox().lower()}"), 400),
        (await raw_inner(client, directory, "PUT", f"/{mailbox()}"), 400),
        (await raw_inner(client, directory, "GET", f"/{mailbox()}", authority=""), 500),
    )
    for response, status in cases:
        assert (response.status_code, response.content) == (status, b"")


async def test_a_request_that_is_no_binary_http_is_400(client, directory):
    envelope, _ = ohttp.encapsulate(directory.keys, b"\xff" * ohttp.PADDED_BHTTP_REQUEST_BYTES, RNG)
    assert (await client.post(GATEWAY, content=envelope)).status_code == 400


async def test_bodies_over_64_kib_are_413(client):
    assert (await client.post(GATEWAY, content=bytes(65_537))).status_code == 413
    assert (await client.post(GATEWAY, content=bytes(200_000))).status_code == 413


async def test_the_self_loop_tag_is_refused(client, directory):
    headers = {"x-ohttp-self-loop-tag": directory.self_loop_tag}
    assert (await client.get(GATEWAY, headers=headers)).status_code == 403


async def test_a_full_directory_says_500_to_posts_and_503_to_polls():
    async with (
        Directory(capacity=1, long_poll=0.2) as directory,
        httpx.AsyncClient(base_url=directory.url, trust_env=False) as client,
    ):
        await ask(client, directory, "POST", mailbox(), b"full")
        assert (await raw_inner(client, directory, "POST", f"/{mailbox()}")).status_code == 500
        assert (await raw_inner(client, directory, "GET", f"/{mailbox()}")).status_code == 503


async def test_messages_live_seven_days_by_the_clock():
    now = [1_000_000.0]
    async with (
        Directory(long_poll=0.05, clock=lambda: now[0]) as directory,
        httpx.AsyncClient(base_url=directory.url, trust_env=False) as client,
    ):
        name = mailbox()
        await ask(client, directory, "POST", name, b"x")
        now[0] += MAILBOX_TTL - 1
        assert (await ask(client, directory, "GET", name)).status == 200
        now[0] += 1
        assert (await ask(client, directory, "GET", name)).status == 202
        assert directory.mailboxes == {}


async def test_a_restart_keeps_messages_and_key_and_cuts_waiting_polls(client, directory):
    directory.long_poll = 30.0
    name, keys = mailbox(), directory.keys
    await ask(client, directory, "POST", name, b"kept")
    poll = asyncio.create_task(ask(client, directory, "GET", mailbox()))
    await directory.until_waiting()
    await directory.restart()
    with pytest.raises(httpx.TransportError):
        await poll
    assert directory.keys == keys
    assert await ask(client, directory, "GET", name) == MailboxReply(200, b"kept")


async def test_rotated_keys_keep_the_key_id(client, directory):
    old = directory.keys
    new = directory.rotate_keys()
    assert new != old
    assert new.key_id == old.key_id == 1


async def test_a_stored_message_too_long_to_answer_arrives_cut(client, directory):
    name = mailbox()
    payer = asyncio.create_task(client.post(f"/{name}?v=1", content="A" * 9000, timeout=5))
    envelope, pending = encapsulate_request(directory.url, directory.keys, MailboxRequest("GET", name), RNG)
    response = await client.post(GATEWAY, content=envelope, timeout=5)
    with pytest.raises(Exception, match="ends before"):
        pending.open(response.content)
    await payer


async def test_a_bip78_payer_is_answered_by_a_put(client, directory):
    directory.long_poll = 5.0
    name = mailbox()
    payer = asyncio.create_task(client.post(f"/{name}?v=1&minfeerate=2", content="cHNidP8=", timeout=10))
    got = await ask(client, directory, "GET", name)
    assert got == MailboxReply(200, b"cHNidP8=\nv=1&minfeerate=2")
    assert await ask(client, directory, "GET", name) == MailboxReply(202)  # read once; at once, the payer still waits
    assert (await client.post(f"/{name}", content="cHNidP8=")).status_code == 503  # a second payer
    assert await ask(client, directory, "PUT", name, b"cHJvcG9zYWw=") == MailboxReply(200)
    response = await payer
    assert (response.status_code, response.text) == (200, "cHJvcG9zYWw=")


async def test_a_bip78_payer_who_is_not_answered_gets_503_and_valid_json(client, directory):
    directory.long_poll = 0.05
    response = await client.post(f"/{mailbox()}?v=1", content="cHNidP8=")
    assert response.status_code == 503
    assert json.loads(response.content)["errorCode"] == "unavailable"


async def test_bip78_requests_that_are_wrong_are_refused_with_valid_json(client):
    response = await client.post(f"/{mailbox()}", content=b"\xff\xfe")
    assert (response.status_code, response.json()["errorCode"]) == (400, "original-psbt-rejected")
    async with Directory(v1=False) as plain, httpx.AsyncClient(base_url=plain.url, trust_env=False) as other:
        response = await other.post(f"/{mailbox()}", content="x")
        assert (response.status_code, response.json()) == (
            400,
            {"errorCode": "version-unsupported", "supported": [2], "message": "V1 is not supported"},
        )


async def test_the_log_tells_what_the_directory_knows(client, directory):
    name = mailbox()
    await ask(client, directory, "POST", name, b"x")
    record = directory.log[-1]
    assert (record.method, record.path, record.size, record.status) == ("POST", GATEWAY, 8192, 200)
    assert (record.peer, record.inner_method, record.mailbox) == ("127.0.0.1", "POST", name)


async def test_faults_can_be_switched_on_and_off(client, directory):
    directory.refuse_next(1)
    assert [(await client.post(GATEWAY)).status_code for _ in range(2)] == [503, 400]
    directory.status = 502
    assert (await client.post(GATEWAY)).status_code == 502
    assert (await client.get("/health")).status_code == 200
    directory.status = None
    directory.cut_after = 10
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(GATEWAY)
    directory.cut_after = None
    directory.stall = True
    held = asyncio.create_task(client.get("/health"))
    done, _ = await asyncio.wait({held}, timeout=0.05)
    assert not done
    directory.stall = False
    assert (await held).status_code == 200
    directory.offline = True
    with pytest.raises(httpx.TransportError):  # the connection that was kept alive
        await client.get("/health")
    with pytest.raises(httpx.ConnectError):
        await client.get("/health")
    port = directory.port
    directory.offline = False
    assert (await client.get("/health")).status_code == 200
    assert directory.port == port


async def test_a_directory_can_be_bound_to_another_loopback_address():
    async with Directory(host="127.0.0.2") as directory, httpx.AsyncClient(trust_env=False) as client:
        assert directory.url.startswith("http://127.0.0.2:")
        assert (await client.get(f"{directory.url}/health")).status_code == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"501"),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", b"431"),
    ],
)
async def test_what_is_no_proper_http_is_refused_with_its_own_status(directory, request_bytes, status):
    reader, writer = await asyncio.open_connection("127.0.0.1", directory.port)
    try:
        writer.write(request_bytes)
        writer.write_eof()
        assert (await reader.readline()).split()[1] == status
    finally:
        writer.transport.abort()
