"""The wallet: whether it signs, has a coin for a payjoin, and would be found again whole from its seed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from pjv2.doctor.installation import Check, Installation
from pjv2.doctor.store import state_of
from pjv2.errors import PayjoinError
from pjv2.ports import Store
from pjv2.session.events import Outcome
from pjv2.session.receive import Receiver
from pjv2.units import Outpoint

GAP_LIMIT = 20
"""Unused addresses in a row after which wallets stop looking when they are restored (BIP44, "Address gap limit")."""
_GAP_OF_BITCOIND = 1_000
_LOOKED_AT = 60


async def check_wallet(it: Installation) -> Sequence[Check]:
    """The wallet answers, is on the configured network, and can sign."""
    wallet = await it.wallet()
    network, fingerprint = await wallet.network(), await wallet.fingerprint()
    if network is not it.config.network:
        why = f"the wallet is on {network.value}, the configuration says {it.config.network.value}"
        return [Check("wallet", "failed", why, "Correct network, or name another wallet.", usage=True)]
    if not await wallet.can_sign():
        why = f"the wallet {fingerprint} cannot sign now: it is locked, or has no private keys"
        how = " (bitcoin-cli walletpassphrase)" if it.config.wallet.backend == "bitcoind" else ""
        todo = f"Unlock it{how}, or give keys that sign: nothing can be proposed or paid."
        return [Check("wallet", "failed", why, todo)]
    return [Check("wallet", "ok", f"the wallet {fingerprint} on {network.value} can sign")]


async def check_coins(it: Installation) -> Sequence[Check]:
    """A confirmed, free, native segwit coin is there to take part in a payjoin."""
    coins = await (await it.wallet()).coins()
    pledged = await _pledged(it)
    free = [coin for coin in coins if coin.outpoint not in pledged]
    channels = it.config.lightning.backend != "none"
    stopped = channels and it.config.policy.own_input == "require"
    fallback = "no channel can be opened" if stopped else "payments arrive as ordinary ones"
    if not free:
        held = f"all {len(coins)} coins are pledged to open sessions" if coins else "there is no confirmed coin"
        why = f"{held}: {fallback}, for a payjoin takes a coin of ours"
        return [Check("coins", "failed" if stopped and not coins else "warning", why, "Send some coins to the wallet.")]
    native = [coin for coin in free if coin.txout.kind.is_native_segwit]
    if len(native) < len(free):
        why = f"{len(free) - len(native)} of {len(free)} free coins are not native segwit"
        if not native:
            why += "; they cost more, and differ from what most payers spend"
        return [Check("coins", "warning", why, "Send them to a native segwit address (bc1q…, bc1p…) of the wallet.")]
    value = sum(coin.txout.value for coin in free)
    return [Check("coins", "ok", f"{len(free)} free coins of {value:_} sat together, confirmed and native segwit")]


async def _pledged(it: Installation) -> frozenset[Outpoint]:
    try:
        return frozenset(await (await it.store()).coins_in_use())
    except PayjoinError:
        return frozenset()  # the store's own check tells


async def check_gap(it: Installation) -> Sequence[Check]:
    """How many requests in a row were never paid to their address: a restored wallet stops looking after so many."""
    limit = _GAP_OF_BITCOIND if it.config.wallet.backend == "bitcoind" else GAP_LIMIT
    unused = 0
    async for state in _receivers(await it.store()):
        if _used_its_address(state):
            break
        unused += 1
    if unused >= limit:
        why = f"the last {unused} addresses handed out were not paid to: a wallet restored from its seed may stop before them"
        todo = f"Restore with a gap limit above {unused}, or send a coin to the newest address of the wallet."
        return [Check("gap", "warning", why, todo)]
    return [Check("gap", "ok", f"{unused} addresses in a row unused, of {limit} that a restored wallet looks past")]


async def _receivers(store: Store) -> AsyncIterator[Receiver]:
    """The latest requests, newest first."""
    for row in [row for row in await store.rows() if row.role == "receiver"][:_LOOKED_AT]:
        state = await state_of(store, row.session)
        if isinstance(state, Receiver):
            yield state


def _used_its_address(state: Receiver) -> bool:
    """Whether the chain shows a payment to the session's address. A payjoin into channels does not pay it."""
    if state.late or any(sight.what in {"address", "original"} for sight in state.sightings):
        return True
    closed = state.closed
    return closed is not None and (
        closed.outcome in {Outcome.PAID_BY_FALLBACK, Outcome.PAID_OTHERWISE}
        or (closed.outcome is Outcome.PAID and not closed.channels)
    )
