"""Relays are drawn, failures are blamed on whom they belong to, and no secret leaves in an exception."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest

from pjv2.backends.mailroom import HttpMailroom, Service, service_from
from pjv2.backends.mailroom.health import LONGEST_RETRY_AFTER
from pjv2.errors import KeyRotated, NotNow, WrongUsage
from pjv2.lab.directory import Directory
from pjv2.lab.httpd import HttpRequest, HttpResponse
from pjv2.lab.relay import Relay
from pjv2.wire.mailbox import MailboxRequest
from pjv2.wire.ohttp import KEY_PROBLEM_TYPE

SESSION = "ab" * 16
MAILBOX = "TXJCGKTKXLUUZ"
GET = MailboxRequest("GET", MAILBOX)
POST = MailboxRequest("POST", MAILBOX, b"secret message")
PROBLEM = HttpResponse(
    400, json.dumps({"type": KEY_PROBLEM_TYPE}).encode(), (("Content-Type", "application/problem+json"),)
)


class LyingRelay(Relay):
    """Answers every envelope itself."""

    lie: HttpResponse | None = None

    async def respond(self, request: HttpRequest):
        if self.lie is not None and request.method == "POST":
            return self.lie
        return await super().respond(request)


class GarblingRelay(Relay):
    async def respond(self, request: HttpRequest):
        answer = await super().respond(request)
        if request.method == "POST" and isinstance(answer, HttpResponse) and answer.status == 200:
            return HttpResponse(200, answer.body[:-1] + bytes((answer.body[-1] ^ 1,)))
        return answer


@pytest.fixture
async def directory():
    async with Directory(long_poll=0.1) as directory:
        yield directory


@pytest.fixture
async def relays():
    async with Relay() as first, LyingRelay() as second:
        yield first, second


@pytest.fixture
async def mailroom(directory, relays, clock, cache):
    mailroom = HttpMailroom([relay.url for relay in relays], [directory.url], clock=clock, cache=cache)
    yield mailroom
    await mailroom.close()


async def until_blamed(mailroom, directory, request=GET, tries=30):
    """Exchange until somebody is blamed (each draw hits the bad relay first with chance 1/2)."""
    for _ in range(tries):
        await mailroom.exchange(directory.url, directory.keys, request, session=SESSION)
        if mailroom.back_offs():
            return mailroom.back_offs()
    pytest.fail("nobody was blamed")


async def test_requests_are_spread_over_all_healthy_relays(mailroom, directory, relays):
    directory.long_poll = 0
    carried = [await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION) for _ in range(40)]
    assert {one.relay for one in carried} == {relay.url for relay in relays}


async def test_no_envelope_is_sent_twice(mailroom, directory, relays):
    directory.long_poll = 0
    relays[1].cut_after = 30
    for _ in range(6):
        await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)
    bodies = [kept.partition(b"\r\n\r\n")[2] for relay in relays for kept in relay._kept if kept.startswith(b"POST")]
    assert len(bodies) == len(set(bodies)) >= 6


async def test_a_relay_that_cannot_be_reached_is_left_alone_for_a_while_and_comes_back(
    mailroom, directory, relays, clock
):
    directory.long_poll = 0
    relays[0].offline = True
    blamed = await until_blamed(mailroom, directory)
    assert list(blamed) == [f"relay {relays[0].url}"]
    assert 1 < blamed[f"relay {relays[0].url}"] < 4
    clock.time += 5
    assert mailroom.back_offs() == {}
    relays[0].offline = False
    used = {(await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)).relay for _ in range(40)}
    assert relays[0].url in used


async def test_when_no_relay_can_be_reached_nobody_is_blamed(mailroom, directory, relays):
    for relay in relays:
        relay.offline = True
    with pytest.raises(NotNow, match="is this machine online"):
        await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    assert mailroom.back_offs() == {}
    for relay in relays:
        relay.offline = False
    assert (await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)).reply.status == 202


async def test_many_requests_in_flight_are_spread_over_several_clients(mailroom, directory, relays, monkeypatch):
    monkeypatch.setattr("pjv2.backends.mailroom.mailroom._REQUESTS_PER_CARRIER", 4)
    directory.long_poll = 5.0
    polls = [
        asyncio.create_task(mailroom.exchange(directory.url, directory.keys, GET, session=f"{number:032x}"))
        for number in range(10)
    ]
    await directory.until_waiting(10)
    assert len(mailroom._carriers) == 3
    await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)
    assert {carried.reply.body for carried in await asyncio.gather(*polls)} == {POST.body}


async def test_a_relay_that_refuses_is_blamed_for_this_directory_only(mailroom, directory, relays):
    directory.long_poll = 0
    relays[1].lie = HttpResponse(403)
    assert list(await until_blamed(mailroom, directory)) == [f"relay {relays[1].url} for {directory.url}"]


async def test_retry_after_of_a_relay_is_honoured(mailroom, directory, relays):
    directory.long_poll = 0
    relays[1].lie = HttpResponse(503, headers=(("Retry-After", "120"),))
    (wait,) = (await until_blamed(mailroom, directory)).values()
    assert wait == 120


async def test_redirects_are_a_refusal(mailroom, directory, relays):
    directory.long_poll = 0
    relays[1].lie = HttpResponse(307, headers=(("Location", f"{relays[0].url}/{directory.url}/"),))
    assert list(await until_blamed(mailroom, directory)) == [f"relay {relays[1].url} for {directory.url}"]


@pytest.mark.parametrize("body", [b"", bytes(8191), bytes(8193), bytes(8192), bytes(1_000_000)])
async def test_an_answer_that_is_no_envelope_is_tried_elsewhere(mailroom, directory, relays, body):
    directory.long_poll = 0
    relays[1].lie = HttpResponse(200, body)
    assert list(await until_blamed(mailroom, directory)) == [f"relay {relays[1].url} for {directory.url}"]


async def test_a_relay_that_damages_answers_is_blamed(directory, clock):
    directory.long_poll = 0
    async with Relay() as good, GarblingRelay() as bad:
        mailroom = HttpMailroom([good.url, bad.url], [directory.url], clock=clock)
        assert list(await until_blamed(mailroom, directory)) == [f"relay {bad.url} for {directory.url}"]
        await mailroom.close()


async def test_one_relay_alone_cannot_end_a_session_by_saying_that_the_key_rotated(mailroom, directory, relays):
    directory.long_poll = 0
    relays[1].lie = PROBLEM
    assert list(await until_blamed(mailroom, directory)) == [f"relay {relays[1].url} for {directory.url}"]


async def test_one_voice_for_a_rotation_is_not_enough_until_the_other_relay_is_gone_for_long(
    mailroom, directory, relays, clock
):
    relays[1].lie = PROBLEM
    relays[0].offline = True
    refusals = []
    for _ in range(6):
        with pytest.raises(NotNow) as caught:
            await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
        refusals.append(caught.type)
        clock.time += 601
    assert refusals == [NotNow] * 4 + [KeyRotated] * 2


async def test_with_one_relay_its_word_about_a_rotation_is_taken(directory, relays, clock):
    mailroom = HttpMailroom([relays[1].url], [directory.url], clock=clock)
    old = directory.keys
    directory.rotate_keys()
    with pytest.raises(KeyRotated):
        await mailroom.exchange(directory.url, old, GET, session=SESSION)
    await mailroom.close()


async def test_a_rotation_is_believed_when_every_relay_says_so(mailroom, directory, relays):
    old = directory.keys
    directory.rotate_keys()
    with pytest.raises(KeyRotated, match="does not know the OHTTP key"):
        await mailroom.exchange(directory.url, old, GET, session=SESSION)
    assert mailroom.back_offs() == {}


async def test_a_directory_that_refuses_is_not_held_against_the_relays(mailroom, directory, relays):
    await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    directory.status = 503
    with pytest.raises(NotNow, match="503") as caught:
        await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    assert caught.value.after is not None
    assert list(mailroom.back_offs()) == [f"directory {directory.url}"]
    directory.status = None
    assert (await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)).reply.status == 202
    assert mailroom.back_offs() == {}


async def test_junk_in_a_mailbox_burns_neither_relay_nor_directory(mailroom, directory, relays):
    directory._mailboxes._post(MAILBOX, b"A" * 9000)  # as an over-long request can leave it in deployed directories
    with pytest.raises(NotNow, match="cannot be read"):
        await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    assert mailroom.back_offs() == {}


async def test_a_directory_that_hangs_up_in_mid_poll_is_not_now(mailroom, directory, relays):
    await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)
    directory.cut_after = 100
    with pytest.raises(NotNow):
        await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    directory.cut_after = None
    assert (await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)).reply.status == 200


async def test_silence_ends_the_attempt_and_is_held_against_the_relay_for_this_directory(
    directory, relays, clock, monkeypatch
):
    mailroom = HttpMailroom([relays[0].url], [directory.url], clock=clock, poll_timeout=0.1)
    relays[0].stall = True
    monkeypatch.setattr("pjv2.backends.mailroom.carrier.CONNECT_TIMEOUT", 0.1)  # the time allowed is the sum of both
    with pytest.raises(NotNow, match="did not answer in time"):
        await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    assert list(mailroom.back_offs()) == [f"relay {relays[0].url} for {directory.url}"]
    with pytest.raises(NotNow, match="left alone") as caught:
        await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
    assert 0 < caught.value.after <= LONGEST_RETRY_AFTER
    await mailroom.close()


async def test_the_relay_to_avoid_is_used_when_the_others_fail(mailroom, directory, relays):
    directory.long_poll = 0
    relays[0].offline = True
    for _ in range(3):
        carried = await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION, avoid=relays[1].url)
        assert carried.relay == relays[1].url


async def test_a_relay_of_the_directorys_operator_is_never_used(directory, relays, clock):
    mailroom = HttpMailroom(
        [{"url": relays[0].url, "operator": "Same"}, {"url": relays[1].url, "operator": "Other"}],
        [{"url": directory.url, "operator": "same"}],
        clock=clock,
    )
    directory.long_poll = 0
    for _ in range(8):
        carried = await mailroom.exchange(directory.url, directory.keys, GET, session=SESSION)
        assert carried.relay == relays[1].url
    await mailroom.close()
    alone = HttpMailroom(
        [{"url": relays[0].url, "operator": "Same"}], [{"url": directory.url, "operator": "Same"}], clock=clock
    )
    for call in (alone.directory(), alone.exchange(directory.url, directory.keys, GET, session=SESSION)):
        with pytest.raises(WrongUsage, match="another operator"):
            await call
    await alone.close()


async def test_health_is_kept_for_the_next_run(mailroom, directory, relays, clock, cache):
    directory.long_poll = 0
    relays[0].offline = True
    await until_blamed(mailroom, directory)
    await mailroom.close()
    again = HttpMailroom([relay.url for relay in relays], [directory.url], clock=clock, cache=cache)
    carried = [await again.exchange(directory.url, directory.keys, GET, session=SESSION) for _ in range(4)]
    assert {one.relay for one in carried} == {relays[1].url}
    assert list(again.back_offs()) == [f"relay {relays[0].url}"]
    await again.close()


async def test_a_health_record_that_cannot_be_read_is_started_anew(directory, relays, clock, cache):
    cache["mailroom health"] = "[1]"
    mailroom = HttpMailroom([relays[0].url], [directory.url], clock=clock, cache=cache)
    assert (await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)).reply.status == 200
    await mailroom.close()


async def test_neither_exceptions_nor_logs_hold_the_mailbox_or_the_message(mailroom, directory, relays, caplog):
    caplog.set_level(logging.DEBUG)
    for break_it in (
        lambda: setattr(directory, "status", 500),
        lambda: setattr(relays[0], "offline", True) or setattr(relays[1], "offline", True),
    ):
        break_it()
        with pytest.raises(NotNow) as caught:
            await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)
        error: BaseException | None = caught.value
        while error is not None:
            for secret in (MAILBOX, "secret message"):
                assert secret not in f"{error!r}{error}"
            error = error.__cause__ or error.__context__
    assert MAILBOX not in caplog.text
    assert "secret message" not in caplog.text


async def test_through_a_proxy_sessions_have_their_own_credentials_and_connections(directory, socks, clock):
    async with Relay() as relay:
        socks.route["relay.example.com"] = relay.port
        mailroom = HttpMailroom(
            [f"http://relay.example.com:{relay.port}"], [directory.url], proxy=socks.url, clock=clock
        )
        for session in (SESSION, "cd" * 16, SESSION):
            carried = await mailroom.exchange(directory.url, directory.keys, POST, session=session)
            assert carried.reply.status == 200
        await mailroom.close()
    assert len(socks.users) == len(set(socks.users)) == 2
    assert all(SESSION not in user for user in socks.users)
    assert {name for name, _ in socks.asked} == {"relay.example.com"}


async def test_idle_connections_of_old_sessions_are_closed(directory, socks, clock, monkeypatch):
    monkeypatch.setattr("pjv2.backends.mailroom.mailroom._MOST_IDLE_CARRIERS", 2)
    async with Relay() as relay:
        socks.route["relay.example.com"] = relay.port
        mailroom = HttpMailroom(
            [f"http://relay.example.com:{relay.port}"], [directory.url], proxy=socks.url, clock=clock
        )
        for number in range(5):
            await mailroom.exchange(directory.url, directory.keys, POST, session=f"{number:032x}")
        assert len(mailroom._carriers) == 2
        await mailroom.close()


async def test_an_applications_own_client_carries_the_traffic_and_stays_open(directory, relays, clock):
    async with httpx.AsyncClient(trust_env=False) as client:
        mailroom = HttpMailroom([relays[0].url], [directory.url], http=client, clock=clock)
        assert (await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)).reply.status == 200
        await mailroom.close()
        assert not client.is_closed
        with pytest.raises(WrongUsage, match="closed"):
            await mailroom.exchange(directory.url, directory.keys, POST, session=SESSION)


async def test_settings_that_contradict_each_other_are_refused():
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(WrongUsage, match="proxy"):
            HttpMailroom(["https://r.example"], [], http=client, proxy="socks5h://127.0.0.1:9050")
    with pytest.raises(WrongUsage, match="no relay"):
        HttpMailroom([], ["https://d.example"])
    with pytest.raises(WrongUsage, match="receiver needs one"):
        await HttpMailroom(["https://r.example"], []).directory()


def test_services_are_read_as_the_configuration_writes_them():
    assert service_from("https://R.example/") == Service("https://r.example")
    assert service_from({"url": "https://r.example", "operator": "R"}) == Service("https://r.example", "R")
    for bad in ({"operator": "R"}, {"url": "https://r.example", "colour": "red"}):
        with pytest.raises(WrongUsage):
            service_from(bad)
