"""`export`: accounts of real payments on the lab add up to the satoshi, as table, JSON and labels."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from pjv2 import start
from pjv2.accounts import Account, ChannelEntry, Label, accounts, as_csv, as_facts, labels
from pjv2.cli import export
from pjv2.cli.command import Cli
from pjv2.lab.world import Party, World
from pjv2.psbt.plan import ChannelOrder
from pjv2.session.events import Policy
from pjv2.units import FeeRate, Network, Outpoint

TWO = FeeRate.from_sat_per_vb(2)
ENTRY = Account(
    session="ab" * 16,
    role="receiver",
    network="regtest",
    label="a coffee",
    note=None,
    order="order-1",
    address="bcrt1qexample",
    created=1_700_000_000.0,
    closed=1_700_000_600.0,
    outcome="Paid",
    payjoin=True,
    txid="11" * 32,
    height=7,
    amount_requested=100_000,
    amount_received=99_000,
    amount_sent=None,
    contributed=50_000,
    returned=149_000,
    fee_ours=1_000,
    fee_theirs=300,
    fee_extra=0,
    channels=(ChannelEntry(Outpoint("11" * 32, 1), 60_000),),
)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World() as found:
        yield found


async def pay(world: World, shop: Party, payer: Party, *, channels: bool, label: str) -> str:
    """A payjoin from request to burial; answers its transaction."""
    orders = [ChannelOrder(*world.peers(1)[0].uri.split("@"), None)] if channels else []
    request = await start.receive(
        shop.driver,
        Network.REGTEST,
        100_000,
        policy=Policy(),
        channels=orders,
        deposit=channels,
        label=label,
        order=label,
    )
    payment = await start.send(payer.driver, Network.REGTEST, request.uri, policy=Policy(), rate=TWO)
    async with asyncio.TaskGroup() as both:
        both.create_task(shop.driver.drive(request.session, lambda state: state.closed is not None))
        both.create_task(payer.driver.drive(payment.session, lambda state: state.closed is not None))
        seen = await shop.diary.until("Seen", request.session)
        await world.chain.mine(6)
    return str(seen.facts["txid"])


@pytest.mark.parametrize("channels", [False, True], ids=["plain", "channels"])
async def test_both_sides_accounts_of_a_payjoin_add_up_to_the_transaction(world: World, channels: bool) -> None:
    shop = await world.party("shop", coins=[300_000], lightning=channels)
    payer = await world.party("payer", coins=[500_000])
    txid = await pay(world, shop, payer, channels=channels, label="a coffee")
    (got,), (gave,) = await accounts(shop.store), await accounts(payer.store)
    known = world.chain.tx(txid)
    assert known is not None
    inputs = await world.chain.prevouts([txin.outpoint for txin in known.tx.inputs])
    total = sum(prevout.txout.value for prevout in inputs.values())
    fee = total - sum(txout.value for txout in known.tx.outputs)

    assert (got.role, got.outcome, got.payjoin, got.txid, got.height) == ("receiver", "Paid", True, txid, known.height)
    assert (gave.role, gave.outcome, gave.payjoin, gave.txid, gave.height) == (
        "sender",
        "Paid",
        True,
        txid,
        known.height,
    )
    assert None not in (got.contributed, got.returned, got.amount_received, got.fee_ours, got.fee_theirs)
    assert (got.amount_requested, got.contributed) == (100_000, 300_000)
    assert got.contributed + got.amount_received == got.returned
    assert got.amount_received + got.fee_ours == 100_000
    assert got.contributed + gave.contributed == total
    assert gave.amount_sent == 100_000
    assert gave.contributed == gave.returned + gave.amount_sent + gave.fee_ours
    assert got.returned + gave.returned + fee == total
    assert got.fee_ours + got.fee_theirs == fee == gave.fee_ours + gave.fee_theirs
    assert (got.fee_ours, got.fee_theirs) == (gave.fee_theirs, gave.fee_ours)
    assert len(got.channels) == channels
    for channel in got.channels:
        assert known.tx.outputs[channel.outpoint.vout].value == channel.capacity
    assert got.closed is not None
    assert got.created < got.closed


async def test_a_payment_that_the_original_made_has_no_share_of_ours(world: World) -> None:
    shop, payer = await world.party("shop"), await world.party("payer", coins=[500_000])
    txid = await pay(world, shop, payer, channels=False, label="a coffee")
    (got,), (gave,) = await accounts(shop.store), await accounts(payer.store)
    assert (got.outcome, gave.outcome, got.txid) == ("PaidByFallback", "PaidByFallback", txid)
    assert (got.contributed, got.returned, got.fee_ours, got.amount_received) == (0, 100_000, 0, 100_000)
    assert got.fee_theirs == gave.fee_ours
    assert gave.contributed == gave.returned + gave.amount_sent + gave.fee_ours
    assert not got.payjoin


async def test_a_session_that_is_still_open_claims_nothing(world: World) -> None:
    shop = await world.party("shop", coins=[300_000])
    await start.receive(shop.driver, Network.REGTEST, 100_000, policy=Policy(), note="mine alone")
    (got,) = await accounts(shop.store)
    assert (got.outcome, got.closed, got.contributed, got.fee_ours, got.txid) == (None, None, None, None, None)
    assert (got.note, got.amount_requested, got.channels, got.fee_extra) == ("mine alone", 100_000, (), 0)
    assert await accounts(None) == ()


async def test_the_command_writes_each_format_and_no_secret(world: World) -> None:
    shop = await world.party("shop", coins=[300_000], lightning=True)
    payer = await world.party("payer", coins=[500_000])
    txid = await pay(world, shop, payer, channels=True, label="a coffee")
    await start.receive(shop.driver, Network.REGTEST, 5_000, policy=Policy())

    async def written(told: export.Format, *, json: bool = False, closed: bool = False) -> str:
        stdout = io.StringIO()
        store = {"url": f"sqlite:///{shop.home / 'pjv2.sqlite'}"}
        await export.run(Cli(json=json, stdout=stdout, overrides={"store": store}), told, closed)
        return stdout.getvalue()

    table = await written(export.Format.CSV)
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["label"] for row in rows] == ["", "a coffee"]
    assert rows[1]["txid"] == txid
    assert rows[1]["channels"].startswith(f"{txid}:")
    assert (rows[1]["amount_requested"], rows[1]["contributed"]) == ("100000", "300000")
    document = json.loads(await written(export.Format.JSON))
    assert [entry["outcome"] for entry in document] == [None, "Paid"]
    assert document[1]["closed"].endswith("Z")
    assert document[1]["channels"][0]["capacity"] > 0
    assert len(json.loads(await written(export.Format.JSON, closed=True))) == 1
    tagged = [json.loads(line) for line in (await written(export.Format.BIP329)).splitlines()]
    assert {line["type"] for line in tagged} == {"tx", "addr", "output"}
    assert {"type": "tx", "ref": txid, "label": "a coffee (payjoin)"} in tagged
    for told in export.Format:
        lines = [json.loads(line) for line in (await written(told, json=True)).splitlines()]
        assert lines
        assert {line["event"] for line in lines} == {"Label" if told is export.Format.BIP329 else "Account"}
    everything = table + json.dumps(document)
    for record in await shop.store.load(rows[1]["session"]):
        for name in ("receiver_key", "lock_id", "psbt", "message", "body"):
            if secret := json.loads(record.data).get(name):
                assert secret not in everything


# ---------------------------------------------------------------- formats


def test_a_label_cannot_become_a_formula_or_another_row() -> None:
    entry = replace(ENTRY, label='=HYPERLINK("http://x")', note="two\nlines, and a comma", order="-1")
    (row,) = csv.DictReader(io.StringIO(as_csv([entry])))
    assert row["label"] == '\'=HYPERLINK("http://x")'
    assert row["note"] == "two lines, and a comma"
    assert row["order"] == "'-1"
    assert row["amount_received"] == "99000"
    assert as_csv([]).count("\n") == 1


def test_an_account_as_json_has_no_type_that_json_lacks() -> None:
    facts = json.loads(json.dumps(as_facts(ENTRY)))
    assert facts["created"] == "2023-11-14T22:13:20Z"
    assert facts["channels"] == [{"outpoint": "11" * 32 + ":1", "capacity": 60_000}]
    assert as_facts(replace(ENTRY, closed=None))["closed"] is None


def test_labels_name_transaction_address_and_channels_as_bip329_has_them() -> None:
    found = labels([replace(ENTRY, note="table 4", late=("22" * 32,))])
    assert [json.loads(label.line()) for label in found] == [
        {"type": "addr", "ref": "bcrt1qexample", "label": "a coffee / table 4 / order-1"},
        {"type": "tx", "ref": "11" * 32, "label": "a coffee / table 4 / order-1 (payjoin)"},
        {"type": "tx", "ref": "22" * 32, "label": "a coffee / table 4 / order-1 (late payment)"},
        {"type": "output", "ref": "11" * 32 + ":1", "label": "a coffee / table 4 / order-1 (channel 1, 60000 sat)"},
    ]


def test_a_payment_labels_its_transaction_and_not_the_payees_address() -> None:
    paid = replace(ENTRY, role="sender", channels=(), label="rent\n\tMay", order=None, outcome="PaidByFallback")
    assert labels([paid]) == (Label("tx", "11" * 32, "rent May (paid without payjoin)"),)
    nameless = replace(paid, label=" ", txid=None)
    assert labels([nameless]) == ()
    assert labels([replace(nameless, txid="11" * 32)])[0].label == "pjv2 sender abababab (paid without payjoin)"
