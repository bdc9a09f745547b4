"""`doctor`: every check on the real lab, what each says when its part of the world is broken, and that none hides another."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import typer

from pjv2 import schedule, start
from pjv2.app import Hub, Payjoin
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.store.sealed import SealedStore
from pjv2.backends.system import SystemEntropy
from pjv2.cli import doctor as command
from pjv2.cli.app import run
from pjv2.cli.command import Cli
from pjv2.config import Config
from pjv2.doctor import CHECKS, Check, Installation, examine, exit_code, made_up
from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.directory import Directory
from pjv2.lab.relay import Relay
from pjv2.lab.world import Party, World
from pjv2.ports import NodeInfo
from pjv2.psbt.original import Suitability
from pjv2.psbt.plan import ChannelOrder
from pjv2.session.events import Policy
from pjv2.session.facts import Tip
from pjv2.testing.memory_mailroom import MemoryMailroom
from pjv2.testing.memory_store import MemoryStore
from pjv2.units import FeeRate, Network

NAMES = [name for name, _ in CHECKS]


def config(**sections: Any) -> Config:
    return Config.load(None, sections)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


@pytest.fixture
async def party(world: World) -> Party:
    return await world.party("shop", coins=[300_000], lightning=True)


async def checked(party: Party, told: Config | None = None, *, deadline: float = 5.0, **ports: Any) -> dict[str, Check]:
    """The results by name (the last of each), with some ports replaced."""
    given = told or config(lightning={"backend": "rehearsal"})
    async with Installation.of(given, party.make_driver(**ports)) as it:
        return {check.name: check async for check in examine(it, deadline=deadline)}


class Port:
    """A port with some of its methods replaced."""

    def __init__(self, real: object, **methods: Any) -> None:
        self._real, self._methods = real, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods[name] if name in self._methods else getattr(self._real, name)


def answering(value: Any) -> Any:
    async def answer(*_: Any, **__: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    return answer


# ---------------------------------------------------------------- all of it


async def test_in_a_whole_world_nothing_fails_and_every_check_is_told_once(party: Party) -> None:
    stdout = io.StringIO()

    @asynccontextmanager
    async def opened(told: Config) -> AsyncIterator[Payjoin]:
        yield Payjoin(told, party.driver, Hub())

    cli = Cli(json=True, opened=opened, stdout=stdout, overrides={"lightning": {"backend": "rehearsal"}})
    await command.run(cli, deadline=5.0)
    *checks, done = [json.loads(line) for line in stdout.getvalue().splitlines()]
    assert [check["name"] for check in checks] == NAMES
    assert all(set(check) == {"event", "at", "name", "status", "why", "todo"} for check in checks)
    assert {check["event"] for check in checks} == {"Check"}
    assert [check["name"] for check in checks if check["status"] != "ok"] == ["lightning"]  # the reserve
    assert all(check["todo"] for check in checks if check["status"] != "ok")
    assert (done["event"], done["ok"]) == ("DoctorDone", True)
    assert party.seed.hex() not in stdout.getvalue()


async def test_people_get_a_table_and_a_verdict(party: Party) -> None:
    stdout = io.StringIO()

    @asynccontextmanager
    async def opened(told: Config) -> AsyncIterator[Payjoin]:
        yield Payjoin(told, party.make_driver(wallet=Port(party.wallet, can_sign=answering(False))), Hub())

    with pytest.raises(typer.Exit) as left:
        await command.run(Cli(opened=opened, stdout=stdout), deadline=5.0)
    assert left.value.exit_code == 4
    lines = stdout.getvalue().splitlines()
    assert lines[0].split() == ["check", "status", "why", "what", "to", "do"]
    assert [line.split()[0] for line in lines[1:-1]] == NAMES
    assert "failed" in next(line for line in lines if line.startswith("wallet"))
    assert lines[-1].startswith("Not ready")


def test_a_configuration_that_cannot_be_read_is_a_failed_check_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[polcy]\n")
    assert run(["--json", "doctor"]) == 2
    check, done = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (check["name"], check["status"]) == ("configuration", "failed")
    assert "did you mean policy" in check["why"]
    assert done["ok"] is False


def test_what_is_not_configured_fails_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text('[chain]\nbackend = "electrum"\n')
    assert run(["--json", "doctor"]) == 2
    *checks, done = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    status = {check["name"]: check["status"] for check in checks}
    assert status | {"store": "ok", "policy": "ok", "gap": "ok", "lightning": "ok"} == status
    assert {status[name] for name in ("relays", "keys", "directory", "wallet", "coins", "chain", "original")} == {
        "failed"
    }
    assert done["ok"] is False


async def test_one_check_that_hangs_or_breaks_hides_no_other(party: Party) -> None:
    async def hanging() -> None:
        await asyncio.Event().wait()

    found = await checked(
        party,
        deadline=0.5,
        wallet=Port(party.wallet, can_sign=hanging, coins=answering(ZeroDivisionError("a secret"))),
        chain=Port(party.world.chain, tip=answering(NotNow("the source is away"))),
    )
    assert set(found) == set(NAMES)
    assert "no answer within 0.5 s" in found["wallet"].why
    assert found["coins"].why == "this is a bug in pjv2: ZeroDivisionError"
    assert found["chain"] == found["clock"].__class__("chain", "failed", "the source is away", found["chain"].todo)
    assert [name for name, check in found.items() if check.status == "ok"] == [
        "policy", "store", "relays", "keys", "directory", "gap", "fees", "peers",
    ]  # fmt: skip
    assert exit_code(found.values()) == 4


def test_the_configuration_is_blamed_before_the_weather() -> None:
    ok, wet = Check("a", "ok", ""), Check("b", "failed", "")
    assert exit_code([ok, Check("c", "warning", "")]) == 0
    assert exit_code([ok, wet]) == 4
    assert exit_code([wet, Check("c", "failed", "", usage=True)]) == 2


async def test_ports_that_were_opened_for_the_examination_are_closed_after_it(party: Party) -> None:
    closed: list[str] = []

    def port(name: str, real: object) -> Any:
        async def close() -> None:
            closed.append(name)

        return answering(Port(real, close=close))

    async with Installation(
        config(lightning={"backend": "rehearsal"}),
        store=port("store", party.store),
        mailroom=port("mailroom", party.mailroom),
        wallet=port("wallet", party.wallet),
        chain=port("chain", party.world.chain),
        channels=port("channels", party.node),
    ) as it:
        found = [check async for check in examine(it)]
    assert [check.name for check in found] == NAMES
    assert sorted(closed) == ["chain", "channels", "mailroom", "store", "wallet"]


async def test_a_port_that_does_not_open_fails_only_the_checks_that_need_it(party: Party) -> None:
    async with Installation(
        config(),
        store=answering(NotNow("the database is locked")),
        mailroom=answering(party.mailroom),
        wallet=answering(party.wallet),
        chain=answering(party.world.chain),
        channels=answering(None),
        keep=True,
    ) as it:
        found = {check.name: check async for check in examine(it)}
    assert {name for name, check in found.items() if check.status == "failed"} == {"store", "gap"}
    assert found["coins"].status == "ok"


# ---------------------------------------------------------------- policy


@pytest.mark.parametrize(
    ("sections", "status", "says"),
    [
        ({}, "ok", "leave room"),
        ({"policy": {"max_fee_share": 0}}, "warning", "nothing is ever proposed"),
        ({"policy": {"min_amount": 1_000}}, "warning", "max_fee_share cannot pay"),
        ({"policy": {"approve": "ask", "expire_in": 60}}, "warning", "a person has to approve"),
        ({"policy": {"watch_after_expiry": 60}}, "warning", "watched for"),
        ({"policy": {"own_input": "prefer"}, "lightning": {"backend": "rehearsal"}}, "warning", "the peer's consent"),
        ({"policy": {"own_input": "prefer"}}, "ok", "leave room"),
        ({"network": "bitcoin", "payjoin": {"ohttp_keys_file": "k"}}, "warning", "pins the directories' keys"),
        ({"hooks": {"command": "no-such-program-anywhere --x"}}, "warning", "names no program"),
        ({"hooks": {"command": "'unclosed"}}, "warning", "names no program"),
        ({"hooks": {"command": "true"}}, "ok", "leave room"),
        ({"wallet": {"backend": "lnd"}}, "failed", "no Original could be accepted"),
    ],
)
async def test_a_policy_that_contradicts_itself_is_told(sections: dict[str, Any], status: str, says: str) -> None:
    ((_, check_policy), *_) = CHECKS
    found = await check_policy(Installation(config(**sections)))
    assert [check.status for check in found] == [status]
    assert says in found[0].why


# ---------------------------------------------------------------- store


async def test_a_store_says_whether_it_is_encrypted(party: Party) -> None:
    plain = await checked(party)
    assert "not encrypted" in plain["store"].why
    sealed = SealedStore(MemoryStore(), bytes(32))
    assert (await checked(party, store=sealed))["store"].why == "durable, writable, its events encrypted"


async def test_events_that_are_still_in_the_clear_are_counted(party: Party) -> None:
    policy = Policy()
    await start.receive(party.driver, Network.REGTEST, 100_000, policy=policy)
    found = (await checked(party, store=SealedStore(party.store, bytes(32))))["store"]
    assert (found.status, found.why) == ("warning", "1 stored events are not encrypted yet")
    assert "store encrypt" in found.todo


async def test_on_the_real_network_a_store_in_the_clear_is_worth_a_word(party: Party) -> None:
    found = await checked(party, config(network="bitcoin"))
    assert found["store"].status == "warning"
    assert "--make-key" in found["store"].todo


async def test_a_store_that_does_not_keep_what_it_is_given_fails(party: Party) -> None:
    found = await checked(party, store=Port(party.store, get=answering(None)))
    assert "could not be read back" in found["store"].why


# ---------------------------------------------------------------- mailroom


class TlsWorld:
    """A directory and relays behind TLS, as on the internet; each relay's operator is its own."""

    def __init__(self, directory: Directory, relays: list[Relay], ca_file: Path) -> None:
        self.directory, self.relays, self.ca_file = directory, relays, ca_file

    def mailroom(self, *operators: str) -> HttpMailroom:
        services = [Service(relay.url, operator) for relay, operator in zip(self.relays, operators, strict=False)]
        return HttpMailroom(services, [Service(self.directory.url, "the directory's")], ca_file=self.ca_file)


@pytest.fixture
async def tls(tmp_path: Path) -> AsyncIterator[TlsWorld]:
    authority, ca_file = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(Directory(ssl_context=server, long_poll=0.2))
        relays = [await stack.enter_async_context(Relay(ssl_context=server, gateway_tls=client)) for _ in range(2)]
        yield TlsWorld(directory, relays, ca_file)


async def mail(party: Party, mailroom: Any) -> dict[str, Check]:
    found = await checked(party, mailroom=mailroom)
    await mailroom.close()
    return {name: found[name] for name in ("relays", "keys", "directory")}


async def test_keys_that_two_operators_bring_are_good(party: Party, tls: TlsWorld) -> None:
    found = await mail(party, tls.mailroom("one", "two"))
    assert [check.status for check in found.values()] == ["ok"] * 3
    assert "2 relays of 2 operators, all carry to" in found["relays"].why
    assert "two relays of different operators brought the same keys" in found["keys"].why
    assert found["directory"].why.endswith("through two relays")


async def test_one_relay_or_one_operator_is_a_warning(party: Party, tls: TlsWorld) -> None:
    for operators in (["one"], ["one", "one"]):
        found = await mail(party, tls.mailroom(*operators))
        assert [found[name].status for name in ("relays", "keys", "directory")] == ["warning", "warning", "ok"]
        assert all("another operator" in found[name].todo for name in ("relays", "keys"))


async def test_a_relay_that_is_gone_is_named_and_the_other_goes_on(party: Party, tls: TlsWorld) -> None:
    mailroom = tls.mailroom("one", "two")
    await tls.relays[0].stop()
    found = await mail(party, mailroom)
    assert [found[name].status for name in ("relays", "keys", "directory")] == ["warning", "warning", "ok"]
    assert tls.relays[0].url in found["relays"].why


async def test_when_no_relay_carries_the_mailroom_fails_as_a_whole(party: Party, tls: TlsWorld) -> None:
    mailroom = tls.mailroom("one", "two")
    for relay in tls.relays:
        await relay.stop()
    found = await mail(party, mailroom)
    assert {check.status for check in found.values()} == {"failed"}
    assert exit_code(found.values()) == 4


async def test_relays_of_the_directorys_own_operator_are_no_relays(party: Party, tls: TlsWorld) -> None:
    found = await mail(party, tls.mailroom("the directory's", "the directory's"))
    assert {check.status for check in found.values()} == {"failed"}
    assert exit_code(found.values()) == 2


async def test_a_directory_that_forgets_is_told(party: Party) -> None:
    class Forgetful(MemoryMailroom):
        async def exchange(self, directory: Any, keys: Any, request: Any, **told: Any) -> Any:
            carried = await super().exchange(directory, keys, request, **told)
            return replace(carried, reply=replace(carried.reply, body=b"")) if request.method == "GET" else carried

    assert "did not give back" in (await mail(party, Forgetful()))["directory"].why
    good = await mail(party, MemoryMailroom())
    assert [check.status for check in good.values()] == ["ok"] * 3


# ---------------------------------------------------------------- wallet and chain


@pytest.mark.parametrize(
    ("method", "value", "check", "status", "says"),
    [
        ("network", Network.SIGNET, "wallet", "failed", "the wallet is on signet"),
        ("can_sign", False, "wallet", "failed", "cannot sign"),
        ("coins", (), "coins", "failed", "no channel can be opened"),
        ("fingerprint", NotNow("the node is away"), "wallet", "failed", "the node is away"),
        ("fingerprint", WrongUsage("a wrong password"), "wallet", "failed", "a wrong password"),
    ],
)
async def test_what_a_wallet_lacks_is_told(
    party: Party, method: str, value: Any, check: str, status: str, says: str
) -> None:
    found = (await checked(party, wallet=Port(party.wallet, **{method: answering(value)})))[check]
    assert found.status == status
    assert says in found.why
    assert found.todo


async def test_coins_that_are_pledged_or_not_native_are_a_warning(world: World, party: Party) -> None:
    (coin,) = await party.wallet.coins()
    pledged = await checked(party, store=Port(party.store, coins_in_use=answering({coin.outpoint: "a" * 32})))
    assert pledged["coins"].status == "warning"
    assert "pledged to open sessions" in pledged["coins"].why
    old = await world.party("old", coins=[100_000], kinds=("p2sh-p2wpkh",))
    found = (await checked(old, config()))["coins"]
    assert (found.status, "1 of 1 free coins are not native segwit" in found.why) == ("warning", True)


async def test_without_lightning_no_coin_is_only_a_warning(world: World) -> None:
    empty = await world.party("empty")
    found = await checked(empty, config())
    assert found["coins"].status == "warning"
    assert "payments arrive as ordinary ones" in found["coins"].why
    assert "an input that does not exist" in found["original"].why


@pytest.mark.parametrize(
    ("methods", "check", "status", "says"),
    [
        ({"genesis_hash": Network.SIGNET.genesis_hash}, "chain", "failed", "block 0"),
        ({"test": Suitability("unverifiable", "no kernel")}, "original", "failed", "no kernel"),
        ({"test": Suitability("accepted")}, "original", "failed", "worth nothing"),
        ({"fee_rate": FeeRate.from_sat_per_vb(80)}, "fees", "warning", "max_fee_rate is 50"),
        ({"fee_rate": FeeRate.from_sat_per_vb("0.5")}, "fees", "warning", "min_fee_rate is 1"),
        ({"tip": Tip(5, "00" * 32, 4_000_000_000.0)}, "clock", "failed", "clock is"),
    ],
)  # fmt: skip
async def test_what_a_chain_source_lacks_is_told(
    party: Party, methods: dict[str, Any], check: str, status: str, says: str
) -> None:
    chain = Port(party.world.chain, **{name: answering(value) for name, value in methods.items()})
    found = (await checked(party, chain=chain))[check]
    assert found.status == status
    assert says in found.why
    assert found.todo


async def test_an_old_tip_is_a_warning_where_blocks_come_by_themselves(party: Party) -> None:
    old = Port(party.world.chain, tip=answering(Tip(5, "00" * 32, 1_600_000_000.0)))
    assert (await checked(party, chain=old))["clock"].status == "ok"
    assert "is not synced" in (await checked(party, config(network="signet"), chain=old))["clock"].why


async def test_the_made_up_transaction_is_one_that_no_chain_takes(world: World, party: Party) -> None:
    taproot = await world.party("taproot", coins=[100_000], kinds=("p2tr",))
    coins = [None, *(await party.wallet.coins()), *(await taproot.wallet.coins())]
    for coin in coins:
        verdict = await world.chain.test(made_up(coin, FeeRate.from_sat_per_vb(2), SystemEntropy()).raw)
        assert verdict.verdict == "refused"
        assert ("missing" in verdict.reason) is (coin is None)


async def test_requests_that_nobody_paid_are_counted_towards_the_gap(party: Party) -> None:
    for _ in range(20):
        await start.receive(party.driver, Network.REGTEST, 100_000, policy=Policy())
    found = (await checked(party))["gap"]
    assert found.status == "warning"
    assert "the last 20 addresses" in found.why
    assert "gap limit above 20" in found.todo


# ---------------------------------------------------------------- lightning


async def test_a_node_that_is_not_ready_says_why(party: Party) -> None:
    node = Port(party.node, node=answering(NodeInfo("02" + "11" * 32, False, "it is syncing")))
    found = (await checked(party, channels=node))["lightning"]
    assert (found.status, "it is syncing" in found.why) == ("failed", True)
    enough = Port(party.node, anchor_reserve=answering(0))
    assert (await checked(party, channels=enough))["lightning"].status == "ok"
    denied = Port(party.node, node=answering(WrongUsage("the macaroon lacks onchain:write")))
    found = (await checked(party, channels=denied))["lightning"]
    assert (found.status, found.usage) == ("failed", True)


async def test_peers_of_planned_channels_are_tried(world: World, party: Party) -> None:
    first, second = world.peers(2)
    orders = [ChannelOrder(*peer.uri.split("@"), 40_000) for peer in (first, second)]
    await start.receive(party.driver, Network.REGTEST, 200_000, policy=Policy(), channels=orders[:1], deposit=True)
    async with schedule.changing(party.store, SystemEntropy()) as plans:
        await plans.add(orders[1], world.clock.now(), SystemEntropy())
    assert (await checked(party))["peers"].why == "all 2 peers of planned channels are connected"
    away = Port(party.node, connect=answering(NotNow("nobody listens")))
    found = (await checked(party, channels=away))["peers"]
    assert (found.status, found.why.count("nobody listens")) == ("warning", 2)
    blocked = Port(party.store, blocked_peers=answering({orders[0].peer: 10_000}))
    assert "until block 10_000" in (await checked(party, store=blocked))["peers"].why
