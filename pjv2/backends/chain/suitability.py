"""Would the network take this transaction? Judged without a node, from previous outputs that were read from a chain source.

It says yes only to what it knows: single-key spends, plain multisig, confirmed coins or a small unconfirmed family, versions 1 and 2.
What a node might take but this module cannot vouch for is `unverifiable` with the reason; what no node takes is `refused`. Scripts
are run by libbitcoinkernel under all consensus flags. The rules that nodes add to consensus (low S, minimal pushes, compressed keys,
clean stacks, no unknown opcodes) are kept by recognising the shape of the spend, never by guessing about others.

```
check_form ──► previous outputs ──► locks, maturity ──► money ──► scripts (kernel) ──► shapes of spends ──► unconfirmed family
```

Law: a yes from here is a yes from bitcoind with default settings, unless a conflict is under way that the source has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pjv2.psbt.coin import script_pushes
from pjv2.psbt.original import Prevout, Suitability, lock_is_satisfied
from pjv2.psbt.tx import ScriptKind, Tx, TxIn, TxOut, dust_limit, is_witness_program, kind_of
from pjv2.session.facts import Tip
from pjv2.units import MAX_MONEY, FeeRate, Outpoint, Sats, Weight

COINBASE_MATURITY = 100
MAX_TX_WEIGHT: Weight = 400_000
MAX_SCRIPT_SIG = 1650
MAX_OP_RETURN = 83
"""Newer nodes relay more; this is what all of them do."""

MAX_RATE = FeeRate(2_500_000)
"""0.1 BTC/kvB: above it bitcoind takes the fee for a mistake."""

MAX_FAMILY = 25
MAX_FAMILY_WEIGHT: Weight = 400_000
LOCKTIME_THRESHOLD = 500_000_000
_FINAL_SEQUENCE = 0xFFFFFFFF
_NULL = Outpoint("0" * 64, 0xFFFFFFFF)
_HALF_ORDER = 0x7FFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFF_5D576E73_57A4501D_DFE92F46_681B20A0
_CHECKSIG, _CHECKMULTISIG, _CHECKSIGADD, _NUMEQUAL = 0xAC, 0xAE, 0xBA, 0x9C
_HASH_TYPES = frozenset((0x01, 0x02, 0x03, 0x81, 0x82, 0x83))


class Judged(Exception):
    """A verdict other than yes; it does not leave this package."""

    def __init__(self, verdict: Literal["known", "refused", "unverifiable"], reason: str) -> None:
        super().__init__(reason)
        self.suitability = Suitability(verdict, reason)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a chain source knows about a transaction's surroundings.

    `floor` is the least rate the source's mempool takes. `family` are the unconfirmed ancestors and whatever else descends from
    them, without the transaction; None when there were too many to read.
    """

    tip: Tip
    prevouts: Mapping[Outpoint, Prevout]
    floor: FeeRate
    family: tuple[Tx, ...] | None = ()


class ScriptVerifier:
    """libbitcoinkernel's script interpreter; `load` answers None where its wheel is not installed."""

    def __init__(self, pbk: Any) -> None:
        self._pbk = pbk

    @classmethod
    def load(cls) -> ScriptVerifier | None:
        try:
            import pbk
        except ImportError:
            return None
        return cls(pbk)

    def first_bad_input(self, raw: bytes, prevouts: Sequence[TxOut]) -> int | None:
        """The first input whose script fails under all consensus flags (about 0.1 ms each); None when all hold."""
        pbk = self._pbk
        try:
            tx = pbk.Transaction(raw)
        except (RuntimeError, pbk.KernelException) as exc:
            raise Judged("refused", "the kernel cannot read the transaction") from exc
        scripts = [pbk.ScriptPubkey(out.script) for out in prevouts]
        spent = [pbk.TransactionOutput(script, out.value) for script, out in zip(scripts, prevouts, strict=True)]
        precomputed = pbk.script.PrecomputedTransactionData(tx, spent)
        flags = pbk.ScriptVerificationFlags.ALL
        for index, (script, out) in enumerate(zip(scripts, prevouts, strict=True)):
            # 1 or 0: a script that fails does not raise.
            if script.verify(out.value, tx, precomputed, index, flags) != 1:
                return index
        return None


def judge(tx: Tx, outlook: Outlook, verifier: ScriptVerifier | None) -> Suitability:
    """Would the next block, and every mempool on the way to it, take `tx`? About 0.1 ms an input."""
    try:
        check_form(tx)
        prevouts = _coins(tx, outlook)
        _check_locks(tx, prevouts, outlook.tip)
        _check_money(tx, prevouts, outlook.floor)
        if verifier is None:
            raise Judged("unverifiable", "no script can be verified: install pjv2[lab], which brings libbitcoinkernel")
        outputs = [coin.txout for coin in prevouts]
        bad = verifier.first_bad_input(tx.raw, outputs)
        if bad is not None:
            raise Judged("refused", f"mempool-script-verify-flag-failed, input {bad}: the script does not hold")
        for index, (spend, out) in enumerate(zip(tx.inputs, outputs, strict=True)):
            check_spend(index, spend, out)
        _check_family(tx, prevouts, outlook.family)
    except Judged as judged:
        return judged.suitability
    return Suitability("accepted")


# ---------------------------------------------------------------- the transaction by itself


def check_form(tx: Tx) -> None:
    """What can be said without a chain (bitcoind: CheckTransaction, IsStandardTx). Raises Judged."""
    values = [out.value for out in tx.outputs]
    rules = (
        (not tx.inputs, "bad-txns-vin-empty"),
        (not values, "bad-txns-vout-empty"),
        (any(value > MAX_MONEY for value in values) or sum(values) > MAX_MONEY, "bad-txns-txouttotal-toolarge"),
        (len({spend.outpoint for spend in tx.inputs}) != len(tx.inputs), "bad-txns-inputs-duplicate"),
        (any(spend.outpoint == _NULL for spend in tx.inputs), "coinbase"),
        (tx.version not in (1, 2, 3), "version"),
        (tx.weight > MAX_TX_WEIGHT, "tx-size"),
        (len(tx.legacy) < 65, "tx-size-small"),
        (any(len(spend.script_sig) > MAX_SCRIPT_SIG for spend in tx.inputs), "scriptsig-size"),
        (any(script_pushes(spend.script_sig) is None for spend in tx.inputs), "scriptsig-not-pushonly"),
    )
    for broken, reason in rules:
        if broken:
            raise Judged("refused", reason)
    if tx.version == 3:
        raise Judged("unverifiable", "the special rules for version 3 transactions cannot be judged without a node")
    for index, out in enumerate(tx.outputs):
        _check_output(index, out)
    if sum(out.script.startswith(b"\x6a") for out in tx.outputs) > 1:
        raise Judged("unverifiable", "some nodes do not relay several OP_RETURN outputs")


def _check_output(index: int, out: TxOut) -> None:
    script = out.script
    if script.startswith(b"\x6a"):
        if script_pushes(script[1:]) is None:
            raise Judged("refused", f"scriptpubkey, output {index}")
        if len(script) > MAX_OP_RETURN:
            raise Judged("unverifiable", f"output {index}: some nodes relay no OP_RETURN above {MAX_OP_RETURN} bytes")
        if out.value:
            raise Judged("refused", f"output {index} burns money")
        return
    known = kind_of(script) is not ScriptKind.OTHER or (is_witness_program(script) and script[0] != 0)
    if not known and not _is_p2pk(script):
        raise Judged("unverifiable", f"output {index} pays a script that not every node relays")
    if out.value < dust_limit(script):
        raise Judged("refused", f"dust, output {index}")


def _is_p2pk(script: bytes) -> bool:
    return script[-1:] == b"\xac" and script[0] == len(script) - 2 and _is_key(script[1:-1], uncompressed=True)


# ---------------------------------------------------------------- the transaction in its chain


def _coins(tx: Tx, outlook: Outlook) -> list[Prevout]:
    coins = []
    for spend in tx.inputs:
        coin = outlook.prevouts.get(spend.outpoint)
        if coin is None:
            raise Judged("refused", f"missing-inputs: {spend.outpoint} is not known")
        if coin.spent_by == tx.txid:
            raise Judged("known", "it is under way already")
        if coin.spent_by is not None:
            raise Judged("refused", f"{spend.outpoint} is spent by {coin.spent_by}")
        coins.append(coin)
    return coins


def _check_locks(tx: Tx, coins: Sequence[Prevout], tip: Tip) -> None:
    # BIP113: judged for the next block.
    limit = tip.height + 1 if tx.locktime < LOCKTIME_THRESHOLD else tip.median_time
    if tx.locktime >= limit and tx.locktime and any(spend.sequence != _FINAL_SEQUENCE for spend in tx.inputs):
        raise Judged("refused", f"non-final: the lock time {tx.locktime} is still to come")
    for spend, coin in zip(tx.inputs, coins, strict=True):
        if not lock_is_satisfied(
            tx.version, spend.sequence, coin.height, coin.time, tip=tip.height, tip_time=tip.median_time
        ):
            raise Judged("refused", f"non-BIP68-final: the relative lock on {spend.outpoint} is still to come")
        if coin.coinbase:
            depth = 0 if coin.height is None else tip.height + 1 - coin.height
            if depth < COINBASE_MATURITY:
                raise Judged("refused", f"bad-txns-premature-spend-of-coinbase at depth {depth}")


def _check_money(tx: Tx, coins: Sequence[Prevout], floor: FeeRate) -> None:
    spent, paid = sum(coin.txout.value for coin in coins), sum(out.value for out in tx.outputs)
    if spent < paid:
        raise Judged("refused", f"bad-txns-in-belowout: {spent} < {paid} sat")
    fee: Sats = spent - paid
    size = 4 * -(-tx.weight // 4)  # nodes count in whole virtual bytes
    if fee < floor.fee(size):
        raise Judged("refused", f"min relay fee not met: {fee} < {floor.fee(size)} sat")
    if fee > MAX_RATE.fee(size):
        raise Judged("refused", f"max-fee-exceeded: {fee} sat for {size // 4} vB")


def _check_family(tx: Tx, coins: Sequence[Prevout], family: tuple[Tx, ...] | None) -> None:
    if all(coin.height is not None for coin in coins):
        return
    if not family:
        raise Judged("unverifiable", "it spends unconfirmed outputs with too many unconfirmed relatives")
    if any(relative.version not in (1, 2) for relative in family):
        raise Judged("unverifiable", "it spends an output of an unconfirmed version 3 transaction")
    # A family this small keeps every limit on ancestors, descendants and clusters that nodes ever had.
    if len(family) + 1 > MAX_FAMILY or sum(one.weight for one in (*family, tx)) > MAX_FAMILY_WEIGHT:
        raise Judged("unverifiable", "it spends unconfirmed outputs with too many unconfirmed relatives")


# ---------------------------------------------------------------- shapes of spends


def check_spend(index: int, spend: TxIn, out: TxOut) -> None:
    """Is this input, whose script holds, one that every node relays? Raises Judged for every shape that is not known."""
    problem = _spend_problem(spend, out)
    if problem is not None:
        raise Judged("unverifiable", f"input {index} {problem}")


def _spend_problem(spend: TxIn, out: TxOut) -> str | None:
    if out.kind is ScriptKind.P2SH:
        return _nested_problem(spend)
    if out.kind is ScriptKind.P2PKH:
        pushes = _minimal_pushes(spend.script_sig)
        return "has a witness too many" if spend.witness else _key_spend_problem(pushes or (), uncompressed=True)
    return "has a script signature too many" if spend.script_sig else _witness_problem(out.kind, spend.witness)


def _nested_problem(spend: TxIn) -> str | None:
    """P2SH: around P2WPKH or P2WSH, or plain multisig."""
    pushes = _minimal_pushes(spend.script_sig)
    if not pushes:
        return "does not push minimally"
    inner = kind_of(pushes[-1])
    if inner in (ScriptKind.P2WPKH, ScriptKind.P2WSH):
        return "leaves a stack that is not clean" if len(pushes) > 1 else _witness_problem(inner, spend.witness)
    return "has a witness too many" if spend.witness else _multisig_problem(pushes[-1], pushes[:-1], legacy=True)


def _witness_problem(kind: ScriptKind, witness: tuple[bytes, ...]) -> str | None:
    if not witness:
        return "has no witness"
    if kind is ScriptKind.P2WPKH:
        return _key_spend_problem(witness, uncompressed=False)
    if kind is ScriptKind.P2WSH:
        return _script_problem(witness)
    if kind is ScriptKind.P2TR:
        return _taproot_problem(witness)
    return "spends a kind of script that cannot be judged without a node"


def _key_spend_problem(items: Sequence[bytes], *, uncompressed: bool) -> str | None:
    if len(items) != 2 or not _is_key(items[1], uncompressed=uncompressed):
        return "is no plain signature and key"
    return _signature_problem(items[0])


def _script_problem(witness: tuple[bytes, ...]) -> str | None:
    """P2WSH: one key, plain multisig, or a script that anyone can open."""
    script, items = witness[-1], witness[:-1]
    if len(script) == 35 and script[0] == 33 and script[34] == _CHECKSIG:
        if len(items) != 1 or not _is_key(script[1:34], uncompressed=False):
            return "is no plain signature for its key"
        return _signature_problem(items[0])
    if len(script) == 1 and 0x51 <= script[0] <= 0x60 and not items:
        return None
    return _multisig_problem(script, items, legacy=False)


def _multisig_problem(script: bytes, items: Sequence[bytes], *, legacy: bool) -> str | None:
    found = _multisig(script, legacy=legacy)
    if found is None:
        return "opens a script that cannot be judged without a node"
    if len(items) != found + 1 or items[0] != b"":
        return "does not bring exactly the signatures of its multisig"
    return next((problem for item in items[1:] if (problem := _signature_problem(item))), None)


def _multisig(script: bytes, *, legacy: bool) -> int | None:
    """How many signatures `m <key>… n CHECKMULTISIG` with 1 to 16 plain keys wants; None for any other script."""
    if len(script) < 3 or script[-1] != _CHECKMULTISIG:
        return None
    wanted, total = script[0] - 0x50, script[-2] - 0x50
    keys, at = 0, 1
    while at < len(script) - 2:
        size = script[at]
        key = script[at + 1 : at + 1 + size]
        if at + 1 + size > len(script) - 2 or not _is_key(key, uncompressed=legacy):
            return None
        keys, at = keys + 1, at + 1 + size
    return wanted if 1 <= wanted <= total <= 16 and keys == total else None


def _taproot_problem(witness: tuple[bytes, ...]) -> str | None:
    """Key path, or a leaf with one key or a threshold of keys (BIP342); there, invalid signatures fail by consensus."""
    if len(witness) >= 2 and witness[-1][:1] == b"\x50":
        return "carries an annex"
    if len(witness) == 1:
        return None if len(witness[0]) in (64, 65) else "is no plain signature"
    *items, script, control = witness
    if control[0] & 0xFE != 0xC0:
        return "opens a leaf of an unknown version"
    keys = _leaf_keys(script)
    if keys is None:
        return "opens a script that cannot be judged without a node"
    if len(items) != keys or any(len(item) not in (0, 64, 65) for item in items):
        return "does not bring exactly the signatures of its leaf"
    return None


def _leaf_keys(script: bytes) -> int | None:
    """How many keys `<key> CHECKSIG [<key> CHECKSIGADD … m NUMEQUAL]` has; None for any other script."""
    keys, at = 0, 0
    while at + 34 <= len(script) and script[at] == 32:
        if script[at + 33] != (_CHECKSIGADD if keys else _CHECKSIG):
            return None
        keys, at = keys + 1, at + 34
    rest = script[at:]
    if keys == 1 and not rest:
        return 1
    threshold = len(rest) == 2 and rest[1] == _NUMEQUAL and 1 <= rest[0] - 0x50 <= min(keys, 16)
    return keys if threshold else None


def _is_key(key: bytes, *, uncompressed: bool) -> bool:
    return (len(key) == 33 and key[0] in (2, 3)) or (uncompressed and len(key) == 65 and key[0] == 4)


def _signature_problem(signature: bytes) -> str | None:
    """Strict DER is consensus (BIP66); a low S and a defined hash type are policy."""
    if len(signature) < 9 or signature[0] != 0x30 or signature[1] != len(signature) - 3:
        return "has a signature that is not canonical"
    start = 6 + signature[3]
    if start > len(signature) - 2 or int.from_bytes(signature[start:-1], "big") > _HALF_ORDER:
        return "has a signature with a high S"
    return None if signature[-1] in _HASH_TYPES else "has a signature of an unknown hash type"


def _minimal_pushes(script: bytes) -> tuple[bytes, ...] | None:
    pushes = script_pushes(script)
    return pushes if pushes is not None and b"".join(map(_push, pushes)) == script else None


def _push(data: bytes) -> bytes:
    """The shortest script that pushes `data`, which came out of a scriptSig of at most 1650 bytes."""
    size = len(data)
    if size == 0:
        return b"\x00"
    if size == 1 and 1 <= data[0] <= 16:
        return bytes([0x50 + data[0]])
    if data == b"\x81":
        return b"\x4f"
    if size <= 75:
        return bytes([size]) + data
    return (b"\x4c" + bytes([size]) if size <= 255 else b"\x4d" + size.to_bytes(2, "little")) + data
