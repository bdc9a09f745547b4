"""Accounting: who put what into a session's transaction, who paid which fee, and labels for other wallets (BIP329).

A payjoin's amounts fit no ledger by themselves: the transaction spends coins of both, and the payee's outputs hold more than was
paid. Everything is taken out of the log, where each amount was fixed when it was decided; nothing is asked of wallet or chain.

It refuses to guess: what the log cannot tell is None, not 0.

Law: for a receiver, `contributed` + `amount_received` = `returned` (to the wallet and into channels). Fees are already taken off.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from pjv2.ports import SessionRow, Store
from pjv2.psbt.tx import Psbt, Tx
from pjv2.session import decode, replay
from pjv2.session import events as ev
from pjv2.session.events import Event, Outcome
from pjv2.session.log import State
from pjv2.session.receive import Receiver
from pjv2.session.send import Sender
from pjv2.units import Instant, Outpoint, Sats, Txid


@dataclass(frozen=True, slots=True)
class ChannelEntry:
    """A channel that the session's transaction funded."""

    outpoint: Outpoint
    capacity: Sats


@dataclass(frozen=True, slots=True)
class Account:
    """One session as a ledger wants it. Amounts in satoshis, times in seconds since the epoch.

    `contributed`: own coins in the transaction that ended it. `returned`: its outputs to ourselves, channels included.
    `amount_received`: receiver, what was gained after our fee; `amount_sent`: payer, what the payee was owed.
    `fee_ours`, `fee_theirs`: the shares in that transaction's fee; `fee_extra`: children that were sent to speed a parent up.
    """

    session: str
    role: str
    network: str
    label: str | None
    note: str | None
    order: str | None
    address: str
    created: Instant
    closed: Instant | None
    outcome: str | None
    payjoin: bool
    txid: Txid | None
    height: int | None
    amount_requested: Sats | None
    amount_received: Sats | None
    amount_sent: Sats | None
    contributed: Sats | None
    returned: Sats | None
    fee_ours: Sats | None
    fee_theirs: Sats | None
    fee_extra: Sats
    channels: tuple[ChannelEntry, ...]
    late: tuple[Txid, ...] = ()
    cold_address: str | None = None
    """Where the payment arrived, if that is an address of the cold wallet."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Our part in the transaction that ended a session; None is what the log does not say."""

    contributed: Sats | None = None
    returned: Sats | None = None
    fee_ours: Sats | None = None
    fee_theirs: Sats | None = None
    channels: tuple[ChannelEntry, ...] = ()


def account(row: SessionRow, state: State, events: Sequence[Event]) -> Account:
    """The account of a session out of its row, its state and its log."""
    closed = state.closed
    txid = closed.txid if closed is not None else None
    if isinstance(state, Receiver):
        part = _receiver_part(state, events)
        received, sent = (closed.amount_received if closed is not None else None), None
    else:
        part = _sender_part(state)
        received, sent = None, (closed.amount_received if closed is not None else None)
    return Account(
        session=state.session,
        role=state.role,
        network=state.created.network.value,
        label=state.created.label,
        note=row.note,
        order=row.order,
        address=state.created.address,
        created=state.created.at,
        closed=closed.at if closed is not None else None,
        outcome=closed.outcome.value if closed is not None else None,
        payjoin=closed is not None and closed.outcome is Outcome.PAID,
        txid=txid,
        height=next((sight.height for sight in state.sightings if sight.txid == txid), None),
        amount_requested=state.created.amount,
        amount_received=received,
        amount_sent=sent,
        contributed=part.contributed,
        returned=part.returned,
        fee_ours=part.fee_ours,
        fee_theirs=part.fee_theirs,
        fee_extra=sum(child.fee for child in _last_children(state)),
        channels=part.channels,
        late=state.late if isinstance(state, Receiver) else (),
        cold_address=_paid_cold(state) if isinstance(state, Receiver) else None,
    )


def _paid_cold(state: Receiver) -> str | None:
    cold, closed = state.created.cold, state.closed
    if cold is None or closed is None:
        return None
    return cold.address if closed.outcome is Outcome.PAID and state.pays_cold else None


async def accounts(store: Store | None) -> tuple[Account, ...]:
    """Every session of the store, newest first. Raises NotNow, CannotRead naming the record."""
    found = []
    for row in () if store is None else await store.rows():
        records = await store.load(row.session) if store is not None else ()
        state = replay([(record.seq, record.name, record.data) for record in records])
        found.append(account(row, state, [decode(record.name, record.data) for record in records]))
    return tuple(found)


def _last_children(state: State) -> Iterator[ev.ChildBroadcasting]:
    """The last child of each parent: a later one replaced it."""
    yield from {child.parent: child for child in state.children}.values()


def _receiver_part(state: Receiver, events: Sequence[Event]) -> _Part:
    closed = state.closed
    if closed is None:
        return _Part()
    if closed.txid is None:
        return _Part(0, 0, 0, 0)
    values = {
        coin.outpoint: coin.txout.value
        for event in events
        if isinstance(event, ev.CoinsReserved)
        for coin in event.coins
    }
    for way_out in state.way_outs:
        if way_out.txid == closed.txid:
            return _spent_back(Tx.parse(way_out.raw), values)
    if closed.outcome is Outcome.PAID_BY_FALLBACK and state.checked is not None:
        return _Part(0, closed.amount_received, 0, state.checked.fee)
    return _payjoin_part(state, closed, events) if closed.outcome is Outcome.PAID else _Part()


def _payjoin_part(state: Receiver, closed: ev.Closed, events: Sequence[Event]) -> _Part:
    # A payjoin whose id was not final when it was drafted is known by the last draft.
    draft = next((draft for draft in reversed(state.drafts) if draft.txid == closed.txid), None) or state.draft
    drafted = next(
        (
            event
            for event in reversed(events)
            if isinstance(event, ev.ProposalDrafted) and draft is not None and event.txid == draft.txid
        ),
        None,
    )
    if draft is None or drafted is None or closed.txid is None:
        return _Part()
    contributed = sum(coin.txout.value for coin in drafted.intent.coins)
    return _Part(
        contributed=contributed,
        returned=contributed + closed.amount_received,
        fee_ours=drafted.intent.our_fee,
        fee_theirs=draft.fee - drafted.intent.our_fee,
        channels=tuple(ChannelEntry(Outpoint(closed.txid, entry.vout), entry.value) for entry in drafted.funding),
    )


def _sender_part(state: Sender) -> _Part:
    closed = state.closed
    if closed is None:
        return _Part()
    if closed.txid is None:
        return _Part(0, 0, 0, 0)
    psbt = Psbt.parse(state.created.original)
    values = {txin.outpoint: txout.value for txin, txout in zip(psbt.tx.inputs, psbt.prevouts(), strict=True)}
    for reclaim in state.reclaims:
        if reclaim.txid == closed.txid:
            return _spent_back(Tx.parse(reclaim.raw), values)
    contributed = sum(values.values())
    if closed.outcome is Outcome.PAID_BY_FALLBACK:
        fee = state.created.fee
        return _Part(contributed, contributed - closed.amount_received - fee, fee, 0)
    if closed.outcome is Outcome.PAID and state.signed is not None and state.safe is not None:
        ours = state.created.fee + state.safe.fee_paid_by_us
        return _Part(contributed, contributed - closed.amount_received - ours, ours, state.signed.fee - ours)
    return _Part()


def _spent_back(tx: Tx, values: dict[Outpoint, Sats]) -> _Part:
    """A transaction that spends only coins of ours, to ourselves."""
    returned = sum(txout.value for txout in tx.outputs)
    known = [values.get(txin.outpoint) for txin in tx.inputs]
    if None in known:
        return _Part(None, returned, None, 0)
    contributed = sum(value for value in known if value is not None)
    return _Part(contributed, returned, contributed - returned, 0)


# ---------------------------------------------------------------- formats


def as_facts(entry: Account) -> dict[str, Any]:
    """An account as JSON has it: times in RFC 3339, outpoints as text."""
    facts: dict[str, Any] = {field.name: getattr(entry, field.name) for field in fields(entry)}
    facts["created"], facts["closed"] = _utc(entry.created), None if entry.closed is None else _utc(entry.closed)
    facts["channels"] = [{"outpoint": str(one.outpoint), "capacity": one.capacity} for one in entry.channels]
    facts["late"] = list(entry.late)
    return facts


def as_csv(entries: Iterable[Account]) -> str:
    """A table with one header line, for spreadsheets: `channels` as `outpoint=capacity`, blanks between."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Account)])
    for entry in entries:
        facts = as_facts(entry)
        facts["channels"] = " ".join(f"{one.outpoint}={one.capacity}" for one in entry.channels)
        facts["late"] = " ".join(entry.late)
        facts["payjoin"] = "yes" if entry.payjoin else "no"
        writer.writerow([_cell(value) for value in facts.values()])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A label that somebody else wrote must not become a formula where the table is opened."""
    if not isinstance(value, str):
        return value
    text = " ".join(value.split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


@dataclass(frozen=True, slots=True)
class Label:
    """A record of BIP329: what is labelled (`tx`, `addr` or `output`), its reference, its label."""

    type: str
    ref: str
    label: str

    def line(self) -> str:
        """One line of a BIP329 file."""
        return json.dumps(asdict(self), ensure_ascii=False)


def labels(entries: Iterable[Account]) -> tuple[Label, ...]:
    """Labels of transactions, addresses and channel outputs (BIP329), each reference once: the oldest session names it."""
    found: dict[tuple[str, str], Label] = {}
    for entry in entries:
        text = _name(entry)
        if entry.role == "receiver":  # the payer's address is not ours to label
            _put(found, Label("addr", entry.address, text))
            if entry.cold_address is not None:
                _put(found, Label("addr", entry.cold_address, text))
        for txid in (entry.txid, *entry.late):
            if txid is not None:
                _put(found, Label("tx", txid, f"{text} ({_what(entry, txid)})"))
        for number, channel in enumerate(entry.channels, 1):
            _put(found, Label("output", str(channel.outpoint), f"{text} (channel {number}, {channel.capacity} sat)"))
    return tuple(found.values())


def _put(found: dict[tuple[str, str], Label], label: Label) -> None:
    found[label.type, label.ref] = label


def _name(entry: Account) -> str:
    """What the owner called it; one line."""
    words = [" ".join(part.split()) for part in (entry.label, entry.note, entry.order) if part and part.strip()]
    return " / ".join(dict.fromkeys(words)) or f"pjv2 {entry.role} {entry.session[:8]}"


def _what(entry: Account, txid: Txid) -> str:
    if txid != entry.txid:
        return "late payment"
    words = {
        Outcome.PAID.value: "payjoin",
        Outcome.PAID_BY_FALLBACK.value: "paid without payjoin",
        Outcome.PAID_OTHERWISE.value: "paid otherwise",
    }
    return words.get(entry.outcome or "", (entry.outcome or "open").lower())


def _utc(at: Instant) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
