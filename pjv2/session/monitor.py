"""What the chain says about a session, seen by both roles through one lens (session-model.md sections 1, 3.3 and 4).

```
O  the Original                       T  a proposal of this log           W  our own way out
D  another spend of O's inputs that does not pay us                       B  one that does
A  any payment to our script that spends no input of O                    C  a child of ours that pays for its parent
```

Presence in a view counts at once; absence ("nothing spends O's inputs") counts only when the view looked for it, which is what
`Look.covers` says. A transaction is recognised by what it spends and pays, without scriptSigs: a legacy input changes its id.

Law: a transaction is final six deep (`BURIED`), never earlier; nothing here decides, it answers questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from pjv2.errors import PayjoinError
from pjv2.psbt.plan import Coin
from pjv2.psbt.proposal import build_child
from pjv2.psbt.tx import Psbt, Tx, TxOut
from pjv2.session.events import ChildBroadcasting, Event, Policy, Seen, Unseen, What
from pjv2.session.facts import BURIED, ChainView
from pjv2.session.needs import Broadcast, Memory, Purpose, Sign, Watch
from pjv2.units import FeeRate, Instant, Outpoint, Sats, Txid

DAY = 86_400
LEASE = 30 * DAY
"""How long a coin is locked at the wallet; renewed while it may still be spent."""
LEASE_MARGIN = 10 * DAY
FRESH = 900
"""Seconds for which a view says what is not in sight."""
STUCK = 7_200
"""Seconds after which an unconfirmed transaction that pays less than the going rate is too slow."""


@lru_cache(maxsize=2_048)
def read_tx(raw: bytes) -> Tx:
    """A transaction of the chain source. Raises PeerMistake when it is none."""
    return Tx.parse(raw)


@lru_cache(maxsize=2_048)
def bare_txid(tx: Tx) -> Txid:
    """The id without scriptSigs and witnesses: what stays the same when somebody signs differently."""
    return tx.stripped().txid


@dataclass(frozen=True, slots=True)
class Draft:
    """A proposal of this log as the chain could show it: `bare` id, everything it spends, our coins, our outputs, its fee."""

    txid: Txid
    bare: Txid
    tx: Tx = field(repr=False)
    inputs: frozenset[Outpoint]
    ours: frozenset[Outpoint]
    channels: tuple[Outpoint, ...]
    received: Sats
    fee: Sats


@dataclass(frozen=True, slots=True)
class Sight:
    """A transaction in a view, and what it is to the session."""

    txid: Txid
    bare: Txid
    tx: Tx = field(repr=False)
    what: What
    height: int | None
    depth: int
    amount: Sats

    @property
    def buried(self) -> bool:
        return self.depth >= BURIED

    @property
    def spends(self) -> frozenset[Outpoint]:
        return frozenset(txin.outpoint for txin in self.tx.inputs)


@dataclass(frozen=True, slots=True)
class Stakes:
    """Everything a session has at stake on the chain; what a view is read against."""

    since: int
    scripts: frozenset[bytes] = frozenset()
    original: Txid | None = None
    original_bare: Txid | None = None
    inputs: frozenset[Outpoint] = frozenset()
    drafts: tuple[Draft, ...] = ()
    coins: frozenset[Outpoint] = frozenset()
    way_outs: frozenset[Txid] = frozenset()
    reclaims: frozenset[Txid] = frozenset()
    children: frozenset[Txid] = frozenset()
    bumped: frozenset[Outpoint] = frozenset()
    """Outputs that children of ours spend."""
    foreign: frozenset[Outpoint] = frozenset()
    """Sender: the receiver's inputs of T."""

    def watch(self) -> Watch:
        """The one need that keeps all of it in sight."""
        txids = {draft.txid for draft in self.drafts} | self.way_outs | self.reclaims | self.children
        if self.original is not None:
            txids.add(self.original)
        return Watch(
            txids=frozenset(txids),
            outpoints=self.inputs | self.coins | self.bumped | self.foreign,
            scripts=self.scripts,
            since=self.since,
        )

    def draft(self, bare: Txid) -> Draft | None:
        return next((draft for draft in self.drafts if draft.bare == bare), None)

    def recognise(self, txid: Txid, tx: Tx) -> tuple[What, Sats] | None:  # noqa: PLR0911  # one return per case
        """What a transaction is to this session, and what it pays us; None: nothing."""
        bare = bare_txid(tx)
        spends = {txin.outpoint for txin in tx.inputs}
        paid = sum(txout.value for txout in tx.outputs if txout.script in self.scripts)
        draft = self.draft(bare)
        if draft is not None:
            return "payjoin", draft.received
        if self.original_bare is not None and bare == self.original_bare:
            return "original", paid
        if txid in self.way_outs:
            return "way_out", 0
        if txid in self.reclaims:
            return "reclaim", 0
        if spends & self.inputs:
            return ("bumped" if paid else "conflict"), paid
        if txid in self.children or not paid:
            return None
        return "address", paid


@dataclass(frozen=True, slots=True)
class Look:
    """A view read against the stakes. `covers`: what is not in it is not in sight at all."""

    stakes: Stakes
    sights: tuple[Sight, ...]
    others: tuple[Sight, ...]
    """Spends of watched coins that are nothing of the above (another session of a restored wallet, for instance)."""
    tip: int
    rate: FeeRate
    covers: bool

    @property
    def spends_of_original(self) -> tuple[Sight, ...]:
        """O, T, B and D in sight."""
        return tuple(sight for sight in self.sights if sight.spends & self.stakes.inputs)

    @property
    def burial(self) -> Sight | None:
        """The buried transaction that spent an input of O: it decides the session."""
        return next((sight for sight in self.spends_of_original if sight.buried), None)

    @property
    def quiet(self) -> bool:
        """Nothing spends O's inputs, and that was looked for."""
        return self.covers and not self.spends_of_original

    def of(self, what: What) -> tuple[Sight, ...]:
        return tuple(sight for sight in self.sights if sight.what == what)

    def spending(self, outpoints: Iterable[Outpoint]) -> tuple[Sight, ...]:
        wanted = frozenset(outpoints)
        return tuple(sight for sight in (*self.sights, *self.others) if sight.spends & wanted)

    def sight_of(self, draft: Draft) -> Sight | None:
        return next((sight for sight in self.sights if sight.bare == draft.bare), None)

    def dead(self, draft: Draft) -> bool:
        """An input of this proposal, the payer's or ours, is buried in another transaction."""
        return any(sight.buried and sight.bare != draft.bare for sight in self.spending(draft.inputs))

    def has(self, txid: Txid) -> bool:
        return any(sight.txid == txid for sight in (*self.sights, *self.others))


def look(stakes: Stakes, memory: Memory, now: Instant) -> Look | None:
    """The worker's latest view, read against what is at stake now; None when it has not looked yet.

    An old one (of a process that was suspended, or whose clock was set) shows what is there, and not what is missing.
    """
    if memory.view is None:
        return None
    wanted, seen = stakes.watch(), memory.watched
    fresh = abs(now - memory.viewed) < FRESH
    return read_view(stakes, memory.view, covers=fresh and seen is not None and covered(wanted, seen))


def covered(wanted: Watch, asked: Watch) -> bool:
    """Whether what is not in the answer to `asked` is not in sight. Every transaction that matters spends or pays what is watched,
    so the ids are no part of the question."""
    return wanted.outpoints <= asked.outpoints and wanted.scripts <= asked.scripts and wanted.since >= asked.since


def read_view(stakes: Stakes, view: ChainView, *, covers: bool = True) -> Look:
    """Every transaction of a view by what it is to the session. Raises PeerMistake when the chain source sent garbage."""
    sights: list[Sight] = []
    others: list[Sight] = []
    for entry in view.txs:
        tx = read_tx(entry.raw)
        known = stakes.recognise(entry.txid, tx)
        sight = Sight(
            txid=entry.txid,
            bare=bare_txid(tx),
            tx=tx,
            what=known[0] if known else "conflict",
            height=entry.height,
            depth=view.depth(entry),
            amount=known[1] if known else 0,
        )
        (sights if known else others).append(sight)
    return Look(stakes, tuple(sights), tuple(others), view.tip.height, view.rate, covers)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A `Seen` that no `Unseen` took back."""

    txid: Txid
    what: What
    height: int | None
    amount: Sats
    since: Instant
    """When it was first seen."""


def news(before: Sequence[Sighting], seen: Look, now: Instant) -> list[Event]:
    """`Seen` and `Unseen` for what differs between the log and a view."""
    known = {sighting.txid: sighting for sighting in before}
    found: list[Event] = []
    present = {sight.txid for sight in seen.sights}
    if seen.covers:
        found += [Unseen(now, entry.txid, entry.what) for entry in before if entry.txid not in present]
    for sight in seen.sights:
        old = known.get(sight.txid)
        if old is None or (old.what, old.height) != (sight.what, sight.height):
            found.append(Seen(now, sight.txid, sight.what, sight.height, sight.amount))
    return found


def note_seen(before: tuple[Sighting, ...], event: Seen) -> tuple[Sighting, ...]:
    since = next((entry.since for entry in before if entry.txid == event.txid), event.at)
    kept = tuple(entry for entry in before if entry.txid != event.txid)
    return (*kept, Sighting(event.txid, event.what, event.height, event.amount, since))


def note_unseen(before: tuple[Sighting, ...], event: Unseen) -> tuple[Sighting, ...]:
    return tuple(entry for entry in before if entry.txid != event.txid)


# ---------------------------------------------------------------- coins


def lease_until(base: Instant, now: Instant) -> Instant | None:
    """The end to renew a lock to that was made at `base` for LEASE; None while it lasts long enough.

    The answer changes once per LEASE, so that the same renewal is the same need.
    """
    ends = base + LEASE
    if now < ends - LEASE_MARGIN:
        return None
    periods = int((now - (ends - LEASE_MARGIN)) // LEASE) + 1
    return ends + periods * LEASE


def coins_settled(look: Look, coins: frozenset[Outpoint], *, way_out: bool) -> bool:
    """No spend of a coin in sight that is not buried; and once W was recorded, every coin's spend is buried (M3)."""
    spends = look.spending(coins)
    if not look.covers or any(not sight.buried for sight in spends):
        return False
    spent = frozenset[Outpoint]().union(*(sight.spends for sight in spends)) & coins
    return not way_out or spent == coins


# ---------------------------------------------------------------- children


@dataclass(frozen=True, slots=True)
class Parent:
    """A transaction in the mempool that an output of ours may pull: its fee, the output, and where the child pays to."""

    sight: Sight
    fee: Sats
    vout: int
    script: bytes


def child_to_sign(
    parent: Parent, children: Sequence[ChildBroadcasting], since: Instant, look: Look, policy: Policy, now: Instant
) -> Sign | None:
    """The child that pays for a stuck parent (CPFP), to be signed; None while the parent is fast enough or it cannot help.

    A second child replaces the first when that was too cheap as well, at most once per STUCK.
    """
    tx = parent.sight.tx
    target = min(look.rate, policy.max_fee_rate)
    if parent.sight.height is not None or now - since < STUCK or FeeRate.of(parent.fee, tx.weight) >= target:
        return None
    previous = [child for child in children if child.parent == parent.sight.txid]
    if previous:
        last = previous[-1]
        package = FeeRate.of(parent.fee + last.fee, tx.weight + read_tx(last.raw).weight)
        if now - last.at < STUCK or target.sat_per_kwu * 4 <= package.sat_per_kwu * 5:
            return None
    try:
        psbt = build_child(tx, parent.vout, tx.outputs[parent.vout], parent.script, target, parent.fee, tx.weight)
    except PayjoinError:
        return None  # the output cannot carry the fee
    return Sign(purpose="child", psbt=psbt.serialize(), ours=(Outpoint(parent.sight.txid, parent.vout),))


def accept_child(wanted: Sign, parent: Parent, signed: bytes, now: Instant) -> ChildBroadcasting | None:
    """The child as it came back from the wallet; None when it is not the one that was asked for."""
    tx = signed_transaction(wanted.psbt, signed)
    if tx is None:
        return None
    fee = parent.sight.tx.outputs[parent.vout].value - sum(txout.value for txout in tx.outputs)
    return ChildBroadcasting(now, parent.sight.txid, tx.txid, tx.raw, fee)


def signed_transaction(asked: bytes, signed: bytes) -> Tx | None:
    """The final transaction of a PSBT that the wallet signed, when it is the one that was asked for and every input is final."""
    before, after = Psbt.parse(asked), Psbt.parse(signed)
    if after.tx.stripped() != before.tx.stripped():
        return None
    tx = after.extract()
    return tx if all(txin.script_sig or txin.witness for txin in tx.inputs) else None


def broadcast_child(children: Sequence[ChildBroadcasting], look: Look) -> Broadcast | None:
    """The newest child, while its parent waits in the mempool and the child is not there."""
    if not children:
        return None
    child = children[-1]
    waiting = any(sight.txid == child.parent and sight.height is None for sight in look.sights)
    spent = look.spending({txin.outpoint for txin in read_tx(child.raw).inputs})
    if not waiting or any(sight.txid == child.txid for sight in spent):
        return None
    return broadcast("child", child.txid, child.raw)


def broadcast(purpose: Purpose, txid: Txid, raw: bytes) -> Broadcast:
    return Broadcast(purpose=purpose, txid=txid, raw=raw)


def coin_outpoints(coins: Sequence[Coin]) -> tuple[Outpoint, ...]:
    return tuple(coin.outpoint for coin in coins)


def total(outputs: Iterable[TxOut]) -> Sats:
    return sum(txout.value for txout in outputs)
