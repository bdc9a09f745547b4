"""What every Lightning back end must do, as named checks over a rig: a node, peers, coins and a miner.

A check fails with `BrokenContract`, whose sentence is the check's name and what was seen instead. Each check gets a fresh rig.
The checks know nothing of a back end beyond `pjv2.ports.Channels`; what real nodes show only when they are tampered with (a
stalled peer, a ghost) is not asked here.

Law: the contract is what the session relies on, so a check is named by the accident it prevents or the promise it holds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pjv2.errors import NotNow, PayjoinError, PeerMistake
from pjv2.ports import Channels
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.proposal import Funding
from pjv2.psbt.tx import Psbt, PsbtInput, ScriptKind, TxOut, kind_of
from pjv2.session.facts import NodeChannel, ReservedChannel
from pjv2.units import Outpoint, Sats, Txid

CAPACITY: Sats = 500_000

E = TypeVar("E", bound=BaseException)


class BrokenContract(AssertionError):
    """The implementation does not do what its port promises; the message says which promise."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer as an order names it: 66 hex characters, and `host:port`."""

    peer: str
    host: str


class ChannelRig(Protocol):
    """One fresh world for one check."""

    node: Channels
    peers: Sequence[PeerAddress]
    """At least two, reachable, each taking one pending channel."""
    offline_peer: PeerAddress
    """A peer that does not answer."""

    async def pay(self, outputs: Sequence[TxOut]) -> bytes:
        """An unsigned PSBT with a native segwit input that exists, UTXO data, a fee, and first of all these outputs."""
        ...

    async def confirm(self, psbt: bytes) -> None:
        """Sign that PSBT, broadcast it, and mine as many blocks as the node wants; return when the node has seen them."""
        ...

    async def reopen(self) -> Channels:
        """Close our connection to the node and make another, as a restart of our program does; the node runs on."""
        ...


def _expect(true: bool, seen: str) -> None:
    if not true:
        raise BrokenContract(seen)


async def _refused(kind: type[E], work: Awaitable[Any], what: str) -> E:
    try:
        answer = await work
    except kind as refusal:
        _expect(bool(str(refusal)), f"{what} was refused without a word")
        return refusal
    except PayjoinError as other:
        raise BrokenContract(f"{what} raised {type(other).__name__}, not {kind.__name__}") from other
    raise BrokenContract(f"{what} was not refused: {answer!r}")


def _id(number: int) -> bytes:
    return bytes([number]) * 32


def _order(rig: ChannelRig, place: int = 0, *, capacity: Sats = CAPACITY) -> ChannelOrder:
    # Private: no anchor reserve is asked of a node whose wallet may be empty.
    return ChannelOrder(rig.peers[place].peer, rig.peers[place].host, capacity, private=True)


async def _reserve(rig: ChannelRig, number: int = 1, *, place: int = 0, memo: str = "check") -> ReservedChannel:
    await rig.node.connect(rig.peers[place].peer, rig.peers[place].host)
    return await rig.node.reserve(_id(number), _order(rig, place), memo)


async def _fund(rig: ChannelRig, *reserved: ReservedChannel) -> tuple[bytes, Txid, list[Funding]]:
    psbt = await rig.pay([TxOut(channel.capacity, channel.script) for channel in reserved])
    funding = [Funding(n, n, channel.capacity, channel.script) for n, channel in enumerate(reserved)]
    return psbt, Psbt.parse(psbt).tx.txid, funding


async def _listed(node: Channels, memo: str, outpoint: Outpoint) -> NodeChannel | None:
    return next((channel for channel in await node.channels(memo) if channel.outpoint == outpoint), None)


async def reserving_gives_a_funding_script_and_the_exact_capacity(rig: ChannelRig) -> None:
    reserved = await _reserve(rig)
    _expect(reserved.id == _id(1), "the answer carries another id")
    _expect(reserved.capacity == CAPACITY, f"the capacity is {reserved.capacity}, not {CAPACITY}")
    _expect(len(reserved.script) == 34, f"the script has {len(reserved.script)} bytes")
    _expect(kind_of(reserved.script) in (ScriptKind.P2WSH, ScriptKind.P2TR), "the script is neither P2WSH nor P2TR")


async def two_channels_never_share_a_funding_script(rig: ChannelRig) -> None:
    one, other = await _reserve(rig, 1), await _reserve(rig, 2, place=1)
    _expect(one.script != other.script, "both reservations have the same script")


async def a_reservation_is_not_listed_with_an_outpoint(rig: ChannelRig) -> None:
    await _reserve(rig)
    _expect(all(c.outpoint is None for c in await rig.node.channels("check")), "a reservation has an outpoint already")


async def a_secured_channel_is_pending_with_its_memo_outpoint_and_backup(rig: ChannelRig) -> None:
    reserved = await _reserve(rig, memo="pj:check")
    psbt, txid, (funding,) = await _fund(rig, reserved)
    secured = await rig.node.secure(_id(1), psbt, txid, funding)
    _expect(secured.id == _id(1), "the answer carries another id")
    _expect(secured.outpoint == Outpoint(txid, funding.vout), f"secured for {secured.outpoint}")
    _expect(len(secured.backup) > 0, "there is no backup")
    listed = await _listed(rig.node, "pj:check", secured.outpoint)
    _expect(listed is not None and listed.state == "pending", f"the node lists {listed}")
    _expect(listed is not None and listed.peer == rig.peers[0].peer, "it is listed for another peer")
    _expect(listed is not None and listed.capacity == CAPACITY, "it is listed with another capacity")
    _expect(listed is not None and listed.memo == "pj:check", "its memo is not the one we gave")


async def channels_are_listed_by_memo(rig: ChannelRig) -> None:
    one, other = await _reserve(rig, 1, memo="pj:one"), await _reserve(rig, 2, place=1, memo="pj:other")
    psbt, txid, funding = await _fund(rig, one, other)
    for number in (0, 1):
        await rig.node.secure(_id(number + 1), psbt, txid, funding[number])
    _expect([c.outpoint for c in await rig.node.channels("pj:one")] == [Outpoint(txid, 0)], "a foreign memo is listed")
    _expect(await rig.node.channels("pj:nobody") == (), "a memo that nobody gave has channels")
    everything = {channel.outpoint for channel in await rig.node.channels()}
    _expect({Outpoint(txid, 0), Outpoint(txid, 1)} <= everything, "without a memo not everything is listed")


async def securing_twice_is_securing_once(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    first = await rig.node.secure(_id(1), psbt, txid, funding)
    again = await rig.node.secure(_id(1), psbt, txid, funding)
    _expect((again.id, again.outpoint) == (first.id, first.outpoint), "the second answer differs")
    _expect(len(await rig.node.channels("check")) == 1, "there is more than one channel")


async def securing_refuses_another_transaction(rig: ChannelRig) -> None:
    psbt, _, (funding,) = await _fund(rig, await _reserve(rig))
    await _refused(PayjoinError, rig.node.secure(_id(1), psbt, "ab" * 32, funding), "another txid")
    _expect(await _pending(rig) == [], "a channel is pending for it")


async def securing_refuses_another_amount(rig: ChannelRig) -> None:
    reserved = await _reserve(rig)
    psbt = await rig.pay([TxOut(CAPACITY - 1, reserved.script)])
    funding = Funding(0, 0, CAPACITY - 1, reserved.script)
    await _refused(
        PayjoinError, rig.node.secure(_id(1), psbt, Psbt.parse(psbt).tx.txid, funding), "an output 1 sat short"
    )
    _expect(await _pending(rig) == [], "a channel is pending for it")


async def securing_refuses_another_script(rig: ChannelRig) -> None:
    reserved = await _reserve(rig)
    stranger = b"\x00\x20" + bytes(32)
    psbt = await rig.pay([TxOut(CAPACITY, stranger)])
    funding = Funding(0, 0, CAPACITY, stranger)
    await _refused(PayjoinError, rig.node.secure(_id(1), psbt, Psbt.parse(psbt).tx.txid, funding), "a foreign script")
    _expect(reserved.script != stranger and await _pending(rig) == [], "a channel is pending for it")


async def securing_refuses_an_input_without_utxo_data(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    parsed = Psbt.parse(psbt)
    bare = Psbt(parsed.tx, tuple(PsbtInput() for _ in parsed.inputs), parsed.outputs)
    await _refused(PayjoinError, rig.node.secure(_id(1), bare.serialize(), txid, funding), "a PSBT without UTXO data")
    _expect(await _pending(rig) == [], "a channel is pending for it")


async def a_refused_psbt_leaves_the_reservation_usable(rig: ChannelRig) -> None:
    reserved = await _reserve(rig)
    short = await rig.pay([TxOut(CAPACITY - 1, reserved.script)])
    wrong = Funding(0, 0, CAPACITY - 1, reserved.script)
    await _refused(PayjoinError, rig.node.secure(_id(1), short, Psbt.parse(short).tx.txid, wrong), "a wrong amount")
    psbt, txid, (funding,) = await _fund(rig, reserved)
    secured = await rig.node.secure(_id(1), psbt, txid, funding)
    _expect(secured.outpoint == Outpoint(txid, 0), "the good PSBT did not secure it")


async def securing_without_a_reservation_is_refused(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    await _refused(PayjoinError, rig.node.secure(_id(9), psbt, txid, funding), "an id that was never reserved")


async def a_cancelled_reservation_frees_the_peer(rig: ChannelRig) -> None:
    await _reserve(rig, 1)
    await rig.node.cancel(_id(1))
    again = await rig.node.reserve(_id(2), _order(rig), "check")
    _expect(again.id == _id(2), "the peer does not take another reservation")


async def a_cancelled_reservation_cannot_be_secured(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    await rig.node.cancel(_id(1))
    await _refused(PayjoinError, rig.node.secure(_id(1), psbt, txid, funding), "a cancelled reservation")
    _expect(await _pending(rig) == [], "a channel is pending for it")


async def cancelling_what_is_unknown_is_fine(rig: ChannelRig) -> None:
    await rig.node.cancel(_id(7))
    await rig.node.cancel(_id(7))


async def cancelling_does_not_touch_a_pending_channel(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    await rig.node.secure(_id(1), psbt, txid, funding)
    await rig.node.cancel(_id(1))
    _expect(await _pending(rig) == [Outpoint(txid, 0)], "the channel is no longer pending")


async def a_second_pending_channel_is_the_peers_refusal(rig: ChannelRig) -> None:
    await _reserve(rig, 1)
    await _refused(PeerMistake, rig.node.reserve(_id(2), _order(rig), "check"), "a second channel with one peer")


async def a_peer_that_is_offline_is_not_now(rig: ChannelRig) -> None:
    offline = rig.offline_peer
    await _refused(NotNow, rig.node.connect(offline.peer, offline.host), "connecting to it")
    order = ChannelOrder(offline.peer, offline.host, CAPACITY, private=True)
    await _refused(NotNow, rig.node.reserve(_id(1), order, "check"), "reserving with it")


async def connecting_twice_is_fine(rig: ChannelRig) -> None:
    await rig.node.connect(rig.peers[0].peer, rig.peers[0].host)
    await rig.node.connect(rig.peers[0].peer, rig.peers[0].host)


async def disconnecting_drops_the_reservations_on_both_sides(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    await rig.node.disconnect(rig.peers[0].peer)
    await _refused(PayjoinError, rig.node.secure(_id(1), psbt, txid, funding), "a reservation of a peer that left")
    _expect(await _pending(rig) == [], "a channel is pending for it")
    again = await _reserve(rig, 2)
    _expect(again.id == _id(2), "the peer does not take another reservation")


async def disconnecting_keeps_pending_channels_and_may_be_repeated(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    await rig.node.secure(_id(1), psbt, txid, funding)
    await rig.node.disconnect(rig.peers[0].peer)
    await rig.node.disconnect(rig.peers[0].peer)
    await rig.node.disconnect(rig.offline_peer.peer)
    _expect(await _pending(rig) == [Outpoint(txid, 0)], "the channel is no longer pending")


async def abandoning_twice_is_abandoning_once(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    secured = await rig.node.secure(_id(1), psbt, txid, funding)
    for _ in (1, 2):
        await rig.node.abandon(secured.outpoint)
        _expect(await _pending(rig) == [], "the channel is still pending")
    await rig.node.abandon(Outpoint("cd" * 32, 3))


async def an_abandoned_channel_keeps_its_slot_at_the_peer(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    secured = await rig.node.secure(_id(1), psbt, txid, funding)
    await rig.node.abandon(secured.outpoint)
    await _refused(PeerMistake, rig.node.reserve(_id(2), _order(rig), "check"), "a new channel beside the abandoned")


async def reservations_and_channels_survive_a_restart_of_ours(rig: ChannelRig) -> None:
    one, other = await _reserve(rig, 1), await _reserve(rig, 2, place=1)
    psbt, txid, funding = await _fund(rig, one, other)
    await rig.node.secure(_id(1), psbt, txid, funding[0])
    node = await rig.reopen()
    listed = await _listed(node, "check", Outpoint(txid, 0))
    _expect(listed is not None and listed.state == "pending", f"the node lists {listed}")
    _expect(listed is not None and bool(listed.backup), "a listed pending channel has no backup")
    await node.cancel(_id(2))
    again = await node.reserve(_id(3), _order(rig, 1), "check")
    _expect(again.id == _id(3), "the peer's slot could not be freed after the restart")


async def a_confirmed_funding_output_opens_the_channel(rig: ChannelRig) -> None:
    psbt, txid, (funding,) = await _fund(rig, await _reserve(rig))
    secured = await rig.node.secure(_id(1), psbt, txid, funding)
    await rig.confirm(psbt)
    listed = await _listed(rig.node, "check", secured.outpoint)
    _expect(listed is not None and listed.state == "open", f"the node lists {listed}")


async def the_node_is_ready_and_the_reserve_grows_with_public_channels(rig: ChannelRig) -> None:
    info = await rig.node.node()
    _expect(info.ready and len(bytes.fromhex(info.pubkey)) == 33, f"the node says {info}")
    _expect(0 < info.min_capacity <= CAPACITY <= info.max_capacity, "the limits leave no room for a channel")
    reserves = [await rig.node.anchor_reserve(count) for count in (0, 1, 2)]
    _expect(reserves[0] == 0 and reserves == sorted(reserves), f"the reserve for 0, 1, 2 channels is {reserves}")
    script = await rig.node.reserve_script()
    _expect(kind_of(script) is not ScriptKind.OTHER, "the reserve script is no standard script")


Check = Callable[[ChannelRig], Awaitable[None]]

CHANNEL_CHECKS: tuple[Check, ...] = (
    reserving_gives_a_funding_script_and_the_exact_capacity,
    two_channels_never_share_a_funding_script,
    a_reservation_is_not_listed_with_an_outpoint,
    a_secured_channel_is_pending_with_its_memo_outpoint_and_backup,
    channels_are_listed_by_memo,
    securing_twice_is_securing_once,
    securing_refuses_another_transaction,
    securing_refuses_another_amount,
    securing_refuses_another_script,
    securing_refuses_an_input_without_utxo_data,
    a_refused_psbt_leaves_the_reservation_usable,
    securing_without_a_reservation_is_refused,
    a_cancelled_reservation_frees_the_peer,
    a_cancelled_reservation_cannot_be_secured,
    cancelling_what_is_unknown_is_fine,
    cancelling_does_not_touch_a_pending_channel,
    a_second_pending_channel_is_the_peers_refusal,
    a_peer_that_is_offline_is_not_now,
    connecting_twice_is_fine,
    disconnecting_drops_the_reservations_on_both_sides,
    disconnecting_keeps_pending_channels_and_may_be_repeated,
    abandoning_twice_is_abandoning_once,
    an_abandoned_channel_keeps_its_slot_at_the_peer,
    reservations_and_channels_survive_a_restart_of_ours,
    a_confirmed_funding_output_opens_the_channel,
    the_node_is_ready_and_the_reserve_grows_with_public_channels,
)


async def check_channels(make: Callable[[], AbstractAsyncContextManager[ChannelRig]]) -> None:
    """Run every check, each on a fresh rig from `make`. Raises BrokenContract naming the first promise that is not kept."""
    for check in CHANNEL_CHECKS:
        async with make() as rig:
            try:
                await check(rig)
            except BrokenContract as broken:
                raise BrokenContract(f"{check.__name__.replace('_', ' ')}: {broken}") from broken


async def _pending(rig: ChannelRig) -> list[Outpoint | None]:
    return [channel.outpoint for channel in await rig.node.channels("check") if channel.state == "pending"]
