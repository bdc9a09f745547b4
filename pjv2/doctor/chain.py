"""The chain source: its network, whether its word on a payer's transaction is worth anything, and this machine's clock."""

from __future__ import annotations

from collections.abc import Sequence

from pjv2.doctor.installation import Check, Installation
from pjv2.errors import PayjoinError
from pjv2.ports import Entropy
from pjv2.psbt.plan import Coin
from pjv2.psbt.tx import ScriptKind, Tx, TxIn, TxOut
from pjv2.units import FeeRate, Network, Outpoint
from pjv2.wire.secp import SecretKey

_TIP_AGE = 4 * 3_600
_SEQUENCE = 0xFFFFFFFD


async def check_chain(it: Installation) -> Sequence[Check]:
    """The chain source is on the configured network and knows a tip."""
    chain = await it.chain()
    genesis, wanted = await chain.genesis_hash(), it.config.network.genesis_hash
    if genesis != wanted:
        why = f"the chain source's block 0 is {genesis[:16]}…, that of {it.config.network.value} is {wanted[:16]}…"
        return [Check("chain", "failed", why, "Correct network, or [chain] url.", usage=True)]
    tip = await chain.tip()
    return [Check("chain", "ok", f"on {it.config.network.value}, at block {tip.height:_}")]


async def check_original(it: Installation) -> Sequence[Check]:
    """The chain source can tell a bad transaction from a good one: a made-up one must be refused."""
    chain = await it.chain()
    coin = await _a_coin(it)
    tx = made_up(coin, await chain.fee_rate(6), it.rng)
    verdict = await chain.test(tx.raw)
    if verdict.verdict == "refused":
        how = "with a false signature on a coin of ours" if coin is not None else "with an input that does not exist"
        return [Check("original", "ok", f"the chain source refuses a made-up transaction {how}")]
    if verdict.verdict == "unverifiable":
        why = f"the chain source cannot tell whether the network would take a payer's transaction: {verdict.reason}"
        todo = "Use a source that can ([chain] backend = bitcoind), or install what is named."
        return [Check("original", "failed", why, todo, usage=True)]
    why = f"the chain source calls a transaction {verdict.verdict} that cannot be: its word is worth nothing"
    return [Check("original", "failed", why, "Use another one: [chain] url.", usage=True)]


async def _a_coin(it: Installation) -> Coin | None:
    """The largest coin of ours: the source knows of it already."""
    try:
        coins = await (await it.wallet()).coins()
    except PayjoinError:
        return None  # the wallet's own check tells
    return max(coins, key=lambda coin: coin.txout.value, default=None)


def made_up(coin: Coin | None, rate: FeeRate, rng: Entropy) -> Tx:
    """A transaction that can never be valid: a false signature on `coin`, or an output that does not exist."""
    if coin is None:
        outpoint, value, script = Outpoint(rng.token(32).hex(), 0), 100_000, b"\x00\x14" + rng.token(20)
    else:
        outpoint, value, script = coin.outpoint, coin.txout.value, coin.txout.script
    # DER's form of r = s = 1, and a point of the curve that is nobody's key.
    signature, key = bytes.fromhex("300602010102010101"), SecretKey.generate(rng).public.compressed
    witness = (bytes(64),) if coin is not None and coin.txout.kind is ScriptKind.P2TR else (signature, key)
    fee = min(max(1_000, rate.fee(4 * 150)), value // 2)
    return Tx(2, 0, (TxIn(outpoint, b"", _SEQUENCE, witness),), (TxOut(value - fee, script),))


async def check_clock(it: Installation) -> Sequence[Check]:
    """This machine's clock and the chain's agree: expiry and fallback are by the clock."""
    tip = await (await it.chain()).tip()
    behind = it.clock.now() - tip.median_time
    if behind < -60:
        why = f"this machine's clock is {-behind / 60:.0f} min behind the median time of the last eleven blocks"
        return [Check("clock", "failed", why, "Set the clock (NTP): requests would expire at the wrong time.")]
    if it.config.network is not Network.REGTEST and behind > _TIP_AGE:
        why = f"the chain source's tip is {behind / 3600:.1f} h old by this clock: it is not synced, or the clock is ahead"
        return [Check("clock", "warning", why, "Let the source sync, and set the clock (NTP).")]
    return [Check("clock", "ok", "the clock agrees with the chain")]
