"""The lab's mempool: bitcoind's policy, in its words, for everything that a payjoin can meet.

Scripts, fees, full replace-by-fee, packages of parents and a child, relative and absolute locks, maturity, dust, standard scripts.
It refuses nothing for the shape of version 3 transactions, knows no bare multisig, ephemeral dust or cluster limits, and has no
reason to give for a failed script, because the kernel gives none.

Law: `examine` and `afford` look and refuse, and change nothing; a transaction comes in only through `enter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pjv2.errors import PeerMistake
from pjv2.lab.kernel import Kernel
from pjv2.lab.ledger import COINBASE_MATURITY, FINAL_SEQUENCE, ActiveChain, LabBlock, LabTx, Ledger, Unspent, read_tx
from pjv2.psbt.coin import script_pushes
from pjv2.psbt.tx import ScriptKind, Tx, TxIn, TxOut, dust_limit, is_witness_program, kind_of
from pjv2.units import MAX_MONEY, FeeRate, Outpoint, Sats, Txid, Weight

MAX_TX_WEIGHT: Weight = 400_000
MAX_ANCESTORS = 25
MAX_REPLACED = 100
LOCKTIME_THRESHOLD = 500_000_000
SEQUENCE_DISABLED = 1 << 31
SEQUENCE_TIME = 1 << 22
_ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141


def _btc(amount: Sats) -> str:
    return f"{amount // 100_000_000}.{amount % 100_000_000:08d}"


class Refused(Exception):
    """The mempool's no; `fee`: a child might still pay for it."""

    def __init__(self, reason: str, *, fee: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fee = fee


class Known(Exception):
    """It is there already."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Mempool:
    """What waits for a block, over an active chain whose kernel verifies scripts.

    `min_relay` and `incremental` are bitcoind's relay fees, `minimum` is the dynamic floor.
    """

    def __init__(self, active: ActiveChain, kernel: Kernel, min_relay: FeeRate) -> None:
        self.min_relay = min_relay
        self.incremental = FeeRate(25)
        self.minimum = FeeRate(0)
        self.ledger = Ledger()
        self._active = active
        self._kernel = kernel

    # ------------------------------------------------------------ readings of chain and mempool together

    def find(self, txid: Txid) -> LabTx | None:
        """A transaction of the active chain or the mempool."""
        return self._active.ledger.txs.get(txid) or self.ledger.txs.get(txid)

    def spender(self, outpoint: Outpoint) -> Txid | None:
        """Who spends this output, in the active chain or in the mempool."""
        return self._active.ledger.spent.get(outpoint) or self.ledger.spent.get(outpoint)

    # ------------------------------------------------------------ coming in

    def accept(self, raw: bytes, parents: Sequence[bytes]) -> None:
        """Take a transaction, after those of its unconfirmed `parents` that are not here yet. Raises Known and Refused."""
        deferred: dict[Txid, LabTx] = {}
        conflicts: set[Txid] = set()
        for parent in parents:
            try:
                entry, against = self.examine(parent, deferred)
            except Known:
                continue
            try:
                evicted = self.afford([(entry, against)])
            except Refused as no:
                if not no.fee:
                    raise
                deferred[entry.txid] = entry
                conflicts |= against
                continue
            self.enter([entry], evicted)
        child, against = self.examine(raw, deferred)
        unused = [txid for txid in deferred if not any(i.outpoint.txid == txid for i in child.tx.inputs)]
        if unused:
            raise Refused("package-not-child-with-parents")
        package = [*((entry, conflicts) for entry in deferred.values()), (child, against)]
        self.enter([entry for entry, _ in package], self.afford(package))

    def examine(self, raw: bytes, package: Mapping[Txid, LabTx], *, scripts: bool = True) -> tuple[LabTx, set[Txid]]:
        """Everything but money: the transaction with its prevouts, and the mempool transactions it conflicts with."""
        try:
            entry = read_tx(raw)
        except PeerMistake as exc:
            raise Refused("TX decode failed") from exc
        tx = entry.tx
        if entry.txid in self._active.ledger.txs:
            raise Known("txn-already-known")
        pooled = self.ledger.txs.get(entry.txid)
        if pooled is not None:
            same = pooled.wtxid == entry.wtxid
            raise Known("txn-already-in-mempool" if same else "txn-same-nonwitness-data-in-mempool")
        _check_form(entry)
        tip = self._active.tip
        if not _is_final(tx, tip.height + 1, tip.median_time):
            raise Refused("non-final")
        coins: list[Unspent] = []
        conflicts: set[Txid] = set()
        claimed = {spend.outpoint for other in package.values() for spend in other.tx.inputs}
        for spend in tx.inputs:
            coin = self._coin(spend.outpoint, package)
            if coin is None or spend.outpoint in claimed:
                raise Refused("bad-txns-inputs-missingorspent")
            coins.append(coin)
            if spend.outpoint in self.ledger.spent:
                conflicts.add(self.ledger.spent[spend.outpoint])
        if not self._locks_satisfied(tx, coins):
            raise Refused("non-BIP68-final")
        self._check_amounts(tx, coins)
        entry = replace(entry, prevouts=tuple(coin.txout for coin in coins))
        ancestors = self.ledger.ancestors(tx)
        if conflicts & ancestors:
            raise Refused("bad-txns-spends-conflicting-tx")
        if len(ancestors) + len(package) >= MAX_ANCESTORS:
            raise Refused(f"too-long-mempool-chain, too many unconfirmed ancestors [limit: {MAX_ANCESTORS}]")
        if scripts:
            self._check_scripts(entry)
        return entry, conflicts

    def _coin(self, outpoint: Outpoint, package: Mapping[Txid, LabTx]) -> Unspent | None:
        parent = package.get(outpoint.txid) or self.ledger.txs.get(outpoint.txid)
        if parent is not None:
            outputs = parent.tx.outputs
            return Unspent(outputs[outpoint.vout], None, False) if outpoint.vout < len(outputs) else None
        return self._active.unspent.get(outpoint)

    def _locks_satisfied(self, tx: Tx, coins: Sequence[Unspent]) -> bool:
        """BIP68, judged for the next block: an unconfirmed coin counts as confirmed in it."""
        if not 2 <= tx.version <= 0xFFFFFFFF:
            return True
        tip = self._active.tip
        for spend, coin in zip(tx.inputs, coins, strict=True):
            if spend.sequence & SEQUENCE_DISABLED:
                continue
            height = tip.height + 1 if coin.height is None else coin.height
            value = spend.sequence & 0xFFFF
            if spend.sequence & SEQUENCE_TIME:
                if self._active.blocks[max(height - 1, 0)].median_time + value * 512 > tip.median_time:
                    return False
            elif height + value > tip.height + 1:
                return False
        return True

    def _check_amounts(self, tx: Tx, coins: Sequence[Unspent]) -> None:
        for coin in coins:
            if coin.coinbase and coin.height is not None:
                depth = self._active.height + 1 - coin.height
                if depth < COINBASE_MATURITY:
                    raise Refused(f"bad-txns-premature-spend-of-coinbase, tried to spend coinbase at depth {depth}")
        paid, spent = sum(out.value for out in tx.outputs), sum(coin.txout.value for coin in coins)
        if spent < paid:
            raise Refused(f"bad-txns-in-belowout, value in ({_btc(spent)}) < value out ({_btc(paid)})")

    def _check_scripts(self, entry: LabTx) -> None:
        for index, (spend, out) in enumerate(zip(entry.tx.inputs, entry.prevouts, strict=True)):
            if not _is_standard(out.script) or _future_witness(out.script):
                raise Refused(f"bad-txns-nonstandard-inputs, input {index}")
            if _has_high_s(spend, out):
                raise Refused(
                    "mempool-script-verify-flag-failed (Non-canonical signature: S value is unnecessarily high), "
                    f"input {index} of {entry.txid}, spending {spend.outpoint}"
                )
        bad = self._kernel.first_bad_input(entry.raw, entry.prevouts)
        if bad is not None:
            raise Refused(
                f"mempool-script-verify-flag-failed (the script does not hold), input {bad} of {entry.txid}, "
                f"spending {entry.tx.inputs[bad].outpoint}"
            )

    def afford(self, package: Sequence[tuple[LabTx, set[Txid]]]) -> set[Txid]:
        """Money: relay fee and replacement for a transaction or a package as a whole; answers what it replaces."""
        fee = sum(entry.fee for entry, _ in package)
        size = 4 * sum(entry.vsize for entry, _ in package)
        for rate, name in ((self.minimum, "mempool min fee"), (self.min_relay, "min relay fee")):
            if fee < rate.fee(size):
                raise Refused(f"{name} not met, {fee} < {rate.fee(size)}", fee=True)
        direct = set().union(*(against for _, against in package))
        if not direct:
            return set()
        replaced = self.ledger.family(direct)
        last = package[-1][0]
        if len(replaced) > MAX_REPLACED:
            raise Refused(
                f"too many potential replacements, rejecting replacement {last.txid}; "
                f"too many potential replacements ({len(replaced)} > {MAX_REPLACED})"
            )
        ours = {entry.txid for entry, _ in package}
        known = {spend.outpoint.txid for txid in direct for spend in self.ledger.txs[txid].tx.inputs}
        for entry, _ in package:
            for spend in entry.tx.inputs:
                parent = spend.outpoint.txid
                if parent in replaced:
                    raise Refused("bad-txns-spends-conflicting-tx")
                if parent in self.ledger.txs and parent not in known | ours:
                    raise Refused(
                        f"replacement-adds-unconfirmed, replacement {last.txid} adds unconfirmed input, parent {parent}"
                    )
        no = f"insufficient fee, rejecting replacement {last.txid}"
        for txid in direct:
            old = self.ledger.txs[txid]
            if fee * 4 * old.vsize <= old.fee * size:
                new_rate, old_rate = _btc(fee * 4000 // size), _btc(old.fee * 1000 // old.vsize)
                raise Refused(f"{no}; new feerate {new_rate} BTC/kvB <= old feerate {old_rate} BTC/kvB", fee=True)
        paid = sum(self.ledger.txs[txid].fee for txid in replaced)
        if fee < paid:
            raise Refused(f"{no}, less fees than conflicting txs; {_btc(fee)} < {_btc(paid)}", fee=True)
        relay = self.incremental.fee(size)
        if fee - paid < relay:
            raise Refused(f"{no}, not enough additional fees to relay; {_btc(fee - paid)} < {_btc(relay)}", fee=True)
        return replaced

    def enter(self, entries: Sequence[LabTx], replaced: set[Txid]) -> None:
        self.remove(replaced)
        for entry in entries:
            self.ledger.add(entry)

    # ------------------------------------------------------------ going out

    def remove(self, txids: Iterable[Txid]) -> tuple[Txid, ...]:
        """Throw these and their descendants out; answers what went."""
        gone = tuple(self.ledger.family(txid for txid in txids if txid in self.ledger.txs))
        for txid in gone:
            self.ledger.remove(txid)
        return gone

    def confirmed(self, block: LabBlock) -> None:
        """A block came: its transactions leave, and so does what they conflict with."""
        for position, entry in enumerate(block.txs):
            if position > 0:
                for spend in entry.tx.inputs:
                    rival = self.ledger.spent.get(spend.outpoint)
                    if rival is not None and rival != entry.txid:
                        self.remove([rival])
            if entry.txid in self.ledger.txs:
                self.ledger.remove(entry.txid)

    def refill(self, returned: Sequence[LabTx], drop: frozenset[Txid]) -> None:
        """After a reorganisation: the disconnected transactions return first, then what the mempool held and is still good."""
        waiting = [(entry, True) for entry in returned] + [(entry, False) for entry in self.ledger.ordered()]
        self.ledger = Ledger()
        for entry, scripts in waiting:
            if entry.coinbase or entry.txid in drop:
                continue
            try:
                again, conflicts = self.examine(entry.raw, {}, scripts=scripts)
            except (Known, Refused):
                continue
            if not conflicts:
                self.ledger.add(again)

    def spike(self, rate: FeeRate) -> tuple[Txid, ...]:
        """Raise (or lower) the mempool's floor; what pays less, even with its descendants, is evicted and named."""
        self.minimum = rate
        gone: list[Txid] = []
        for txid in list(self.ledger.txs):
            if txid in self.ledger.txs:
                family = [self.ledger.txs[t] for t in self.ledger.family([txid])]
                own = self.ledger.txs[txid]
                alone = own.fee >= rate.fee(4 * own.vsize)
                together = sum(t.fee for t in family) >= rate.fee(4 * sum(t.vsize for t in family))
                if not alone and not together:
                    gone += self.remove([txid])
        return tuple(gone)


# ---------------------------------------------------------------- form


def _is_final(tx: Tx, height: int, median_time: int) -> bool:
    """BIP113: may it stand in the next block?"""
    limit = height if tx.locktime < LOCKTIME_THRESHOLD else median_time
    return tx.locktime == 0 or tx.locktime < limit or all(spend.sequence == FINAL_SEQUENCE for spend in tx.inputs)


def _check_form(entry: LabTx) -> None:
    """What can be said without a chain: bitcoind's CheckTransaction and IsStandardTx."""
    reason = _malformed(entry) or _nonstandard(entry.tx)
    if reason:
        raise Refused(reason)


def _malformed(entry: LabTx) -> str | None:
    tx = entry.tx
    values = [out.value for out in tx.outputs]
    rules = (
        (not values, "bad-txns-vout-empty"),
        (any(value > MAX_MONEY for value in values), "bad-txns-vout-toolarge"),
        (sum(values) > MAX_MONEY, "bad-txns-txouttotal-toolarge"),
        (len({spend.outpoint for spend in tx.inputs}) != len(tx.inputs), "bad-txns-inputs-duplicate"),
        (entry.coinbase, "coinbase"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _nonstandard(tx: Tx) -> str | None:
    rules = (
        (tx.version not in (1, 2, 3), "version"),
        (tx.weight > MAX_TX_WEIGHT, "tx-size"),
        (any(len(spend.script_sig) > 1650 for spend in tx.inputs), "scriptsig-size"),
        (any(script_pushes(spend.script_sig) is None for spend in tx.inputs), "scriptsig-not-pushonly"),
        (not all(_is_standard(out.script) for out in tx.outputs), "scriptpubkey"),
        (any(out.value < dust_limit(out.script) for out in tx.outputs), "dust"),
        (len(tx.legacy) < 65, "tx-size-small"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _future_witness(script: bytes) -> bool:
    """A witness program that nobody can guard yet; pay-to-anchor is spendable."""
    return is_witness_program(script) and kind_of(script) is ScriptKind.OTHER and script != b"\x51\x02\x4e\x73"


def _is_standard(script: bytes) -> bool:
    if kind_of(script) is not ScriptKind.OTHER:
        return True
    if script.startswith(b"\x6a"):
        return script_pushes(script[1:]) is not None
    if len(script) in (35, 67) and script[0] == len(script) - 2 and script[-1] == 0xAC:
        return True
    return is_witness_program(script) and script[0] != 0


def _has_high_s(spend: TxIn, out: TxOut) -> bool:
    """Whether the signature of a single-key input has the malleable high S, which policy refuses and consensus does not."""
    stack: Sequence[bytes] = spend.witness
    if kind_of(out.script) is ScriptKind.P2PKH:
        stack = script_pushes(spend.script_sig) or ()
    elif kind_of(out.script) is ScriptKind.P2TR:
        return False
    if len(stack) != 2 or len(stack[0]) < 9 or stack[0][0] != 0x30:
        return False
    der = stack[0]
    start = 4 + der[3] + 2
    return int.from_bytes(der[start:-1], "big") > _ORDER // 2
