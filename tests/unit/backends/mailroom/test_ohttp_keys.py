"""OHTTP keys are used when two relays of different operators were told the same; what is weaker says so."""

from __future__ import annotations

import json

import pytest

from pjv2.backends.mailroom import HttpMailroom, Source
from pjv2.backends.mailroom.keys import KEEP_FOR, RENEW_AFTER
from pjv2.backends.system import SystemEntropy
from pjv2.errors import KeyRotated, NotNow, WrongUsage
from pjv2.lab.directory import Directory
from pjv2.lab.httpd import HttpRequest, HttpResponse
from pjv2.wire.mailbox import GATEWAY_PATH, MailboxRequest
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey

SESSION = "ab" * 16
MAILBOX = "TXJCGKTKXLUUZ"


class TellingDirectory(Directory):
    """Gives each who asks a key of his own."""

    async def respond(self, request: HttpRequest) -> HttpResponse:
        if request.method == "GET" and request.target == GATEWAY_PATH:
            return HttpResponse(200, KeyConfig(1, SecretKey.generate(SystemEntropy()).public).encode())
        return await super().respond(request)


@pytest.fixture
async def make(tls_world, clock, cache):
    made = []

    def build(relays=2, **more):
        mailroom = HttpMailroom(
            [relay.url for relay in tls_world.relays[:relays]],
            more.pop("directories", [tls_world.directory.url]),
            ca_file=tls_world.ca_file,
            clock=clock,
            cache=cache,
            **more,
        )
        made.append(mailroom)
        return mailroom

    yield build
    for mailroom in made:
        await mailroom.close()


async def test_two_relays_that_agree_give_keys_without_a_warning(tls_world, make):
    mailroom = make(relays=3)
    assert await mailroom.directory() == (tls_world.directory.url, tls_world.directory.keys)
    (standing,) = mailroom.key_standings()
    assert standing.source is Source.TWO_RELAYS
    assert len(set(standing.relays)) == 2
    assert standing.warning == ""
    assert sum(len(relay.log) for relay in tls_world.relays) <= 2


async def test_a_directory_that_gives_everyone_his_own_key_is_not_used(tls_world, server_tls, make):
    async with TellingDirectory(ssl_context=server_tls) as telling:
        with pytest.raises(NotNow, match="different OHTTP keys"):
            await make(directories=[telling.url]).directory()


async def test_with_one_relay_keys_are_used_and_doctor_can_warn(make):
    mailroom = make(relays=1)
    await mailroom.directory()
    (standing,) = mailroom.key_standings()
    assert standing.source is Source.ONE_RELAY
    assert "no second operator" in standing.warning


async def test_a_second_relay_of_the_same_operator_is_no_second_witness(tls_world, clock):
    relays = [{"url": relay.url, "operator": "One"} for relay in tls_world.relays]
    mailroom = HttpMailroom(relays, [tls_world.directory.url], ca_file=tls_world.ca_file, clock=clock)
    standing = await mailroom.check_keys(tls_world.directory.url)
    assert standing.source is Source.ONE_RELAY
    await mailroom.close()


async def test_a_dead_relay_is_replaced_by_another_and_blamed(tls_world, make):
    tls_world.relays[0].offline = True
    mailroom = make(relays=3)
    for _ in range(24):  # until the dead one was drawn
        standing = await mailroom.check_keys(tls_world.directory.url)
        assert standing.source is Source.TWO_RELAYS
        await mailroom._keys.forget(standing.directory, standing.keys)
        if mailroom.back_offs():
            break
    else:
        pytest.fail("the dead relay was never drawn in 24 tries of 2 out of 3")
    assert list(mailroom.back_offs()) == [f"relay {tls_world.relays[0].url}"]


async def test_keys_from_one_relay_because_the_others_are_down_say_so_and_are_renewed_soon(tls_world, make, clock):
    tls_world.relays[0].offline = True
    mailroom = make()
    standing = await mailroom.check_keys(tls_world.directory.url)
    assert standing.source is Source.ONE_RELAY
    assert "could not be asked" in standing.warning
    tls_world.relays[0].offline = False
    clock.time += 901
    assert (await mailroom.check_keys(tls_world.directory.url)).source is Source.TWO_RELAYS


async def test_when_no_relay_can_be_reached_nobody_is_blamed(tls_world, make):
    for relay in tls_world.relays:
        relay.offline = True
    mailroom = make()
    with pytest.raises(NotNow, match="is this machine online"):
        await mailroom.directory()
    assert mailroom.back_offs() == {}


async def test_another_directory_is_taken_when_one_gives_no_keys(tls_world, server_tls, make):
    async with TellingDirectory(ssl_context=server_tls) as telling:
        mailroom = make(directories=[telling.url, tls_world.directory.url])
        for _ in range(4):
            assert (await mailroom.directory())[0] == tls_world.directory.url


async def test_keys_are_kept_for_the_next_run_and_renewed_when_old(tls_world, make, clock, cache):
    await make().directory()
    stored = json.loads(cache[f"ohttp keys {tls_world.directory.url}"])
    assert stored["keys"] == tls_world.directory.keys.encode().hex()
    for relay in tls_world.relays:
        relay.offline = True
    again = make()
    clock.time += RENEW_AFTER - 1
    assert (await again.directory())[1] == tls_world.directory.keys  # not asked
    clock.time += 2
    assert (await again.directory())[1] == tls_world.directory.keys  # asked in vain: the old ones still serve
    clock.time += KEEP_FOR
    with pytest.raises(NotNow):
        await again.directory()
    for relay in tls_world.relays:
        relay.offline = False
    new = tls_world.directory.rotate_keys()
    assert (await again.directory())[1] == new


@pytest.mark.parametrize(
    "junk", ["", "{}", "[]", '{"keys":"zz","source":"two relays","fetched":1,"relays":[],"warning":""}']
)
async def test_a_cache_that_cannot_be_read_is_fetched_again(tls_world, make, cache, junk):
    cache[f"ohttp keys {tls_world.directory.url}"] = junk
    assert (await make().directory())[1] == tls_world.directory.keys


async def test_keys_from_a_clock_that_went_back_are_fetched_again(tls_world, make, clock):
    mailroom = make()
    await mailroom.directory()
    new = tls_world.directory.rotate_keys()
    clock.time -= 3600
    assert (await mailroom.directory())[1] == new


async def test_a_rotation_noticed_by_a_session_drops_the_kept_keys(tls_world, make, cache):
    mailroom = make()
    url, old = await mailroom.directory()
    new = tls_world.directory.rotate_keys()
    with pytest.raises(KeyRotated):
        await mailroom.exchange(url, old, MailboxRequest("GET", MAILBOX), session=SESSION)
    assert f"ohttp keys {url}" not in cache
    assert (await mailroom.directory())[1] == new


async def test_a_key_file_asks_nobody(tls_world, tmp_path, make):
    path = tmp_path / "keys.bin"
    path.write_bytes(tls_world.directory.keys.encode())
    mailroom = make(keys_file=path)
    assert (await mailroom.directory())[1] == tls_world.directory.keys
    assert mailroom.key_standings()[0].source is Source.FILE
    assert all(relay.log == () for relay in tls_world.relays)


def test_a_key_file_without_keys_is_refused(tmp_path):
    with pytest.raises(WrongUsage, match="cannot be read"):
        HttpMailroom(["https://r.example"], [], keys_file=tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"hello")
    with pytest.raises(WrongUsage, match="no usable OHTTP keys"):
        HttpMailroom(["https://r.example"], [], keys_file=tmp_path / "bad")


async def test_plain_http_elsewhere_than_on_this_machine_needs_a_key_file():
    mailroom = HttpMailroom(["https://r.example.com"], ["http://directory.example.org"])
    with pytest.raises(WrongUsage, match="ohttp_keys_file"):
        await mailroom.directory()
    await mailroom.close()


async def test_keys_through_a_proxy_never_leave_it_and_relays_do_not_share_a_circuit(tls_world, socks, clock):
    names = ["relay.example.com", "localhost"]
    for name, relay in zip(names, tls_world.relays, strict=False):
        socks.route[name] = relay.port
    relays = [f"https://{name}:{relay.port}" for name, relay in zip(names, tls_world.relays, strict=False)]
    mailroom = HttpMailroom(relays, [tls_world.directory.url], ca_file=tls_world.ca_file, proxy=socks.url, clock=clock)
    assert (await mailroom.directory())[1] == tls_world.directory.keys
    assert sorted(name for name, _ in socks.asked) == sorted(names)
    assert len(set(socks.users)) == 2
    await mailroom.close()


async def test_doctor_can_try_every_relay(tls_world, make):
    tls_world.relays[1].offline = True
    tls_world.relays[2].status = 403
    mailroom = make(relays=3)
    checks = {check.relay.url: check for check in await mailroom.check_relays(tls_world.directory.url)}
    works, unreachable, refuses = (checks[relay.url] for relay in tls_world.relays)
    assert works.works
    assert (unreachable.works, unreachable.said) == (False, "cannot be reached")
    assert not refuses.works
    assert "403" in refuses.said
    assert mailroom.back_offs() == {}
