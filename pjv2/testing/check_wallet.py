"""The contract of a wallet, as named checks that run over every implementation of `pjv2.ports.Wallet`.

A check gets a rig: a fresh wallet on a regtest chain, and the power to pay it and to mine. It says what is wrong by raising
`AssertionError`, and raises `unittest.SkipTest` (which pytest understands) when the rig lacks a power that it needs. Run all with
`check_wallet(make)`, or one test per check over `WALLET_CHECKS`.

Law: a check uses only what the protocols promise, and the chain has the last word on every signature.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias
from unittest import SkipTest

from pjv2.errors import NotNow, PayjoinError, WrongUsage
from pjv2.ports import Chain, Wallet
from pjv2.psbt.coin import Coin, signature_hash_types
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, Tx, TxIn, TxOut, address_to_script, build_psbt
from pjv2.testing.contract import hold, nothing, run_checks
from pjv2.units import FeeRate, Instant, Outpoint, Sats

ANYONE = p2wsh_script(b"\x51")
"""A script that anyone spends, by the witness `(b"\\x51",)`: a foreign party without keys."""

_RATE = FeeRate.from_sat_per_vb(7)
_COIN: Sats = 200_000
_ID = b"\x01" * 32
_OTHER_ID = b"\x02" * 32


@dataclass(frozen=True, slots=True)
class WalletRig:
    """A fresh wallet without money and the world around it.

    `fund(script, value)` pays a script and returns once that is confirmed; `mine(n)` mines to somebody else. `settle()` returns
    once the wallet has seen the chain's tip and mempool. Optional powers: `reopen` closes the wallet and opens it again from what
    it stored; `advance` lets time pass for lock expiry; `lock_signing` locks and unlocks the keys; `mine_to` mines a block to a
    script and returns its coinbase output.
    """

    wallet: Wallet
    chain: Chain
    fund: Callable[[bytes, Sats], Awaitable[Outpoint]]
    mine: Callable[[int], Awaitable[object]]
    settle: Callable[[], Awaitable[None]] = nothing
    now: Callable[[], Instant] = time.time
    reopen: Callable[[], Awaitable[Wallet]] | None = None
    advance: Callable[[float], Awaitable[None]] | None = None
    lock_signing: Callable[[bool], Awaitable[None]] | None = None
    mine_to: Callable[[bytes], Awaitable[Outpoint]] | None = None


WalletCheck: TypeAlias = Callable[[WalletRig], Awaitable[None]]
MakeWalletRig: TypeAlias = Callable[[], AbstractAsyncContextManager[WalletRig]]
"""Makes a rig with a fresh wallet, and takes it down."""


async def check_wallet(make: MakeWalletRig) -> None:
    """Run the whole contract, each check over a fresh rig. Raises AssertionError naming the check that failed."""
    await run_checks(WALLET_CHECKS, make)


# ---------------------------------------------------------------- identity and addresses


async def a_wallet_has_a_stable_name_on_one_network(rig: WalletRig) -> None:
    name = await rig.wallet.fingerprint()
    hold(bool(name), "the fingerprint is empty")
    hold(name == await rig.wallet.fingerprint(), "the fingerprint changed")
    network = await rig.wallet.network()
    hold(network.genesis_hash == await rig.chain.genesis_hash(), "wallet and chain are of two networks")


async def every_address_is_fresh_and_says_its_script(rig: WalletRig) -> None:
    network = await rig.wallet.network()
    seen = [await rig.wallet.new_address(change=change) for change in (False, False, True, True, False)]
    hold(len({address.script for address in seen}) == len(seen), "an address was given out twice")
    for address in seen:
        hold(address_to_script(address.address, network) == address.script, "address and script differ")


async def an_address_is_not_given_out_again_after_a_restart(rig: WalletRig) -> None:
    name = await rig.wallet.fingerprint()
    before = {(await rig.wallet.new_address()).script for _ in range(3)}
    wallet = await _reopened(rig)
    hold(await wallet.fingerprint() == name, "the fingerprint changed with the restart")
    hold((await wallet.new_address()).script not in before, "an address was given out again")


async def money_to_an_old_address_is_found_after_a_restart(rig: WalletRig) -> None:
    address = await rig.wallet.new_address()
    await rig.wallet.new_address()
    wallet = await _reopened(rig)
    outpoint = await rig.fund(address.script, _COIN)
    await rig.settle()
    hold(outpoint in await wallet.mine([outpoint]), "the wallet does not know its coin")
    hold(outpoint in {coin.outpoint for coin in await wallet.coins()}, "the wallet does not offer its coin")


# ---------------------------------------------------------------- coins


async def a_confirmed_payment_is_a_coin(rig: WalletRig) -> None:
    hold(await rig.wallet.coins() == () and await rig.wallet.balance() == 0, "a fresh wallet holds money")
    address = await rig.wallet.new_address()
    outpoint = await rig.fund(address.script, _COIN)
    await rig.settle()
    coins = await rig.wallet.coins()
    hold([coin.outpoint for coin in coins] == [outpoint], "it is not the only coin")
    hold(coins[0].txout == TxOut(_COIN, address.script), "its value or script is wrong")
    hold(coins[0].height == (await rig.chain.tip()).height, "its height is wrong")
    hold(await rig.wallet.balance() == _COIN, "the balance is wrong")
    hold(await rig.wallet.mine([outpoint]) == {outpoint}, "it is not ours")


async def a_coin_of_somebody_else_is_not_ours(rig: WalletRig) -> None:
    address = await rig.wallet.new_address()
    ours = await rig.fund(address.script, _COIN)
    theirs = await rig.fund(ANYONE, _COIN)
    await rig.settle()
    unknown = Outpoint("ab" * 32, 0)
    beside = Outpoint(ours.txid, ours.vout + 7)
    hold(await rig.wallet.mine([ours, theirs, unknown, beside]) == {ours}, "a foreign coin is called ours")
    hold(await rig.wallet.mine([]) == frozenset(), "nothing was asked")
    refused = await rig.wallet.lock([theirs], _ID, rig.now() + 600)
    hold(tuple(refused) == (theirs,), "a foreign coin was locked")


async def an_unconfirmed_coin_is_ours_but_is_not_offered(rig: WalletRig) -> None:
    await _funded(rig)
    address = await rig.wallet.new_address()
    tx = await _pay(rig, [TxOut(30_000, address.script)])
    fresh = Outpoint(tx.txid, [out.script for out in tx.outputs].index(address.script))
    hold(fresh in await rig.wallet.mine([fresh]), "an unconfirmed coin is not ours")
    hold(fresh not in {coin.outpoint for coin in await rig.wallet.coins()}, "an unconfirmed coin is offered")
    await rig.mine(1)
    await rig.settle()
    hold(fresh in {coin.outpoint for coin in await rig.wallet.coins()}, "the confirmed coin is not offered")


async def a_spent_coin_stays_ours_and_is_gone_from_the_purse(rig: WalletRig) -> None:
    coin = await _funded(rig)
    await _pay(rig, [TxOut(30_000, ANYONE)])
    for when in ("unconfirmed", "confirmed"):
        await rig.settle()
        hold(coin.outpoint in await rig.wallet.mine([coin.outpoint]), f"after the {when} spend it is not ours")
        offered = {held.outpoint for held in await rig.wallet.coins()}
        hold(coin.outpoint not in offered, f"after the {when} spend it is offered")
        refused = await rig.wallet.lock([coin.outpoint], _OTHER_ID, rig.now() + 600)
        hold(tuple(refused) == (coin.outpoint,), f"after the {when} spend it was locked")
        await rig.mine(1)


async def an_immature_coinbase_is_not_offered(rig: WalletRig) -> None:
    if rig.mine_to is None:
        raise SkipTest("this rig cannot mine to a script")
    outpoint = await rig.mine_to((await rig.wallet.new_address()).script)
    await rig.settle()
    hold(outpoint in await rig.wallet.mine([outpoint]), "it is not ours")
    await rig.mine(98)
    await rig.settle()
    hold(await rig.wallet.coins() == (), "it is offered a block too early")
    await rig.mine(1)
    await rig.settle()
    hold([coin.outpoint for coin in await rig.wallet.coins()] == [outpoint], "it is not offered when mature")


# ---------------------------------------------------------------- locks


async def a_locked_coin_is_not_offered_and_still_counts(rig: WalletRig) -> None:
    coin = await _funded(rig)
    hold(tuple(await rig.wallet.lock([coin.outpoint], _ID, rig.now() + 600)) == (), "it was not locked")
    hold(await rig.wallet.coins() == (), "a locked coin is offered")
    hold(await rig.wallet.balance() == _COIN, "a locked coin does not count")
    hold(coin.outpoint in await rig.wallet.mine([coin.outpoint]), "a locked coin is not ours")
    await rig.wallet.unlock([coin.outpoint], _ID)
    hold(await rig.wallet.coins() == (coin,), "an unlocked coin is not offered")


async def a_lock_is_repeated_by_its_id_and_refused_to_another(rig: WalletRig) -> None:
    coin = await _funded(rig)
    for until in (600, 1200, 900):
        refused = await rig.wallet.lock([coin.outpoint], _ID, rig.now() + until)
        hold(tuple(refused) == (), "the lock could not be renewed")
    refused = await rig.wallet.lock([coin.outpoint], _OTHER_ID, rig.now() + 600)
    hold(tuple(refused) == (coin.outpoint,), "another id took the lock")
    await rig.wallet.unlock([coin.outpoint], _OTHER_ID)
    hold(await rig.wallet.coins() == (), "another id opened the lock")
    for _ in range(2):
        await rig.wallet.unlock([coin.outpoint], _ID)
    hold(tuple(await rig.wallet.lock([coin.outpoint], _OTHER_ID, rig.now() + 600)) == (), "the lock is still held")


async def coins_are_locked_together_or_not_at_all(rig: WalletRig) -> None:
    first, second = await _funded(rig), await _funded(rig)
    await rig.wallet.lock([second.outpoint], _OTHER_ID, rig.now() + 600)
    refused = await rig.wallet.lock([first.outpoint, second.outpoint], _ID, rig.now() + 600)
    hold(tuple(refused) == (second.outpoint,), "it does not say which coin was refused")
    hold([coin.outpoint for coin in await rig.wallet.coins()] == [first.outpoint], "one coin was locked alone")


async def a_lock_survives_a_restart(rig: WalletRig) -> None:
    coin = await _funded(rig)
    await rig.wallet.lock([coin.outpoint], _ID, rig.now() + 600)
    wallet = await _reopened(rig)
    await rig.settle()
    hold(await wallet.coins() == (), "the lock was forgotten")
    refused = await wallet.lock([coin.outpoint], _OTHER_ID, rig.now() + 600)
    hold(tuple(refused) == (coin.outpoint,), "the lock's owner was forgotten")
    hold(tuple(await wallet.lock([coin.outpoint], _ID, rig.now() + 900)) == (), "its owner cannot renew it")


async def a_lock_ends_at_its_time(rig: WalletRig) -> None:
    if rig.advance is None:
        raise SkipTest("this rig cannot let time pass")
    coin = await _funded(rig)
    await rig.wallet.lock([coin.outpoint], _ID, rig.now() + 600)
    await rig.advance(590)
    hold(await rig.wallet.coins() == (), "the lock ended early")
    await rig.advance(20)
    hold([held.outpoint for held in await rig.wallet.coins()] == [coin.outpoint], "the lock did not end")
    hold(tuple(await rig.wallet.lock([coin.outpoint], _OTHER_ID, rig.now() + 600)) == (), "the lock is still held")


# ---------------------------------------------------------------- paying


async def a_payment_is_signed_exact_and_confirms(rig: WalletRig) -> None:
    coin = await _funded(rig)
    payment = TxOut(50_000, ANYONE)
    psbt = Psbt.parse(await rig.wallet.fund([payment], _RATE, _ID, rig.now() + 600))
    tx = psbt.extract()
    hold(tx.txid == psbt.tx.txid or bool(tx.inputs[0].script_sig), "signing changed the transaction")
    hold([out for out in tx.outputs if out == payment] == [payment], "the payment is not in it once")
    hold([spend.outpoint for spend in tx.inputs] == [coin.outpoint], "it spends something else than its coin")
    hold(tx.version == 2 and all(spend.sequence < 0xFFFFFFFE for spend in tx.inputs), "it cannot be replaced")
    fee = _COIN - sum(out.value for out in tx.outputs)
    hold(psbt.fee == fee, "the PSBT does not know its fee")
    hold(
        _RATE.fee(tx.weight) <= fee <= _RATE.fee(tx.weight + 4 * len(tx.inputs) + 4), f"{fee} sat is not the rate asked"
    )
    verdict = await rig.chain.test(tx.raw)
    hold(verdict.verdict in ("accepted", "unverifiable"), f"the network refuses it: {verdict.reason}")
    hold(await rig.wallet.coins() == (), "its input was not locked")
    result = await rig.chain.broadcast(tx.raw)
    hold(result.verdict == "accepted", f"the network refuses it: {result.reason}")
    await rig.mine(1)
    await rig.settle()
    hold(await rig.wallet.balance() == _COIN - payment.value - fee, "the change did not come back")


async def a_payment_takes_as_many_coins_as_it_needs(rig: WalletRig) -> None:
    coins = {(await _funded(rig)).outpoint for _ in range(3)}
    tx = await _pay(rig, [TxOut(_COIN + 50_000, ANYONE), TxOut(_COIN // 2, ANYONE)])
    spent = {spend.outpoint for spend in tx.inputs}
    hold(spent <= coins and len(spent) >= 2, "it spends other coins")
    hold(sum(out.script == ANYONE for out in tx.outputs) == 2, "both payments are not in it")


async def a_payment_leaves_out_the_coins_it_must_avoid(rig: WalletRig) -> None:
    first, second = await _funded(rig), await _funded(rig)
    avoid = frozenset({first.outpoint})
    psbt = Psbt.parse(await rig.wallet.fund([TxOut(20_000, ANYONE)], _RATE, _ID, rig.now() + 600, avoid=avoid))
    hold([spend.outpoint for spend in psbt.tx.inputs] == [second.outpoint], "it took the coin to avoid")
    with suppress(WrongUsage):
        await rig.wallet.fund([TxOut(20_000, ANYONE)], _RATE, _OTHER_ID, rig.now() + 600, avoid=avoid)
        raise AssertionError("a second payment took a locked or avoided coin")


async def a_payment_beyond_its_means_is_refused_and_locks_nothing(rig: WalletRig) -> None:
    coin = await _funded(rig)
    for value in (_COIN, _COIN * 50):
        with suppress(WrongUsage):
            await rig.wallet.fund([TxOut(value, ANYONE)], _RATE, _ID, rig.now() + 600)
            raise AssertionError("money was spent that is not there")
    hold(await rig.wallet.coins() == (coin,), "a refused payment left a lock")


# ---------------------------------------------------------------- signing


async def exactly_the_named_inputs_are_signed_beside_foreign_ones(rig: WalletRig) -> None:
    coin = await _funded(rig)
    psbt = await _joint(rig, [coin])
    signed = Psbt.parse(await rig.wallet.sign(psbt.serialize(), [coin.outpoint]))
    hold(signed.tx == psbt.tx, "signing changed the transaction")
    hold(signed.outputs == psbt.outputs, "signing changed an output's map")
    for spend, before, after in zip(psbt.tx.inputs, psbt.inputs, signed.inputs, strict=True):
        if spend.outpoint == coin.outpoint:
            hold(after.is_final, "our input is not final")
        else:
            hold(after == before, "a foreign input's map was touched")
    await _holds_on_chain(rig, signed)


async def of_two_coins_only_the_named_one_is_signed(rig: WalletRig) -> None:
    first, second = await _funded(rig), await _funded(rig)
    psbt = await _joint(rig, [first, second])
    half = Psbt.parse(await rig.wallet.sign(psbt.serialize(), [second.outpoint]))
    places = {spend.outpoint: known for spend, known in zip(half.tx.inputs, half.inputs, strict=True)}
    hold(places[second.outpoint].is_final, "the named coin is not signed")
    hold(not places[first.outpoint].has_signature, "the other coin is signed too")
    whole = Psbt.parse(await rig.wallet.sign(half.serialize(), [first.outpoint]))
    await _holds_on_chain(rig, whole)


async def signing_again_is_as_good(rig: WalletRig) -> None:
    coin = await _funded(rig)
    psbt = (await _joint(rig, [coin])).serialize()
    first = await rig.wallet.sign(psbt, [coin.outpoint])
    await _holds_on_chain(rig, Psbt.parse(await rig.wallet.sign(psbt, [coin.outpoint])))
    await _holds_on_chain(rig, Psbt.parse(await rig.wallet.sign(first, [coin.outpoint])))


async def a_locked_coin_is_signed_for_its_owner(rig: WalletRig) -> None:
    coin = await _funded(rig)
    await rig.wallet.lock([coin.outpoint], _ID, rig.now() + 600)
    psbt = await _joint(rig, [coin])
    await _holds_on_chain(rig, Psbt.parse(await rig.wallet.sign(psbt.serialize(), [coin.outpoint])))


async def a_foreign_input_is_not_signed(rig: WalletRig) -> None:
    coin = await _funded(rig)
    psbt = await _joint(rig, [coin])
    theirs = next(spend.outpoint for spend in psbt.tx.inputs if spend.outpoint != coin.outpoint)
    for named in ([theirs], [coin.outpoint, theirs], [Outpoint("cd" * 32, 1)]):
        await _refuses(rig.wallet.sign(psbt.serialize(), named), "it signed what is not its own")


async def a_psbt_that_lies_about_our_coin_gets_no_wrong_signature(rig: WalletRig) -> None:
    coin = await _funded(rig)
    psbt = await _joint(rig, [coin])
    lie = TxOut(_COIN * 2, coin.txout.script)
    for told in (lie, None):
        maps = tuple(
            replace(known, witness_utxo=told, non_witness_utxo=None) if spend.outpoint == coin.outpoint else known
            for spend, known in zip(psbt.tx.inputs, psbt.inputs, strict=True)
        )
        try:
            signed = await rig.wallet.sign(replace(psbt, inputs=maps).serialize(), [coin.outpoint])
        except PayjoinError:
            continue
        await _holds_on_chain(rig, Psbt.parse(signed))


async def a_signature_covers_the_whole_transaction(rig: WalletRig) -> None:
    coin = await _funded(rig)
    psbt = await _joint(rig, [coin])
    for kind in (None, 0x02, 0x83):
        maps = tuple(
            replace(known, sighash_type=kind) if spend.outpoint == coin.outpoint else known
            for spend, known in zip(psbt.tx.inputs, psbt.inputs, strict=True)
        )
        try:
            signed = Psbt.parse(await rig.wallet.sign(replace(psbt, inputs=maps).serialize(), [coin.outpoint]))
        except PayjoinError:
            hold(kind is not None, "it does not sign at all")
            continue
        spend = next(spend for spend in signed.extract().inputs if spend.outpoint == coin.outpoint)
        kinds = signature_hash_types(spend, coin.txout)
        hold(bool(kinds) and set(kinds) <= {0, 1}, f"it signed with the types {kinds}")


async def a_locked_wallet_says_so(rig: WalletRig) -> None:
    if rig.lock_signing is None:
        raise SkipTest("this rig cannot lock the wallet")
    coin = await _funded(rig)
    psbt = await _joint(rig, [coin])
    hold(await rig.wallet.can_sign(), "it cannot sign from the start")
    await rig.lock_signing(True)
    hold(not await rig.wallet.can_sign(), "a locked wallet says that it can sign")
    with suppress(NotNow):
        await rig.wallet.sign(psbt.serialize(), [coin.outpoint])
        raise AssertionError("a locked wallet signed")
    await rig.lock_signing(False)
    hold(await rig.wallet.can_sign(), "an unlocked wallet says that it cannot sign")
    await _holds_on_chain(rig, Psbt.parse(await rig.wallet.sign(psbt.serialize(), [coin.outpoint])))


WALLET_CHECKS: tuple[WalletCheck, ...] = (
    a_wallet_has_a_stable_name_on_one_network,
    every_address_is_fresh_and_says_its_script,
    an_address_is_not_given_out_again_after_a_restart,
    money_to_an_old_address_is_found_after_a_restart,
    a_confirmed_payment_is_a_coin,
    a_coin_of_somebody_else_is_not_ours,
    an_unconfirmed_coin_is_ours_but_is_not_offered,
    a_spent_coin_stays_ours_and_is_gone_from_the_purse,
    an_immature_coinbase_is_not_offered,
    a_locked_coin_is_not_offered_and_still_counts,
    a_lock_is_repeated_by_its_id_and_refused_to_another,
    coins_are_locked_together_or_not_at_all,
    a_lock_survives_a_restart,
    a_lock_ends_at_its_time,
    a_payment_is_signed_exact_and_confirms,
    a_payment_takes_as_many_coins_as_it_needs,
    a_payment_leaves_out_the_coins_it_must_avoid,
    a_payment_beyond_its_means_is_refused_and_locks_nothing,
    exactly_the_named_inputs_are_signed_beside_foreign_ones,
    of_two_coins_only_the_named_one_is_signed,
    signing_again_is_as_good,
    a_locked_coin_is_signed_for_its_owner,
    a_foreign_input_is_not_signed,
    a_psbt_that_lies_about_our_coin_gets_no_wrong_signature,
    a_signature_covers_the_whole_transaction,
    a_locked_wallet_says_so,
)


# ---------------------------------------------------------------- small things


async def _refuses(call: Awaitable[object], what: str) -> None:
    try:
        await call
    except PayjoinError:
        return
    raise AssertionError(what)


async def _reopened(rig: WalletRig) -> Wallet:
    if rig.reopen is None:
        raise SkipTest("this rig cannot reopen its wallet")
    return await rig.reopen()


async def _funded(rig: WalletRig) -> Coin:
    """One more confirmed coin of the usual value."""
    address = await rig.wallet.new_address()
    outpoint = await rig.fund(address.script, _COIN)
    await rig.settle()
    coins = {coin.outpoint: coin for coin in await rig.wallet.coins()}
    hold(outpoint in coins, "a confirmed payment is not offered as a coin")
    return coins[outpoint]


async def _pay(rig: WalletRig, payments: Sequence[TxOut]) -> Tx:
    tx = Psbt.parse(await rig.wallet.fund(payments, _RATE, _ID, rig.now() + 600)).extract()
    result = await rig.chain.broadcast(tx.raw)
    hold(result.verdict == "accepted", f"the network refuses the payment: {result.reason}")
    await rig.settle()
    return tx


async def _joint(rig: WalletRig, coins: Sequence[Coin]) -> Psbt:
    """A transaction of our coins and a foreign one, whose owner signed; paying somebody else."""
    theirs = await rig.fund(ANYONE, 40_000)
    inputs = (TxIn(theirs), *(TxIn(coin.outpoint) for coin in coins))
    value = 40_000 + sum(coin.txout.value for coin in coins) - 5_000
    tx = Tx(2, 0, inputs, (TxOut(value - 30_000, ANYONE), TxOut(30_000, ANYONE)))
    prevouts = {theirs: TxOut(40_000, ANYONE)}
    psbt = build_psbt(tx, prevouts)
    maps = [replace(psbt.inputs[0], final_script_witness=(b"\x51",), unknown=((b"\x50note", b"theirs"),))]
    maps += [coin.psbt_input() for coin in coins]
    return replace(psbt, inputs=tuple(maps))


async def _holds_on_chain(rig: WalletRig, psbt: Psbt) -> None:
    verdict = await rig.chain.test(psbt.extract().raw)
    hold(verdict.verdict in ("accepted", "unverifiable"), f"the network refuses the signature: {verdict.reason}")
