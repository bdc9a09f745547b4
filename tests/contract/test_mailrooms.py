"""One contract for every mailroom: in memory, and over HTTP with either client, against the lab's directory and two relays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import pytest

from pjv2.backends.mailroom import HttpMailroom
from pjv2.errors import NotNow
from pjv2.lab.directory import Directory
from pjv2.lab.relay import Relay
from pjv2.testing.check_mailroom import CHECKS, Check, ContractBroken, MailroomWorld, check_mailroom
from pjv2.testing.memory_mailroom import MemoryMailroom
from pjv2.wire.mailbox import MailboxRequest

LONG_POLL = 0.4


@asynccontextmanager
async def in_memory() -> AsyncIterator[MailroomWorld]:
    mailroom = MemoryMailroom(long_poll=LONG_POLL)

    async def rotate() -> None:
        mailroom.rotate_keys()

    async def set_offline(value: bool) -> None:
        mailroom.offline = value

    yield MailroomWorld(mailroom, LONG_POLL, len(mailroom.relays), rotate, set_offline)


@asynccontextmanager
async def over_http(http: httpx.AsyncClient | None, relays: int = 2) -> AsyncIterator[MailroomWorld]:
    async with Directory(long_poll=LONG_POLL) as directory, Relay() as first, Relay() as second:
        urls = [first.url, second.url][:relays]
        mailroom = HttpMailroom(urls, [directory.url], http=http, poll_timeout=10.0)

        async def rotate() -> None:
            directory.rotate_keys()

        async def set_offline(value: bool) -> None:
            directory.offline = value

        try:
            yield MailroomWorld(mailroom, LONG_POLL, relays, rotate, set_offline)
        finally:
            await mailroom.close()


@asynccontextmanager
async def over_pyreqwest() -> AsyncIterator[MailroomWorld]:
    async with over_http(None) as world:
        yield world


@asynccontextmanager
async def over_pyreqwest_with_one_relay() -> AsyncIterator[MailroomWorld]:
    async with over_http(None, relays=1) as world:
        yield world


@asynccontextmanager
async def over_httpx() -> AsyncIterator[MailroomWorld]:
    async with httpx.AsyncClient(trust_env=False) as client, over_http(client) as world:
        yield world


@pytest.mark.parametrize("make", [in_memory, over_pyreqwest, over_pyreqwest_with_one_relay, over_httpx])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_every_mailroom_keeps_the_contract(
    check: Check, make: Callable[[], AbstractAsyncContextManager[MailroomWorld]]
) -> None:
    async with make() as world:
        await check(world)


async def test_the_whole_contract_can_be_run_in_one_call() -> None:
    await check_mailroom(in_memory)


class _Forgetful(MemoryMailroom):
    """Breaks one law: reading takes the message away."""

    async def _handle(self, request):
        reply = await super()._handle(request)
        if request.method == "GET":
            self.prune(request.short_id)
        return reply


async def test_the_contract_notices_a_mailroom_that_forgets_what_was_read() -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[MailroomWorld]:
        yield MailroomWorld(_Forgetful(long_poll=LONG_POLL), LONG_POLL, 2)

    with pytest.raises(ContractBroken, match="read again"):
        await check_mailroom(make)


SESSION = "ab" * 16
MAILBOX = "TXJCGKTKXLUUZ"


async def test_the_fake_fails_before_or_after_the_effect_as_told() -> None:
    mailroom = MemoryMailroom()
    post = MailboxRequest("POST", MAILBOX, b"x")
    mailroom.fail_next(1)
    with pytest.raises(NotNow, match="told to fail"):
        await mailroom.exchange(mailroom.url, mailroom.keys, post, session=SESSION)
    assert mailroom.mailboxes == {}
    mailroom.lose_replies(1)
    with pytest.raises(NotNow, match="lose the answer"):
        await mailroom.exchange(mailroom.url, mailroom.keys, post, session=SESSION)
    assert mailroom.mailboxes == {MAILBOX: b"x"}
    assert (await mailroom.exchange(mailroom.url, mailroom.keys, post, session=SESSION)).reply.status == 200
    assert [(record.method, record.mailbox) for record in mailroom.log] == [("POST", MAILBOX)] * 2
    mailroom.prune(MAILBOX)
    assert mailroom.mailboxes == {}


async def test_the_fake_holds_everything_while_it_stalls() -> None:
    mailroom = MemoryMailroom()
    mailroom.stall = True
    held = asyncio.create_task(mailroom.directory())
    await asyncio.sleep(0)
    assert not held.done()
    mailroom.stall = False
    assert (await held)[0] == mailroom.url


async def test_the_fake_carries_bip78_payers() -> None:
    mailroom = MemoryMailroom(long_poll=5.0)
    payer = asyncio.create_task(mailroom.post_v1(MAILBOX, "cHNidP8=", "v=1"))
    get, put = MailboxRequest("GET", MAILBOX), MailboxRequest("PUT", MAILBOX, b"cHJvcG9zYWw=")
    got = await mailroom.exchange(mailroom.url, mailroom.keys, get, session=SESSION)
    assert got.reply.body == b"cHNidP8=\nv=1"
    await mailroom.exchange(mailroom.url, mailroom.keys, put, session=SESSION)
    assert await payer == (200, b"cHJvcG9zYWw=")
    status, body = await mailroom.post_v1(MAILBOX, "cHNidP8=", timeout_after=0.01)
    assert (status, json.loads(body)["errorCode"]) == (503, "unavailable")


async def test_the_fake_tells_a_full_mailbox_that_no_envelope_can_carry() -> None:
    mailroom = MemoryMailroom(long_poll=5.0)
    payer = asyncio.create_task(mailroom.post_v1(MAILBOX, "A" * 9000, timeout_after=0.05))
    await asyncio.sleep(0)
    with pytest.raises(NotNow, match="does not fit"):
        await mailroom.exchange(mailroom.url, mailroom.keys, MailboxRequest("GET", MAILBOX), session=SESSION)
    assert (await payer)[0] == 503
