"""A Core wallet that answers what it should not: the guards before a lock, a payment and a signature, without a real node."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal

import pytest

from pjv2.backends.bitcoind_rpc import sats_of
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, Tx, TxIn, TxOut, address_to_script, build_psbt, script_to_address
from pjv2.units import FeeRate, Network, Outpoint
from tests.unit.backends.fake_node import GENESIS, SILENCE, Error, fake_node

NOW = 1_000_000.0
ID, OTHER = b"\x01" * 32, b"\x02" * 32
RATE = FeeRate.from_sat_per_vb(2)
OURS, CHANGE = (b"\x00\x14" + bytes([number]) * 20 for number in (1, 2))
THEIRS = p2wsh_script(b"theirs")
PAYMENT = TxOut(50_000, THEIRS)
XPUB = "wpkh([ce94f0e3/84h/1h/0h]tpubExample/0/*)#0aancch8"
INFO = {
    "private_keys_enabled": True, "descriptors": True, "scanning": False, "lastprocessedblock": {"height": 200, "hash": GENESIS},
}  # fmt: skip


def descriptor(desc=XPUB, **more):
    return {"desc": desc, "timestamp": 1_700_000_000, "active": True, "internal": False, "next_index": 0} | more


def parent(number, script=OURS, value=200_000):
    return Tx(2, number, (TxIn(Outpoint("ab" * 32, number), witness=(b"",)),), (TxOut(value, script),))


class FakeWallet:
    """Coins, locks and calls; `compose` and `process` are what a test makes them."""

    def __init__(self, *coins):
        self.txs = {tx.txid: tx for tx in coins}
        self.locked = []
        self.spent = set()
        self.compose = self.payment
        self.process = lambda psbt: psbt
        self.ours = {OURS, CHANGE}
        self.results = {
            "getwalletinfo": INFO,
            "listdescriptors": {"descriptors": [descriptor()]},
            "gettransaction": lambda params: (
                {"hex": self.txs[params[0]].raw.hex()}
                if params[0] in self.txs
                else Error(-5, "non-wallet transaction id")
            ),
            "getaddressinfo": lambda params: {"ismine": _script(params[0]) in self.ours},
            "listlockunspent": lambda params: [{"txid": one.txid, "vout": one.vout} for one in self.locked],
            "lockunspent": self.lockunspent,
            "gettxout": lambda params: None if Outpoint(*params[:2]) in self.spent else {"value": 1},
            "listunspent": [],
            "walletcreatefundedpsbt": self.walletcreatefundedpsbt,
            "walletprocesspsbt": lambda params: {"psbt": self.process(Psbt.from_base64(params["psbt"])).to_base64()},
        }

    def lockunspent(self, params):
        coins = [Outpoint(one["txid"], one["vout"]) for one in params[1]]
        if params[0]:
            self.locked = [one for one in self.locked if one not in coins]
        else:
            assert params[2] is True, "a lock must survive the node's restart"
            self.locked += [one for one in coins if one not in self.locked]
        return True

    def payment(self, payments, *, change=None, inputs=None):
        coins = [Outpoint(txid, 0) for txid in self.txs] if inputs is None else inputs
        rest = change or TxOut(200_000 * len(self.txs) - sum(out.value for out in payments) - 300, CHANGE)
        tx = Tx(2, 200, tuple(TxIn(coin) for coin in coins), (*payments, rest))
        return build_psbt(tx, {coin: TxOut(200_000, OURS) for coin in coins}), len(payments)

    def walletcreatefundedpsbt(self, params):
        payments = [TxOut(sats_of(Decimal(value)), _script(at)) for one in params[1] for at, value in one.items()]
        made = self.compose(payments)
        if isinstance(made, Error):
            return made
        psbt, changepos = made
        return {"psbt": psbt.to_base64(), "changepos": changepos, "fee": 0}


def _script(address):
    return address_to_script(address, Network.REGTEST)


@asynccontextmanager
async def wallet_over(fake, home, now=NOW, **more):
    async with fake_node(results=fake.results) as node:
        wallet = BitcoindWallet(node.rpc("w"), home, now=lambda: now, **more)
        try:
            yield node, wallet
        finally:
            await wallet.close()


def leases(home):
    files = list(home.glob("*.leases"))
    return json.loads(files[0].read_text())["leases"] if files else {}


def asked(node, method):
    return [call["params"] for request in node.requests for call in request if call["method"] == method]


# ---------------------------------------------------------------- who it is


async def test_the_name_is_of_the_oldest_descriptor_so_that_new_ones_do_not_change_it(tmp_path):
    async def name_of(*descriptors, network=Network.REGTEST):
        fake = FakeWallet()
        fake.results |= {"listdescriptors": {"descriptors": list(descriptors)}}
        async with wallet_over(fake, tmp_path) as (_, wallet):
            return await wallet.fingerprint()

    younger = descriptor("tr([ce94f0e3/86h/1h/0h]tpubOther/0/*)#qqqqqqqq", timestamp=1_800_000_000)
    older = descriptor("wpkh(tpubOlder/0/*)#qqqqqqqq", timestamp=1)
    name = await name_of(descriptor())
    assert len(name) == 16
    assert name == await name_of(younger, descriptor()) == await name_of(descriptor(), younger)
    assert name != await name_of(descriptor(), older)


@pytest.mark.parametrize(
    ("results", "kind", "words"),
    [
        ({"getwalletinfo": INFO | {"descriptors": False}, "listdescriptors": Error(-4, "not available")}, WrongUsage, "migratewallet"),
        ({"getwalletinfo": INFO | {"scanning": {"progress": 0.25}}}, NotNow, "looks through old blocks .25%."),
        ({"getwalletinfo": Error(-32601, "Method not found")}, WrongUsage, "built with its wallet"),
        ({"getwalletinfo": Error(-19, "Multiple wallets")}, WrongUsage, "/wallet/NAME"),
        ({"getwalletinfo": Error(-18, "not loaded"), "loadwallet": Error(-4, "already in use")}, NotNow, "cannot be loaded now"),
        ({"getwalletinfo": Error(-18, "not loaded"), "loadwallet": Error(-18, "not found")}, WrongUsage, "createwallet"),
        ({"getwalletinfo": Error(-18, "not loaded"), "loadwallet": Error(-35, "already loaded")}, NotNow, "not loaded"),
        ({"listdescriptors": {"descriptors": []}}, WrongUsage, "makes no addresses"),
        ({"listdescriptors": {"descriptors": [descriptor("wsh(multi(1,tpubA/*,tpubB/*))#x")]}}, WrongUsage, "makes no addresses"),
        ({"listdescriptors": {"descriptors": [{}]}}, CannotRead, "listdescriptors"),
        ({"getwalletinfo": {}}, CannotRead, "getwalletinfo"),
        ({"getnetworkinfo": {"version": 270000}}, WrongUsage, "needs Bitcoin Core 29"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
async def test_a_wallet_that_will_not_do_says_why(results, kind, words, tmp_path):
    fake = FakeWallet()
    fake.results |= results
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(kind, match=words):
            await wallet.fingerprint()


async def test_addresses_are_of_the_first_type_that_the_wallet_makes_unless_one_is_asked_for(tmp_path):
    fake = FakeWallet()
    kinds = [descriptor("tr(tpub/0/*)#x"), descriptor("pkh(tpub/0/*)#x"), descriptor("wpkh(tpub/0/*)#x", active=False)]
    address = script_to_address(OURS, Network.REGTEST)
    fake.results |= {
        "listdescriptors": {"descriptors": kinds},
        "getnewaddress": address,
        "getaddressinfo": {"ismine": True, "hdkeypath": "m/86h/1h/0h/0/17"},
    }
    async with wallet_over(fake, tmp_path) as (node, wallet):
        made = await wallet.new_address()
        assert (made.address, made.script, made.index) == (address, OURS, 17)
        assert asked(node, "getnewaddress") == [["", "bech32m"]]
    async with wallet_over(fake, tmp_path, address_type="legacy") as (node, wallet):
        await wallet.new_address()
        assert asked(node, "getnewaddress") == [["", "legacy"]]
        node.results["getnewaddress"] = Error(-12, "Keypool ran out")
        with pytest.raises(NotNow, match="no fresh address: unlock it"):
            await wallet.new_address()
    async with wallet_over(fake, tmp_path, address_type="bech32") as (_, wallet):
        with pytest.raises(WrongUsage, match="makes no bech32 addresses"):
            await wallet.new_address()


@pytest.mark.parametrize(
    ("more", "signs"),
    [
        ({}, True),
        ({"unlocked_until": 0}, False),
        ({"unlocked_until": 4_000_000_000}, True),
        ({"private_keys_enabled": False}, False),
        ({"external_signer": True}, False),
    ],
)
async def test_a_wallet_signs_while_it_has_keys_and_is_unlocked(more, signs, tmp_path):
    fake = FakeWallet()
    fake.results["getwalletinfo"] = INFO | more
    async with wallet_over(fake, tmp_path) as (_, wallet):
        assert await wallet.can_sign() is signs


async def test_a_node_that_is_away_cannot_sign(tmp_path):
    async with wallet_over(FakeWallet(), tmp_path) as (node, wallet):
        node.next = [Error(-28, "Loading")] * 1
        node.accepts = lambda login: False
        assert not await wallet.can_sign()


# ---------------------------------------------------------------- locks


async def test_a_coin_that_somebody_else_locked_is_neither_taken_nor_opened(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    outpoint = Outpoint(coin.txid, 0)
    fake.locked = [outpoint]
    async with wallet_over(fake, tmp_path) as (_, wallet):
        assert await wallet.lock([outpoint], ID, NOW + 600) == (outpoint,)
        await wallet.unlock([outpoint], ID)
    assert fake.locked == [outpoint]
    assert leases(tmp_path) == {}


async def test_a_lock_under_another_id_is_not_opened(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    outpoint = Outpoint(coin.txid, 0)
    async with wallet_over(fake, tmp_path) as (_, wallet):
        assert await wallet.lock([outpoint], ID, NOW + 600) == ()
        await wallet.unlock([outpoint], OTHER)
        assert fake.locked == [outpoint]
        assert list(leases(tmp_path)) == [str(outpoint)]


async def test_a_lease_is_on_disk_before_the_node_is_asked_to_lock(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    found = []

    def lockunspent(params):
        found.append(list(leases(tmp_path)))
        return Error(-8, "Invalid parameter, expected unspent output")

    fake.results["lockunspent"] = lockunspent
    outpoint = Outpoint(coin.txid, 0)
    async with wallet_over(fake, tmp_path) as (_, wallet):
        assert await wallet.lock([outpoint], ID, NOW + 600) == (outpoint,)
    assert found == [[str(outpoint)]]
    assert leases(tmp_path) == {}


async def test_a_lock_whose_answer_was_lost_is_repeated_or_ends_by_itself(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    outpoint = Outpoint(coin.txid, 0)
    async with fake_node(results=fake.results) as node:
        wallet = BitcoindWallet(node.rpc("w", timeout=0.1), tmp_path, now=lambda: NOW)
        await wallet.mine([outpoint])
        # The next request after this one, which locks, is not answered.
        node.results["listlockunspent"] = lambda params: (node.next.append(SILENCE), [])[1]
        with pytest.raises(NotNow):
            await wallet.lock([outpoint], ID, NOW + 600)
        node.results["listlockunspent"] = fake.results["listlockunspent"]
        assert list(leases(tmp_path)) == [str(outpoint)]
        assert await wallet.lock([outpoint], ID, NOW + 600) == ()
        await wallet.close()
        later = BitcoindWallet(node.rpc("w"), tmp_path, now=lambda: NOW + 601)
        await later.fingerprint()
        await later.close()
    assert fake.locked == []
    assert leases(tmp_path) == {}


async def test_one_of_many_locks_that_is_gone_does_not_keep_the_others(tmp_path):
    coins = [parent(number) for number in (1, 2)]
    fake = FakeWallet(*coins)
    outpoints = [Outpoint(coin.txid, 0) for coin in coins]
    async with wallet_over(fake, tmp_path) as (_, wallet):
        assert await wallet.lock(outpoints, ID, NOW + 600) == ()

        def picky(params):
            if len(params[1]) > 1:
                return Error(-8, "Invalid parameter, expected locked output")
            return fake.lockunspent(params)

        fake.results["lockunspent"] = picky
        async with wallet_over(fake, tmp_path) as (_, second):
            await second.unlock(outpoints, ID)
    assert (fake.locked, leases(tmp_path)) == ([], {})


async def test_a_turn_that_somebody_keeps_is_not_waited_for_for_ever(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    async with wallet_over(fake, tmp_path) as (_, first), wallet_over(fake, tmp_path, patience=0.05) as (_, second):
        await asyncio.gather(first.fingerprint(), second.fingerprint())
        async with first._alone():
            with pytest.raises(NotNow, match="in use by another pjv2"):
                await second.lock([Outpoint(coin.txid, 0)], ID, NOW + 600)


# ---------------------------------------------------------------- paying


async def pay(wallet, payment=PAYMENT, **more):
    return await wallet.fund([payment], RATE, ID, NOW + 600, **more)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda fake, payments: fake.payment(payments, change=TxOut(140_000, p2wsh_script(b"a thief"))),
        lambda fake, payments: fake.payment([replace(payments[0], value=60_000)]),
        lambda fake, payments: fake.payment([]),
        lambda fake, payments: fake.payment([*payments, TxOut(10_000, CHANGE)]),
        lambda fake, payments: fake.payment(payments, inputs=[Outpoint("cd" * 32, 0)]),
        lambda fake, payments: (fake.payment(payments)[0], 0),
        lambda fake, payments: (_replaced(fake.payment(payments)[0], version=1), 1),
        lambda fake, payments: (_replaced(fake.payment(payments)[0], final=True), 1),
    ],
    ids=[
        "change of a thief",
        "another value",
        "no payment",
        "two changes",
        "a foreign coin",
        "change elsewhere",
        "version",
        "final",
    ],
)
async def test_a_payment_that_is_not_the_one_asked_for_is_not_signed_and_nothing_stays_locked(wrong, tmp_path):
    fake = FakeWallet(parent(1))
    fake.compose = lambda payments: wrong(fake, payments)
    async with wallet_over(fake, tmp_path) as (node, wallet):
        with pytest.raises(NotNow, match="built another payment than the one asked for"):
            await pay(wallet)
        assert asked(node, "walletprocesspsbt") == []
    assert (fake.locked, leases(tmp_path)) == ([], {})


def _replaced(psbt, *, version=2, final=False):
    inputs = tuple(replace(txin, sequence=0xFFFFFFFF) for txin in psbt.tx.inputs) if final else psbt.tx.inputs
    return replace(psbt, tx=Tx(version, psbt.tx.locktime, inputs, psbt.tx.outputs))


async def test_a_payment_with_another_fee_is_not_made(tmp_path):
    fake = FakeWallet(parent(1))
    fake.compose = lambda payments: fake.payment(payments, change=TxOut(100_000, CHANGE))
    async with wallet_over(fake, tmp_path) as (_, wallet):
        wallet._check_signed = lambda *args: None
        with pytest.raises(NotNow, match="another fee than the one asked for"):
            await pay(wallet)
    assert (fake.locked, leases(tmp_path)) == ([], {})


async def test_a_coin_to_avoid_is_not_spent_even_when_the_wallet_takes_it(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(NotNow, match="another payment"):
            await pay(wallet, avoid=frozenset({Outpoint(coin.txid, 0)}))
    assert (fake.locked, leases(tmp_path)) == ([], {})


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Error(-6, "Insufficient funds"), WrongUsage, "cannot pay 50000 sat plus the fee now: Insufficient funds"),
        (Error(-4, "The total exceeds your balance when the fee is included."), WrongUsage, "cannot pay 50000"),
        (
            Error(-4, "Transaction amount too small"),
            WrongUsage,
            "cannot build this payment: Transaction amount too small",
        ),
        (Error(-4, "Error: Keypool ran out"), NotNow, "no fresh address for change"),
        (Error(-1, "something else"), NotNow, "refuses walletcreatefundedpsbt: something else"),
    ],
)
async def test_a_payment_that_cannot_be_built_says_why(error, kind, words, tmp_path):
    fake = FakeWallet(parent(1))
    fake.compose = lambda payments: error
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(kind, match=words):
            await pay(wallet)


async def test_a_coin_that_was_spent_between_choice_and_lock_is_not_signed_away(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    fake.spent = {Outpoint(coin.txid, 0)}
    async with wallet_over(fake, tmp_path) as (node, wallet):
        with pytest.raises(NotNow, match="locked or spent meanwhile"):
            await pay(wallet)
        assert asked(node, "walletprocesspsbt") == []


# ---------------------------------------------------------------- signing


def joint(coin):
    theirs = Outpoint("ee" * 32, 3)
    tx = Tx(2, 0, (TxIn(theirs), TxIn(Outpoint(coin.txid, 0))), (TxOut(220_000, THEIRS),))
    inputs = (
        PsbtInput(witness_utxo=TxOut(40_000, THEIRS), final_script_witness=(b"\x51",)),
        PsbtInput(witness_utxo=coin.outputs[0]),
    )
    return Psbt(tx, inputs, (PsbtOutput(),))


async def test_the_wallet_is_shown_nothing_of_a_foreign_input_that_it_could_sign(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    shown = []
    fake.process = lambda psbt: (shown.append(psbt), psbt)[1]
    psbt = joint(coin)
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(NotNow, match="does not hold"):
            await wallet.sign(psbt.serialize(), [Outpoint(coin.txid, 0)])
    (shadow,) = shown
    assert shadow.inputs[0] == PsbtInput(witness_utxo=TxOut(40_000, THEIRS), final_script_witness=(b"\x51",))
    assert shadow.inputs[1] == PsbtInput(witness_utxo=coin.outputs[0])


async def test_a_transaction_that_was_changed_while_it_was_signed_is_not_taken(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    fake.process = lambda psbt: replace(psbt, tx=replace(psbt.tx, locktime=7))
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(NotNow, match="changed the transaction"):
            await wallet.sign(joint(coin).serialize(), [Outpoint(coin.txid, 0)])


async def test_the_value_of_a_coin_is_the_wallets_not_the_psbts(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    shown = []
    fake.process = lambda psbt: (shown.append(psbt), psbt)[1]
    psbt = joint(coin)
    lie = replace(psbt, inputs=(psbt.inputs[0], replace(psbt.inputs[1], witness_utxo=TxOut(400_000, OURS))))
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(NotNow):
            await wallet.sign(lie.serialize(), [Outpoint(coin.txid, 0)])
    assert shown[0].inputs[1].witness_utxo == coin.outputs[0]


async def test_what_is_not_ours_not_spent_or_signed_otherwise_is_refused_before_the_wallet_is_asked(tmp_path):
    coin, other = parent(1), parent(2)
    fake = FakeWallet(coin, other)
    psbt = joint(coin)
    part = replace(psbt, inputs=(psbt.inputs[0], replace(psbt.inputs[1], sighash_type=0x83)))
    async with wallet_over(fake, tmp_path) as (node, wallet):
        for given, named, words in (
            (psbt, Outpoint("ee" * 32, 3), "not a coin of this wallet"),
            (psbt, Outpoint(other.txid, 0), "not spent by the PSBT"),
            (part, Outpoint(coin.txid, 0), "neither ALL nor DEFAULT"),
        ):
            with pytest.raises(WrongUsage, match=words):
                await wallet.sign(given.serialize(), [named])
        with pytest.raises(WrongUsage, match="no PSBT"):
            await wallet.sign(b"psbt", [])
        assert asked(node, "walletprocesspsbt") == []


async def test_a_wallet_that_tells_another_transaction_is_not_believed(tmp_path):
    coin = parent(1)
    fake = FakeWallet(coin)
    fake.results["gettransaction"] = {"hex": parent(2).raw.hex()}
    async with wallet_over(fake, tmp_path) as (_, wallet):
        with pytest.raises(CannotRead, match="gettransaction"):
            await wallet.mine([Outpoint(coin.txid, 0)])
