"""The contract of `ports.Mailroom`, as checks that run over every implementation, the shipped ones and yours.

```python
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_my_mailroom_keeps_the_contract(check):
    async with my_world() as world:
        await check(world)
```

A world is a mailroom with a directory behind it. What a world cannot do to its directory is None, and the checks that need it return.

Law: a check fails by raising `ContractBroken`, whose message says what was expected of the mailroom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TypeAlias

from pjv2.backends.system import SystemEntropy
from pjv2.errors import KeyRotated, NotNow, PayjoinError, WrongUsage
from pjv2.ports import Carried, Mailroom
from pjv2.wire.mailbox import MailboxRequest, Method, short_id
from pjv2.wire.secp import SecretKey

_SESSION = "00" * 16
_OTHER_SESSION = "11" * 16
_MESSAGE_BYTES = 7168


class ContractBroken(AssertionError):
    """A mailroom does not keep the contract of `ports.Mailroom`."""


@dataclass(frozen=True, slots=True)
class MailroomWorld:
    """A mailroom to check, and what can be done to the directory behind it.

    `patience`: how long a long poll lasts in this world, in seconds. `relays`: how many relays may be used for its directory.
    """

    mailroom: Mailroom
    patience: float
    relays: int = 1
    rotate_keys: Callable[[], Awaitable[None]] | None = None
    set_offline: Callable[[bool], Awaitable[None]] | None = None


Check: TypeAlias = Callable[[MailroomWorld], Awaitable[None]]


def _must(held: bool, law: str) -> None:
    if not held:
        raise ContractBroken(law)


def _mailbox() -> str:
    return short_id(SecretKey.generate(SystemEntropy()).public)


def _message() -> bytes:
    return SystemEntropy().token(_MESSAGE_BYTES)


async def _ask(world: MailroomWorld, method: Method, mailbox: str, body: bytes = b"", avoid: str = "") -> Carried:
    directory, keys = await world.mailroom.directory()
    request = MailboxRequest(method, mailbox, body)
    return await world.mailroom.exchange(directory, keys, request, session=_SESSION, avoid=avoid)


async def a_posted_message_is_what_a_get_answers(world: MailroomWorld) -> None:
    mailbox, message = _mailbox(), _message()
    posted = await _ask(world, "POST", mailbox, message)
    _must(posted.reply.status == 200, "a POST is answered with 200")
    got = await _ask(world, "GET", mailbox)
    _must((got.reply.status, got.reply.body) == (200, message), "a GET answers what was posted")


async def an_empty_mailbox_answers_202(world: MailroomWorld) -> None:
    got = await _ask(world, "GET", _mailbox())
    _must((got.reply.status, got.reply.body) == (202, b""), "a GET of an empty mailbox answers 202 and nothing")


async def the_first_message_stays(world: MailroomWorld) -> None:
    mailbox, first = _mailbox(), _message()
    await _ask(world, "POST", mailbox, first)
    second = await _ask(world, "POST", mailbox, _message())
    _must(second.reply.status == 200, "a second POST is answered with 200 as well")
    _must((await _ask(world, "GET", mailbox)).reply.body == first, "the first message in a mailbox stays")


async def posting_the_same_again_changes_nothing(world: MailroomWorld) -> None:
    mailbox, message = _mailbox(), _message()
    for _ in range(2):
        _must((await _ask(world, "POST", mailbox, message)).reply.status == 200, "a repeated POST is answered with 200")
    _must((await _ask(world, "GET", mailbox)).reply.body == message, "a repeated POST changes nothing")


async def reading_takes_nothing_away(world: MailroomWorld) -> None:
    mailbox, message = _mailbox(), _message()
    await _ask(world, "POST", mailbox, message)
    bodies = [(await _ask(world, "GET", mailbox)).reply.body for _ in range(3)]
    _must(bodies == [message] * 3, "a message can be read again")


async def a_poll_with_a_body_reads_all_the_same(world: MailroomWorld) -> None:
    mailbox, message = _mailbox(), _message()
    await _ask(world, "POST", mailbox, message)
    got = await _ask(world, "GET", mailbox, _message())
    _must(got.reply.body == message, "the body of a GET is ignored by the directory")


async def mailboxes_are_kept_apart(world: MailroomWorld) -> None:
    pairs = [(_mailbox(), _message()) for _ in range(3)]
    for mailbox, message in pairs:
        await _ask(world, "POST", mailbox, message)
    for mailbox, message in pairs:
        _must((await _ask(world, "GET", mailbox)).reply.body == message, "each mailbox holds its own message")


async def a_waiting_poll_ends_when_the_message_arrives(world: MailroomWorld) -> None:
    if world.patience <= 0:
        return
    mailbox, message = _mailbox(), _message()
    started = asyncio.get_running_loop().time()
    poll = asyncio.create_task(_ask(world, "GET", mailbox))
    await _ask(world, "POST", mailbox, message)
    got = await poll
    waited = asyncio.get_running_loop().time() - started
    _must(got.reply.body == message, "a waiting poll is answered with the message that arrives")
    _must(waited < world.patience, "a waiting poll is answered at once, not when its time is over")


async def all_readers_of_a_mailbox_are_answered(world: MailroomWorld) -> None:
    if world.patience <= 0:
        return
    mailbox, message = _mailbox(), _message()
    polls = [asyncio.create_task(_ask(world, "GET", mailbox)) for _ in range(3)]
    await _ask(world, "POST", mailbox, message)
    bodies = {got.reply.body for got in await asyncio.gather(*polls)}
    _must(bodies == {message}, "all who wait for a mailbox get its message")


async def an_abandoned_poll_harms_nobody(world: MailroomWorld) -> None:
    mailbox, message = _mailbox(), _message()
    poll = asyncio.create_task(_ask(world, "GET", mailbox))
    await asyncio.sleep(0)
    poll.cancel()
    with suppress(asyncio.CancelledError):
        await poll
    await _ask(world, "POST", mailbox, message)
    _must((await _ask(world, "GET", mailbox)).reply.body == message, "a cancelled poll leaves the mailroom usable")


async def a_put_without_a_waiting_payer_is_refused(world: MailroomWorld) -> None:
    try:
        carried = await _ask(world, "PUT", _mailbox(), b"cHNidA==")
    except NotNow:
        return
    _must(carried.reply.status >= 400, "a PUT to a mailbox where no BIP78 payer waits does not succeed")


async def the_relay_is_named(world: MailroomWorld) -> None:
    got = await _ask(world, "POST", _mailbox(), _message())
    _must(bool(got.relay), "an answer names the relay that carried it")


async def the_relay_to_avoid_is_avoided(world: MailroomWorld) -> None:
    first = (await _ask(world, "POST", _mailbox(), _message())).relay
    for _ in range(8):
        other = (await _ask(world, "POST", _mailbox(), _message(), avoid=first)).relay
        if world.relays > 1:
            _must(other != first, "the relay to avoid is not used where there is another")
        else:
            _must(other == first, "the only relay is used even when it is to be avoided")


async def sessions_do_not_get_in_each_others_way(world: MailroomWorld) -> None:
    directory, keys = await world.mailroom.directory()
    boxes = [(_mailbox(), _message()) for _ in range(6)]

    async def one(at: int) -> bytes:
        mailbox, message = boxes[at]
        session = (_SESSION, _OTHER_SESSION)[at % 2]
        post = MailboxRequest("POST", mailbox, message)
        await world.mailroom.exchange(directory, keys, post, session=session)
        got = await world.mailroom.exchange(directory, keys, MailboxRequest("GET", mailbox), session=session)
        return got.reply.body

    bodies = await asyncio.gather(*(one(at) for at in range(len(boxes))))
    _must(bodies == [message for _, message in boxes], "exchanges at the same time do not mix")


async def a_body_that_is_too_large_is_our_mistake(world: MailroomWorld) -> None:
    try:
        await _ask(world, "POST", _mailbox(), bytes(9000))
    except WrongUsage:
        return
    raise ContractBroken("a body that does not fit an envelope is refused with WrongUsage")


async def a_directory_that_is_no_url_is_our_mistake(world: MailroomWorld) -> None:
    _, keys = await world.mailroom.directory()
    request = MailboxRequest("GET", _mailbox())
    for url in (
        "ftp://directory.example",
        "https://user@directory.example",
        "https://directory.example/path",
        "directory",
    ):
        try:
            await world.mailroom.exchange(url, keys, request, session=_SESSION)
        except WrongUsage:
            continue
        raise ContractBroken(f"{url!r} as a directory is refused with WrongUsage")


async def a_changed_key_is_told_apart(world: MailroomWorld) -> None:
    if world.rotate_keys is None:
        return
    directory, old = await world.mailroom.directory()
    await world.rotate_keys()
    request = MailboxRequest("GET", _mailbox())
    try:
        await world.mailroom.exchange(directory, old, request, session=_SESSION)
    except KeyRotated:
        pass
    else:
        raise ContractBroken("an exchange under a key that the directory does not know raises KeyRotated")
    _, new = await world.mailroom.directory()
    _must(new != old, "after a rotation the new key is found")
    carried = await world.mailroom.exchange(directory, new, MailboxRequest("POST", _mailbox(), b"x"), session=_SESSION)
    _must(carried.reply.status == 200, "after a rotation the new key works")


async def an_outage_is_not_now_and_heals(world: MailroomWorld) -> None:
    if world.set_offline is None:
        return
    mailbox, message = _mailbox(), _message()
    directory, keys = await world.mailroom.directory()
    request = MailboxRequest("POST", mailbox, message)
    await world.set_offline(True)
    try:
        await world.mailroom.exchange(directory, keys, request, session=_SESSION)
    except NotNow as exc:
        _must(not isinstance(exc, KeyRotated), "an outage is not a rotation")
        for secret in (mailbox, message.hex()):
            _must(secret not in f"{exc}{exc.__cause__}", "an exception does not name the mailbox")
    else:
        raise ContractBroken("an exchange with a directory that is away raises NotNow")
    await world.set_offline(False)
    carried = await world.mailroom.exchange(directory, keys, request, session=_SESSION)
    _must(carried.reply.status == 200, "the mailroom works again once the directory is back")


async def closing_twice_is_closing_once(world: MailroomWorld) -> None:
    await world.mailroom.close()
    await world.mailroom.close()
    try:
        await world.mailroom.directory()
    except PayjoinError:
        return
    raise ContractBroken("a closed mailroom refuses to be used")


CHECKS: tuple[Check, ...] = (
    a_posted_message_is_what_a_get_answers,
    an_empty_mailbox_answers_202,
    the_first_message_stays,
    posting_the_same_again_changes_nothing,
    reading_takes_nothing_away,
    a_poll_with_a_body_reads_all_the_same,
    mailboxes_are_kept_apart,
    a_waiting_poll_ends_when_the_message_arrives,
    all_readers_of_a_mailbox_are_answered,
    an_abandoned_poll_harms_nobody,
    a_put_without_a_waiting_payer_is_refused,
    the_relay_is_named,
    the_relay_to_avoid_is_avoided,
    sessions_do_not_get_in_each_others_way,
    a_body_that_is_too_large_is_our_mistake,
    a_directory_that_is_no_url_is_our_mistake,
    a_changed_key_is_told_apart,
    an_outage_is_not_now_and_heals,
    closing_twice_is_closing_once,
)
"""Every check, for parametrised tests."""


async def check_mailroom(make: Callable[[], AbstractAsyncContextManager[MailroomWorld]]) -> None:
    """Run every check, each in a fresh world. Raises ContractBroken."""
    for check in CHECKS:
        async with make() as world:
            await check(world)
