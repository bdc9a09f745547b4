"""`lab.audit()`: after every story the world is looked over from outside, and every broken promise is named.

It reads the chain, the disks of the parties, their nodes and the directory; it trusts no session's own opinion of its end.
What it checks is design.md section 5: the payer paid at most once; satoshis are conserved to the fee; every funding output on
chain has a stored commitment for exactly that outpoint; no coin or peer is in use by a closed session; one reply content per
mailbox; no pending channel without an open session; a wallet counts what the chain holds for it.

Law: an audit changes nothing; a wallet that is asked may look at the chain first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pjv2 import session as model
from pjv2.lab.world import Party, World
from pjv2.psbt.tx import Tx
from pjv2.session import events as ev
from pjv2.units import Outpoint, Sats


class BrokenPromise(AssertionError):
    """The world is not as it was promised; the message lists every finding."""


@dataclass(frozen=True, slots=True)
class Told:
    """A session as its log tells it, with every event: releases forget what an audit must still know."""

    party: Party
    state: model.State
    events: tuple[ev.Event, ...]

    @property
    def funding_scripts(self) -> frozenset[bytes]:
        reserved = (event.channels for event in self.events if isinstance(event, ev.ChannelsReserved))
        return frozenset(channel.script for channels in reserved for channel in channels)


async def audit(world: World) -> None:
    """Raise BrokenPromise with everything that is wrong."""
    sessions = [told for party in world.parties.values() for told in await _sessions(party)]
    findings = _paid_once(world, sessions)
    findings += _conserved(world, await _known_scripts(world, sessions))
    findings += _funding_is_committed(world, sessions)
    for party in world.parties.values():
        findings += await _nothing_in_use(party)
        findings += await _no_orphan_channels(party)
        findings += await _counted_right(world, party)
    findings += _one_content_per_mailbox(world, sessions)
    if findings:
        raise BrokenPromise("\n".join(findings))


async def _sessions(party: Party) -> list[Told]:
    found = []
    for row in await party.store.rows():
        records = await party.store.load(row.session)
        events = tuple(model.decode(record.name, record.data) for record in records)
        state = model.replay([(record.seq, record.name, record.data) for record in records])
        found.append(Told(party, state, events))
    return found


def _confirmed(world: World) -> Iterable[Tx]:
    for height in range(world.chain.height + 1):
        for entry in world.chain.block(height).txs:
            if not entry.coinbase:
                yield entry.tx


def _paid_once(world: World, sessions: list[Told]) -> list[str]:
    """Of all transactions that a payer signed for one receiver key, at most one is in a block."""
    findings = []
    payments: dict[bytes, set[str]] = {}
    for told in sessions:
        state = told.state
        if isinstance(state, model.Sender):
            inputs = set(state.created.inputs)
            proposals = {event.txid for event in told.events if isinstance(event, ev.ProposalAccepted | ev.Signed)}
            for tx in _confirmed(world):
                pays = any(txout.script == state.created.script for txout in tx.outputs)
                spends = any(txin.outpoint in inputs for txin in tx.inputs)
                if spends and (pays or tx.txid in proposals):
                    payments.setdefault(state.created.receiver, set()).add(tx.txid)
    for receiver, txids in payments.items():
        if len(txids) > 1:
            findings.append(f"the payer paid receiver key {receiver.hex()[:16]}… {len(txids)} times: {sorted(txids)}")
    return findings


async def _known_scripts(world: World, sessions: list[Told]) -> dict[bytes, str]:
    """Whose a script is, by name."""
    known = {world.chain.faucet_script: "faucet", **dict.fromkeys(world.strangers, "stranger")}
    for party in world.parties.values():
        for script in await party.scripts():
            known[script] = party.name
        if party.node is not None:
            known[party.node.home_script] = party.name
    for told in sessions:
        for script in told.funding_scripts:
            known[script] = f"a channel of {told.party.name}"
    # A log that came back from an older copy has forgotten its scripts; the nodes have not.
    channels = {outpoint for party in world.parties.values() if party.node for outpoint in party.node.commitments()}
    for tx in _confirmed(world):
        for outpoint in channels:
            if outpoint.txid == tx.txid:
                known.setdefault(tx.outputs[outpoint.vout].script, "a channel")
    return known


def _conserved(world: World, known: dict[bytes, str]) -> list[str]:
    """Every satoshi a party was given is in an output somebody is known to own, or was a fee of a transaction of the parties."""
    parties = {party.name for party in world.parties.values()}
    findings = []
    given = sum(sum(party.funded.values()) for party in world.parties.values())
    fees = strangers = 0
    involved: dict[Outpoint, Sats] = {
        outpoint: value for party in world.parties.values() for outpoint, value in party.funded.items()
    }
    for tx in _confirmed(world):
        spent = [involved.pop(txin.outpoint) for txin in tx.inputs if txin.outpoint in involved]
        if not spent:
            continue
        if len(spent) != len(tx.inputs):
            findings.append(f"{tx.txid} spends coins of strangers beside ours: the audit cannot follow it")
            continue
        fees += sum(spent) - sum(txout.value for txout in tx.outputs)
        for vout, txout in enumerate(tx.outputs):
            owner = known.get(txout.script)
            if owner is None and not _is_commitment(world, tx):
                findings.append(f"{tx.txid}:{vout} pays {txout.value} sat to a script that nobody knows")
            if owner in ("stranger", "faucet"):
                strangers += txout.value
            else:
                involved[Outpoint(tx.txid, vout)] = txout.value
    kept = sum(involved.values())
    if given != kept + fees + strangers:
        findings.append(f"satoshis: {given} given, {kept} kept, {fees} fees, {strangers} to strangers ({parties})")
    return findings


def _is_commitment(world: World, tx: Tx) -> bool:
    """A commitment transaction of a rehearsal channel: its outputs belong to our node and to the peer."""
    for party in world.parties.values():
        if party.node is not None and any(txin.outpoint in party.node.commitments() for txin in tx.inputs):
            return True
    return False


def _funding_is_committed(world: World, sessions: list[Told]) -> list[str]:
    findings = []
    for told in sessions:
        if told.party.node is None:
            continue
        commitments = told.party.node.commitments()
        for tx in _confirmed(world):
            for vout, txout in enumerate(tx.outputs):
                if txout.script in told.funding_scripts and Outpoint(tx.txid, vout) not in commitments:
                    findings.append(f"{tx.txid}:{vout} holds {txout.value} sat in a 2-of-2 without commitment")
    return findings + _peers_agree(world)


def _peers_agree(world: World) -> list[str]:
    """What a peer signed for and the chain confirmed, our node knows, too, whatever has become of the log."""
    confirmed = {tx.txid for tx in _confirmed(world)}
    return [
        f"{channel.outpoint} is confirmed, the peer {peer.pubkey[:16]}… has the channel, and the node of {party.name} does not"
        for party in world.parties.values()
        if party.node is not None
        for peer in party.node.peers()
        for channel in peer.channels()
        if channel.node == party.node.pubkey
        if channel.outpoint.txid in confirmed and channel.outpoint not in party.node.commitments()
    ]


async def _nothing_in_use(party: Party) -> list[str]:
    closed = {row.session for row in await party.store.rows() if row.outcome is not None}
    findings = [
        f"{party.name}: coin {outpoint} is in use by the closed session {session}"
        for outpoint, session in (await party.store.coins_in_use()).items()
        if session in closed
    ]
    findings += [
        f"{party.name}: peer {peer[:16]}… is in use by the closed session {session}"
        for peer, session in (await party.store.peers_in_use()).items()
        if session in closed
    ]
    held = frozenset(await party.store.coins_in_use())
    findings += [
        f"{party.name}: the wallet still locks {outpoint}, and no session uses it"
        for outpoint in await party.locked()
        if outpoint not in held
    ]
    return findings


async def _no_orphan_channels(party: Party) -> list[str]:
    if party.node is None:
        return []
    rows = {row.session: row for row in await party.store.rows()}
    findings = []
    for channel in await party.node.channels():
        session = channel.memo.removeprefix("pj:")
        if channel.state == "pending" and (session not in rows or rows[session].outcome is not None):
            findings.append(f"{party.name}: channel {channel.outpoint} is pending without an open session")
    live = {row.session for row in rows.values() if row.outcome is None}
    if party.node.reserved() and not live:
        findings.append(f"{party.name}: {len(party.node.reserved())} reservations are left at the node")
    return findings


async def _counted_right(world: World, party: Party) -> list[str]:
    """The wallet knows every confirmed coin of its scripts, and counts those that nothing spends: no more and no fewer."""
    scripts = await party.scripts()
    coins = {
        Outpoint(tx.txid, vout): txout.value
        for tx in _confirmed(world)
        for vout, txout in enumerate(tx.outputs)
        if txout.script in scripts
    }
    held = sum(value for outpoint, value in coins.items() if world.chain.spender(outpoint) is None)
    counted = await party.wallet.balance()
    known = await party.wallet.mine(tuple(coins))
    findings = [
        f"{party.name}: the wallet does not know its coin {outpoint} of {value} sat"
        for outpoint, value in coins.items()
        if outpoint not in known
    ]
    if counted != held:
        findings.append(f"{party.name}: the wallet counts {counted} sat, and the chain holds {held} sat for it")
    return findings


def _one_content_per_mailbox(world: World, sessions: list[Told]) -> list[str]:
    findings = []
    for mailbox, contents in world.directory.posted.items():
        if len(contents) > 1:
            findings.append(f"mailbox {mailbox} was given {len(contents)} different contents")
    for told in sessions:
        kinds = {type(event) for event in told.events}
        if {ev.ProposalPosting, ev.RefusalPosting} <= kinds:
            findings.append(f"session {told.state.session} announced a proposal and a refusal")
    return findings
