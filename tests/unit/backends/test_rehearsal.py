"""The rehearsal node: its commitments hold before real consensus, and every way to fail is the way LND fails."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pjv2.backends.channel.rehearsal import RESERVE_ERROR, Fault, RehearsalNode, RehearsalPeer, Step, make_peers
from pjv2.backends.channel.rehearsal_commitment import ChannelTerms, derive_key, public
from pjv2.backends.channel.rehearsal_peer import PeerDocument, hear, next_answer
from pjv2.backends.channel.rehearsal_state import StateFile
from pjv2.errors import CannotRead, NotNow, PeerMistake, WrongUsage
from pjv2.lab.chain import LabChain
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.proposal import Funding
from pjv2.psbt.scripts import p2sh_script, p2wpkh_script
from pjv2.psbt.tx import Psbt, Tx, TxOut, build_psbt
from pjv2.session.facts import ReservedChannel, SecuredChannel
from pjv2.units import Network, Outpoint
from tests.contract.channel_rig import Purse, RehearsalRig, rehearsal_rig

ID, OTHER = b"\x11" * 32, b"\x22" * 32
CAPACITY = 300_000


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[RehearsalRig]:
    async with rehearsal_rig(tmp_path) as rig:
        yield rig


def order(rig: RehearsalRig, place: int = 0, **changes: Any) -> ChannelOrder:
    peer = rig.remote[place]
    return replace(ChannelOrder(peer.pubkey, peer.host, CAPACITY, private=True), **changes)


async def reserve(rig: RehearsalRig, id: bytes = ID, place: int = 0, **changes: Any) -> ReservedChannel:
    await rig.node.connect(rig.remote[place].pubkey, rig.remote[place].host)
    return await rig.node.reserve(id, order(rig, place, **changes), "memo")


class Offer:
    """A funded PSBT for one reservation."""

    def __init__(self, psbt: bytes, reserved: ReservedChannel) -> None:
        self.psbt, self.id = psbt, reserved.id
        self.txid = Psbt.parse(psbt).tx.txid
        self.outpoint = Outpoint(self.txid, 0)
        self.funding = Funding(0, 0, reserved.capacity, reserved.script)

    async def secure(self, node: RehearsalNode) -> SecuredChannel:
        return await node.secure(self.id, self.psbt, self.txid, self.funding)


async def offer(rig: RehearsalRig, reserved: ReservedChannel) -> Offer:
    return Offer(await rig.pay([TxOut(reserved.capacity, reserved.script)]), reserved)


async def held(rig: RehearsalRig, step: Step, call: Any) -> asyncio.Task[Any]:
    """The call, once it is known to be stalled at the peer."""
    task = asyncio.ensure_future(call)
    await rig.remote[0].until_held(step)
    return task


async def give_up(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---------------------------------------------------------------- the money


@pytest.mark.parametrize("push", [0, 100_000], ids=["all ours", "some pushed to the peer"])
async def test_the_commitment_of_a_secured_channel_confirms_under_real_consensus(rig: RehearsalRig, push: int) -> None:
    deal = await offer(rig, await reserve(rig, push=push))
    secured = await deal.secure(rig.node)
    commitment = Tx.parse(rig.node.commitment(secured.outpoint))
    assert (await rig.chain.broadcast(commitment.raw)).verdict == "refused"  # its money does not exist yet
    await rig.confirm(deal.psbt)
    assert (await rig.chain.broadcast(commitment.raw)).verdict == "accepted"
    await rig.chain.mine()
    ours = sum(output.value for output in commitment.outputs if output.script == rig.node.home_script)
    assert ours == CAPACITY - push - 2_810
    assert len(commitment.outputs) == (2 if push else 1)
    assert [c.state for c in await rig.node.channels()] == ["closed"]


async def test_a_commitment_is_good_for_no_other_transaction(rig: RehearsalRig) -> None:
    reserved = await reserve(rig)
    deal, other = await offer(rig, reserved), await offer(rig, reserved)
    await deal.secure(rig.node)
    await rig.confirm(other.psbt)  # the same script and amount, under another txid
    commitment = Tx.parse(rig.node.commitment(deal.outpoint))
    moved = replace(commitment, inputs=(replace(commitment.inputs[0], outpoint=other.outpoint),))
    assert "script" in (await rig.chain.broadcast(moved.raw)).reason
    assert rig.node.pending() == (deal.outpoint,)


async def test_one_signature_is_not_enough_for_the_commitment(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    await deal.secure(rig.node)
    await rig.confirm(deal.psbt)
    commitment = Tx.parse(rig.node.commitment(deal.outpoint))
    empty, one, _, script = commitment.inputs[0].witness
    for witness in [(empty, one, one, script), (empty, one, script)]:
        alone = replace(commitment, inputs=(replace(commitment.inputs[0], witness=witness),))
        assert (await rig.chain.broadcast(alone.raw)).verdict == "refused"


async def test_money_of_an_abandoned_channel_is_stuck_and_only_the_backup_brings_it_back(
    rig: RehearsalRig, tmp_path: Path
) -> None:
    deal = await offer(rig, await reserve(rig))
    backup = (await deal.secure(rig.node)).backup
    await rig.node.abandon(deal.outpoint)
    await rig.confirm(deal.psbt)
    assert await rig.node.channels() == ()
    assert rig.node.abandoned() == (deal.outpoint,)
    with pytest.raises(WrongUsage, match="no commitment"):
        rig.node.commitment(deal.outpoint)
    assert [c.state for c in rig.remote[0].channels()] == ["open"]
    assert deal.outpoint in rig.chain.utxos(deal.funding.script)
    reborn = RehearsalNode.open(tmp_path / "reborn", rig.chain, seed=b"\x01" * 32, peers=tmp_path / "peers")
    assert (await rig.chain.broadcast(reborn.rescue(backup))).verdict == "accepted"
    await rig.chain.mine()
    assert [o.value for o in rig.chain.utxos(rig.node.home_script).values()] == [CAPACITY - 2_810]


async def test_a_backup_is_useless_to_another_node_and_when_it_was_damaged(rig: RehearsalRig, tmp_path: Path) -> None:
    backup = (await (await offer(rig, await reserve(rig))).secure(rig.node)).backup
    stranger = RehearsalNode.open(tmp_path / "stranger", peers=tmp_path / "peers")
    for node, blob in [
        (stranger, backup),
        (rig.node, backup.replace(b":0", b":1")),
        (rig.node, b""),
        (rig.node, b"{}\n"),
    ]:
        with pytest.raises(CannotRead, match="not a channel backup"):
            node.rescue(blob)


async def test_after_2016_blocks_the_peer_forgets_and_the_backup_is_worth_nothing(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    backup = (await deal.secure(rig.node)).backup
    await rig.node.sync()
    await rig.node.abandon(deal.outpoint)
    peer = rig.remote[0]
    peer.blocks_passed(2_015)
    assert peer.pending() == (deal.outpoint,)
    with pytest.raises(PeerMistake, match="Number of pending channels exceed maximum"):
        await reserve(rig, OTHER)
    await rig.chain.mine()
    await peer.sync(rig.chain)
    assert peer.pending() == ()
    with pytest.raises(PeerMistake, match="does not know the channel"):
        rig.node.rescue(backup)
    await reserve(rig, OTHER)


async def test_a_channel_that_was_not_abandoned_outlives_the_peers_memory(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    await deal.secure(rig.node)
    rig.remote[0].blocks_passed(2_016)
    await rig.confirm(deal.psbt)
    assert (await rig.chain.broadcast(rig.node.commitment(deal.outpoint))).verdict == "accepted"


async def test_a_confirmed_channel_is_not_abandoned(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    await deal.secure(rig.node)
    await rig.confirm(deal.psbt)
    with pytest.raises(WrongUsage, match="holds money"):
        await rig.node.abandon(deal.outpoint)
    assert deal.outpoint in rig.node.commitments()


async def test_a_nested_segwit_input_passes_secure_as_it_does_with_lnd(rig: RehearsalRig) -> None:
    # The port reports what the node says; that such a channel is a trap is for the session's rule 2 to know.
    reserved = await reserve(rig)
    tx = Psbt.parse(await rig.pay([TxOut(CAPACITY, reserved.script)])).tx
    nested = TxOut(CAPACITY + 20_000, p2sh_script(p2wpkh_script(public(derive_key(b"sender", "x")))))
    deal = Offer(build_psbt(tx, {tx.inputs[0].outpoint: nested}).serialize(), reserved)
    assert (await deal.secure(rig.node)).outpoint == deal.outpoint


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d.psbt[:-9], d.txid, d.funding), "cannot be decoded"),
        (lambda d: (d.psbt, "00" * 32, d.funding), "the PSBT is transaction"),
        (lambda d: (d.psbt, d.txid, replace(d.funding, vout=1)), "is funded by output 0"),
        (lambda d: (d.psbt, d.txid, replace(d.funding, value=1)), "is funded by output 0"),
        (lambda d: (d.psbt, d.txid, replace(d.funding, script=b"\x00\x20" + bytes(32))), "is funded by output 0"),
    ],
)
async def test_secure_refuses_what_does_not_fit_and_keeps_the_reservation(
    rig: RehearsalRig, damage: Callable[[Offer], tuple[bytes, str, Funding]], words: str
) -> None:
    deal = await offer(rig, await reserve(rig))
    with pytest.raises(WrongUsage, match=words):
        await rig.node.secure(ID, *damage(deal))
    assert rig.remote[0].pending() == ()
    assert (await deal.secure(rig.node)).outpoint == deal.outpoint


async def test_a_transaction_without_a_fee_is_refused(rig: RehearsalRig) -> None:
    reserved = await reserve(rig)
    tx = Psbt.parse(await rig.pay([TxOut(CAPACITY, reserved.script)])).tx
    free = build_psbt(tx, {tx.inputs[0].outpoint: TxOut(sum(o.value for o in tx.outputs), p2wpkh_script(b"\x02" * 33))})
    with pytest.raises(WrongUsage, match="input amount sum must be larger"):
        await Offer(free.serialize(), reserved).secure(rig.node)


# ---------------------------------------------------------------- the peer


@pytest.mark.parametrize("lie", ["txid", "vout", "capacity", "push", "script"])
def test_the_peer_signs_nothing_but_what_was_agreed(tmp_path: Path, lie: str) -> None:
    (peer,) = make_peers(tmp_path, 1)
    key, home = derive_key(b"us", "funding"), p2wpkh_script(public(derive_key(b"us", "home")))
    asked = {"node_key": public(key).hex(), "node_script": home.hex(), "capacity": CAPACITY, "push": 0}
    with peer.file.change() as raw:
        remote = cast(PeerDocument, raw)
        hear(remote, "us", {"type": "open", "id": "aa", **asked})
        accept = next_answer(remote, "us")
        assert accept is not None
        truth = ChannelTerms(
            public(key), bytes.fromhex(accept["peer_key"]), home, bytes.fromhex(accept["peer_script"]), CAPACITY, 0
        )
        signed_for = Outpoint("cd" * 32, 1)
        told = {"txid": Outpoint("ce" * 32, 1), "vout": Outpoint("cd" * 32, 0)}.get(lie, signed_for)
        terms = {
            "capacity": replace(truth, capacity=CAPACITY + 1),
            "push": replace(truth, push=1_000),
            "script": replace(truth, opener_key=public(derive_key(b"us", "other"))),
        }.get(lie, truth)
        signature = terms.sign(signed_for, key).hex()
        hear(remote, "us", {"type": "created", "id": "aa", "outpoint": str(told), "signature": signature})
        refusal = next_answer(remote, "us")
    assert refusal is not None
    assert refusal["words"].startswith("invalid commitment signature")
    assert peer.pending() == ()
    assert peer.slots_taken() == 0


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"min_channel": 400_000}, "chan size of 0.00300000 BTC is below min chan size of 0.00400000 BTC"),
        ({"max_channel": 200_000}, "chan size of 0.00300000 BTC exceeds maximum chan size of 0.00200000 BTC"),
        ({"pending": 0}, "Number of pending channels exceed maximum"),
    ],
)
async def test_a_peer_refuses_sizes_and_numbers_in_lnds_words(
    rig: RehearsalRig, limits: dict[str, int], words: str
) -> None:
    rig.remote[0].set_limits(**limits)
    with pytest.raises(PeerMistake, match=f"received funding error from {rig.remote[0].pubkey}: chan_id=.*err={words}"):
        await reserve(rig)


async def test_a_peer_that_allows_two_pending_channels_takes_two_and_no_third(rig: RehearsalRig) -> None:
    rig.remote[0].set_limits(pending=2)
    await reserve(rig, ID)
    await reserve(rig, OTHER)
    with pytest.raises(PeerMistake, match="exceed maximum"):
        await reserve(rig, b"\x33" * 32)
    assert rig.remote[0].slots_taken() == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capacity": 19_999}, "channel is too small, the minimum channel size is: 20000 SAT"),
        ({"capacity": 16_777_216}, "the max channel size is: 0.16777215 BTC"),
        ({"push": CAPACITY}, "must be below the local funding amount"),
        ({"push": CAPACITY - 2_809}, "too little of the capacity for the commitment fee"),
    ],
)
async def test_our_node_refuses_amounts_in_lnds_words(rig: RehearsalRig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotNow, match=words):
        await reserve(rig, **changes)


@pytest.mark.parametrize(
    ("id", "changes", "memo", "words"),
    [
        (bytes(32), {}, "", "pending chan ID not set"),
        (b"\x01" * 31, {}, "", "pending chan ID not set"),
        (ID, {}, "m" * 501, "of length 501, exceeds 500"),
        (ID, {"capacity": None}, "", "must be settled"),
        (ID, {"peer": "05" * 33}, "", "invalid public key"),
        (ID, {"kind": "taproot"}, "", "anchors only"),
    ],
)
async def test_a_call_that_makes_no_sense_is_our_mistake(
    rig: RehearsalRig, id: bytes, changes: dict[str, Any], memo: str, words: str
) -> None:
    await reserve(rig, OTHER, place=1)
    with pytest.raises(WrongUsage, match=words):
        await rig.node.reserve(id, order(rig, **changes), memo)


async def test_reserving_the_same_id_again_answers_the_same_and_another_order_is_refused(rig: RehearsalRig) -> None:
    first = await reserve(rig)
    assert await reserve(rig) == first
    with pytest.raises(WrongUsage, match="another reservation"):
        await reserve(rig, push=5_000)
    assert rig.remote[0].slots_taken() == 1


async def test_an_id_used_again_after_its_cancel_gets_new_keys(rig: RehearsalRig) -> None:
    first = await reserve(rig)
    await rig.node.cancel(ID)
    assert (await reserve(rig)).script != first.script


async def test_a_reservation_that_idles_too_long_is_dropped_by_the_peer(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].drop_reservations()
    with pytest.raises(PeerMistake, match="err=funding failed due to internal error"):
        await deal.secure(rig.node)


# ---------------------------------------------------------------- faults, step by step


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.OFFLINE, Fault.LOSE_ANSWER])
async def test_a_peer_that_fails_at_connect_is_not_connected(rig: RehearsalRig, fault: Fault) -> None:
    rig.remote[0].fault(Step.CONNECT, fault)
    with pytest.raises(NotNow, match="connection refused"):
        await reserve(rig)
    assert rig.remote[0].offline is (fault is Fault.OFFLINE)
    rig.remote[0].fault(Step.CONNECT, None)
    rig.remote[0].come_back()
    await reserve(rig)


async def test_an_error_at_connect_can_hide_a_connection(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.CONNECT, Fault.ERROR, once=True)
    with pytest.raises(NotNow, match="EOF"):
        await rig.node.connect(rig.remote[0].pubkey, rig.remote[0].host)
    assert (await rig.node.reserve(ID, order(rig), "memo")).capacity == CAPACITY


async def test_a_peer_at_another_address_is_not_reached(rig: RehearsalRig) -> None:
    with pytest.raises(NotNow, match="connection refused"):
        await rig.node.connect(rig.remote[0].pubkey, "127.0.0.1:1")


async def test_a_stalled_connect_waits_for_the_peer(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.CONNECT, Fault.STALL)
    call = await held(rig, Step.CONNECT, rig.node.connect(rig.remote[0].pubkey, rig.remote[0].host))
    rig.remote[0].resume()
    await call
    await reserve(rig)


@pytest.mark.parametrize(
    ("fault", "error", "words", "slots"),
    [
        (Fault.REFUSE, PeerMistake, "err=channels are not accepted", 0),
        (Fault.OFFLINE, NotNow, "peer disconnected", 0),
        (Fault.LOSE_ANSWER, NotNow, "peer disconnected", 0),
        (Fault.ERROR, NotNow, "our node failed", 0),
    ],
)
async def test_a_fault_at_reserve_leaves_no_reservation(
    rig: RehearsalRig, fault: Fault, error: type[Exception], words: str, slots: int
) -> None:
    rig.remote[0].fault(Step.RESERVE, fault, once=True)
    with pytest.raises(error, match=words):
        await reserve(rig)
    assert rig.node.reserved() == ()
    rig.remote[0].come_back()
    await reserve(rig)
    assert rig.remote[0].slots_taken() == slots + 1


async def test_a_reservation_cancelled_while_the_peer_is_silent_is_freed_when_it_wakes(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.RESERVE, Fault.STALL)
    call = await held(rig, Step.RESERVE, reserve(rig))
    await rig.node.cancel(ID)
    rig.remote[0].resume()
    with pytest.raises(NotNow, match="user canceled funding"):
        await call
    await rig.node.channels()
    assert rig.remote[0].slots_taken() == 0


async def test_a_dropped_reserve_call_keeps_the_slot_until_it_is_cancelled(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.RESERVE, Fault.STALL_ANSWER)
    await give_up(await held(rig, Step.RESERVE, reserve(rig)))
    rig.remote[0].resume()
    await rig.node.channels()
    assert rig.remote[0].slots_taken() == 1
    await rig.node.cancel(ID)
    assert rig.remote[0].slots_taken() == 0


async def test_a_disconnect_ends_a_stalled_reserve(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.RESERVE, Fault.STALL)
    call = await held(rig, Step.RESERVE, reserve(rig))
    await rig.node.disconnect(rig.remote[0].pubkey)
    with pytest.raises(NotNow, match="peer disconnected"):
        await call
    rig.remote[0].resume()
    await reserve(rig)


@pytest.mark.parametrize(
    ("fault", "error", "words", "ours", "theirs"),
    [
        (Fault.REFUSE, PeerMistake, "err=no thanks", 0, 0),
        (Fault.OFFLINE, NotNow, "peer disconnected", 0, 0),
        (Fault.LOSE_ANSWER, NotNow, "peer disconnected", 0, 1),
        (Fault.ERROR, NotNow, "no thanks", 1, 1),
    ],
    ids=["refused: nobody has it", "offline: nobody has it", "a ghost: only the peer has it", "an error: both have it"],
)
async def test_after_an_error_of_secure_the_list_is_the_truth(
    rig: RehearsalRig, fault: Fault, error: type[Exception], words: str, ours: int, theirs: int
) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].fault(Step.SECURE, fault, once=True, words="no thanks")
    with pytest.raises(error, match=words):
        await deal.secure(rig.node)
    assert len(await rig.node.channels("memo")) == ours
    assert len(rig.node.peer_pending()[rig.remote[0].pubkey]) == theirs
    assert rig.remote[0].slots_taken() == theirs
    if ours:
        assert (await deal.secure(rig.node)).outpoint == deal.outpoint


async def test_a_ghost_blocks_the_peer_until_it_forgets(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].fault(Step.SECURE, Fault.LOSE_ANSWER, once=True)
    with pytest.raises(NotNow):
        await deal.secure(rig.node)
    await rig.node.abandon(deal.outpoint)  # our node does not know it: nothing can be done
    with pytest.raises(PeerMistake, match="exceed maximum"):
        await reserve(rig, OTHER)
    rig.remote[0].blocks_passed(2_016)
    await reserve(rig, OTHER)


@pytest.mark.parametrize("stall", [Fault.STALL, Fault.STALL_ANSWER])
async def test_a_cancel_does_not_stop_a_secure_in_flight(rig: RehearsalRig, stall: Fault) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].fault(Step.SECURE, stall)
    await give_up(await held(rig, Step.SECURE, deal.secure(rig.node)))
    await rig.node.cancel(ID)
    assert await rig.node.channels("memo") == ()
    rig.remote[0].resume()
    assert [c.outpoint for c in await rig.node.channels("memo")] == [deal.outpoint]


@pytest.mark.parametrize(("stall", "ghosts"), [(Fault.STALL, 0), (Fault.STALL_ANSWER, 1)])
async def test_a_disconnect_is_the_cut_off_of_a_secure_in_flight(rig: RehearsalRig, stall: Fault, ghosts: int) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].fault(Step.SECURE, stall)
    call = await held(rig, Step.SECURE, deal.secure(rig.node))
    await rig.node.disconnect(rig.remote[0].pubkey)
    with pytest.raises(NotNow, match="peer disconnected"):
        await call
    rig.remote[0].resume()
    await rig.node.connect(rig.remote[0].pubkey, rig.remote[0].host)
    assert await rig.node.channels("memo") == ()
    assert len(rig.remote[0].pending()) == ghosts


async def test_two_calls_that_secure_the_same_channel_get_the_same_answer(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].fault(Step.SECURE, Fault.STALL)
    calls = [await held(rig, Step.SECURE, deal.secure(rig.node)) for _ in range(2)]
    rig.remote[0].resume()
    first, second = await asyncio.gather(*calls)
    assert first == second
    assert rig.node.pending() == (deal.outpoint,)


async def test_a_channel_secured_for_one_transaction_is_not_secured_for_another(rig: RehearsalRig) -> None:
    reserved = await reserve(rig)
    deal, other = await offer(rig, reserved), await offer(rig, reserved)
    await deal.secure(rig.node)
    with pytest.raises(WrongUsage, match=f"being secured for {deal.outpoint}"):
        await other.secure(rig.node)


async def test_too_small_a_reserve_is_an_error_and_a_pending_channel(rig: RehearsalRig) -> None:
    rig.node.set_wallet(9_999)
    deal = await offer(rig, await reserve(rig, private=False))
    with pytest.raises(NotNow, match=RESERVE_ERROR[:40]):
        await deal.secure(rig.node)
    assert [c.state for c in await rig.node.channels("memo")] == ["pending"]
    assert await rig.node.anchor_reserve(1) == 10_000
    assert await rig.node.anchor_reserve(20) == 90_000


async def test_a_reserve_output_of_the_transaction_itself_counts(rig: RehearsalRig) -> None:
    rig.node.set_wallet(0)
    reserved = await reserve(rig, private=False)
    topped = await rig.pay([TxOut(CAPACITY, reserved.script), TxOut(10_000, await rig.node.reserve_script())])
    assert (await Offer(topped, reserved).secure(rig.node)).id == ID


# ---------------------------------------------------------------- restarts, processes, disks


async def test_a_restart_of_the_node_drops_reservations_and_keeps_channels(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    await deal.secure(rig.node)
    other = await offer(rig, await reserve(rig, OTHER, place=1))
    rig.node.restart()
    with pytest.raises(NotNow, match="no funding intent found"):
        await other.secure(rig.node)
    assert [c.outpoint for c in await rig.node.channels()] == [deal.outpoint]
    assert rig.remote[1].slots_taken() == 0


async def test_a_node_that_is_down_or_not_ready_says_so(rig: RehearsalRig) -> None:
    rig.node.stop()
    for call in (rig.node.node(), rig.node.channels(), rig.node.cancel(ID), reserve(rig)):
        with pytest.raises(NotNow, match="starting up"):
            await call
    rig.node.start()
    rig.node.set_why_not("channels cannot be created before the wallet is fully synced")
    info = await rig.node.node()
    assert (info.ready, info.why_not) == (False, "channels cannot be created before the wallet is fully synced")
    with pytest.raises(NotNow, match="fully synced"):
        await reserve(rig)
    rig.node.set_why_not("")
    await reserve(rig)


async def test_a_restart_of_the_peer_drops_its_reservations_and_keeps_its_channels(rig: RehearsalRig) -> None:
    deal = await offer(rig, await reserve(rig))
    rig.remote[0].restart()
    with pytest.raises(NotNow, match="no funding intent found"):
        await deal.secure(rig.node)
    fresh = await offer(rig, await reserve(rig))
    await fresh.secure(rig.node)
    rig.remote[0].restart()
    assert rig.remote[0].pending() == (fresh.outpoint,)


async def test_a_peer_that_dies_mid_call_ends_the_call(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.RESERVE, Fault.STALL)
    call = await held(rig, Step.RESERVE, reserve(rig))
    rig.remote[0].go_offline()
    with pytest.raises(NotNow, match="peer disconnected"):
        await call
    with pytest.raises(NotNow, match="connection refused"):
        await reserve(rig)


async def test_another_process_can_throw_a_switch_and_release_a_stalled_call(rig: RehearsalRig) -> None:
    program = (
        "import sys; from pathlib import Path; from pjv2.backends.channel.rehearsal import *\n"
        "peer = RehearsalPeer(Path(sys.argv[1])); peer.resume(); peer.fault(Step.SECURE, Fault.REFUSE, words='moved')\n"
    )
    rig.remote[0].fault(Step.RESERVE, Fault.STALL)
    call = await held(rig, Step.RESERVE, reserve(rig))
    command = [sys.executable, "-c", program, str(rig.remote[0].file.path.parent)]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=30)
    deal = await offer(rig, await call)
    with pytest.raises(PeerMistake, match="err=moved"):
        await deal.secure(rig.node)


async def test_processes_that_change_one_file_at_once_lose_nothing(tmp_path: Path) -> None:
    (peer,) = make_peers(tmp_path, 1)
    program = (
        "import sys; from pathlib import Path; from pjv2.backends.channel.rehearsal import *\n"
        "peer = RehearsalPeer(Path(sys.argv[1])); print(flush=True); sys.stdin.readline()\n"
        "for _ in range(100): peer.blocks_passed(1)\n"
    )
    command = [sys.executable, "-c", program, str(peer.file.path.parent)]
    pipe = asyncio.subprocess.PIPE
    workers = [await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        await worker.stdout.readline()
    await asyncio.gather(*(worker.communicate(b"\n") for worker in workers))
    assert [worker.returncode for worker in workers] == [0, 0]
    assert peer.file.read()["skipped"] == 200


async def test_dying_between_the_peers_write_and_ours_leaves_a_ghost(
    rig: RehearsalRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    deal = await offer(rig, await reserve(rig))
    write = StateFile._write

    def full(self: StateFile, text: str) -> None:
        if self.kind == "rehearsal node" and rig.remote[0].pending():
            raise OSError("no space left on device")
        write(self, text)

    monkeypatch.setattr(StateFile, "_write", full)
    with pytest.raises(OSError, match="no space"):
        await deal.secure(rig.node)
    monkeypatch.undo()
    rig.node.restart()
    assert rig.node.pending() == ()
    assert rig.remote[0].pending() == (deal.outpoint,)


async def test_two_views_of_one_node_never_lose_each_others_changes(rig: RehearsalRig, tmp_path: Path) -> None:
    views = [RehearsalNode.open(tmp_path, rig.chain) for _ in range(4)]
    more = rig.node.make_peers(8)

    async def one(view: RehearsalNode, place: int, peer: RehearsalPeer) -> ReservedChannel:
        await view.connect(peer.pubkey, peer.host)
        wanted = ChannelOrder(peer.pubkey, peer.host, CAPACITY, private=True)
        return await view.reserve(bytes([place + 1]) * 32, wanted, "memo")

    reserved = await asyncio.gather(*(one(views[n % 4], n, peer) for n, peer in enumerate(more)))
    assert len({channel.script for channel in reserved}) == 8
    assert len(rig.node.reserved()) == 8


async def test_a_closed_object_answers_not_now_and_ends_its_waiting_calls(rig: RehearsalRig) -> None:
    rig.remote[0].fault(Step.RESERVE, Fault.STALL)
    call = await held(rig, Step.RESERVE, reserve(rig))
    await rig.node.close()
    with pytest.raises(NotNow, match="was closed"):
        await call
    with pytest.raises(NotNow, match="was closed"):
        await rig.node.channels()


def test_files_are_private_and_nothing_shows_a_seed(tmp_path: Path) -> None:
    node = RehearsalNode.open(tmp_path / "node", seed=b"\x01" * 32)
    (peer,) = node.make_peers(1, seed=b"\x02" * 32)
    for path in (tmp_path / "node").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    shown = repr(node) + repr(peer) + str(node) + repr(peer.file)
    assert "01" * 16 not in shown
    assert "02" * 16 not in shown


def test_the_same_seed_is_the_same_node_and_another_seed_is_refused(tmp_path: Path) -> None:
    first = RehearsalNode.open(tmp_path / "one", seed=b"\x01" * 32)
    assert RehearsalNode.open(tmp_path / "two", seed=b"\x01" * 32).pubkey == first.pubkey
    assert RehearsalNode.open(tmp_path / "one").pubkey == first.pubkey
    with pytest.raises(WrongUsage, match="another seed"):
        RehearsalNode.open(tmp_path / "one", seed=b"\x02" * 32)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "kind": "rehearsal node"}', "\udcff"])
def test_a_file_that_is_not_understood_is_not_touched(tmp_path: Path, text: str) -> None:
    RehearsalNode.open(tmp_path)
    path = tmp_path / "node.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CannotRead) as caught:
        RehearsalNode.open(tmp_path)
    assert "seed" not in str(caught.value)
    assert path.read_bytes() == text.encode(errors="surrogateescape")


async def test_without_a_chain_source_a_channel_stays_pending(tmp_path: Path) -> None:
    async with LabChain(premine=103) as chain:
        node = RehearsalNode.open(tmp_path)
        (peer,) = node.make_peers(1)
        await node.connect(peer.pubkey, peer.host)
        reserved = await node.reserve(ID, ChannelOrder(peer.pubkey, peer.host, CAPACITY), "memo")
        purse = Purse(chain)
        deal = Offer(await purse.pay([TxOut(CAPACITY, reserved.script)]), reserved)
        await deal.secure(node)
        await chain.broadcast(purse.sign(deal.psbt))
        await chain.mine()
        assert [c.state for c in await node.channels()] == ["pending"]
        again = RehearsalNode.open(tmp_path, chain)
        chain.offline = True
        with pytest.raises(NotNow):
            await again.channels()  # the network is not known to be regtest yet
        chain.offline = False
        assert [c.state for c in await again.channels()] == ["open"]
        chain.offline = True
        assert [c.state for c in await again.channels()] == ["open"]


async def test_it_refuses_to_work_outside_regtest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with LabChain(premine=0) as chain:
        node = RehearsalNode.open(tmp_path, chain)
        genesis = Network.SIGNET.genesis_hash

        async def signet(self: LabChain) -> str:
            return genesis

        monkeypatch.setattr(LabChain, "genesis_hash", signet)
        with pytest.raises(WrongUsage, match="outside regtest"):
            await node.node()
