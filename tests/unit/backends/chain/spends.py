"""Good spends of every kind of script that payers use, and ways to spoil them; every key is a small number and guards nothing."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from coincurve import PrivateKey

from pjv2.errors import PeerMistake
from pjv2.psbt.scripts import (
    p2pkh_script,
    p2sh_script,
    p2tr_script,
    p2wpkh_script_code,
    p2wsh_script,
    sighash_segwit_v0,
    sighash_taproot,
    taproot_tweak,
)
from pjv2.psbt.tx import Tx, TxIn, TxOut, dust_limit, hash160, hash256, varint
from pjv2.units import Outpoint

ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
KINDS = ("p2pkh", "p2sh-p2wpkh", "p2wpkh", "p2tr", "p2wsh")
FINAL = 0xFFFFFFFF


def push(data: bytes) -> bytes:
    return bytes([len(data)]) + data if len(data) <= 75 else b"\x4c" + bytes([len(data)]) + data


@dataclass(frozen=True)
class Purse:
    """The keys of one kind of script; P2WSH is two of two."""

    kind: str
    number: int = 7
    compressed: bool = True

    @cached_property
    def keys(self) -> tuple[PrivateKey, ...]:
        return tuple(PrivateKey((self.number + n).to_bytes(32, "big")) for n in range(2))

    @cached_property
    def public(self) -> tuple[bytes, ...]:
        return tuple(key.public_key.format(self.compressed) for key in self.keys)

    @cached_property
    def program(self) -> bytes:
        """Witness script, or redeem script."""
        if self.kind == "p2wsh":
            return b"\x52" + b"".join(map(push, self.public)) + b"\x52\xae"
        return b"\x00\x14" + hash160(self.public[0])

    @cached_property
    def tweaked(self) -> PrivateKey:
        key = self.keys[0]
        secret = key.to_int() if key.public_key.format()[0] == 2 else ORDER - key.to_int()
        tweak = int.from_bytes(taproot_tweak(key.public_key.format()[1:]), "big")
        return PrivateKey.from_int((secret + tweak) % ORDER)

    @cached_property
    def script(self) -> bytes:
        return {
            "p2pkh": lambda: p2pkh_script(self.public[0]),
            "p2sh-p2wpkh": lambda: p2sh_script(self.program),
            "p2wpkh": lambda: self.program,
            "p2tr": lambda: p2tr_script(self.tweaked.public_key.format()[1:]),
            "p2wsh": lambda: p2wsh_script(self.program),
        }[self.kind]()

    def sign(self, tx: Tx, prevouts: Sequence[TxOut], hash_type: int = 1, *, high: bool = False) -> Tx:
        """Every input signed anew."""
        return replace(tx, inputs=tuple(self._sign(tx, n, prevouts, hash_type, high) for n in range(len(tx.inputs))))

    def _sign(self, tx: Tx, index: int, prevouts: Sequence[TxOut], hash_type: int, high: bool) -> TxIn:
        spend, value = tx.inputs[index], prevouts[index].value

        def ecdsa(key: PrivateKey, digest: bytes) -> bytes:
            signature = key.sign(digest, hasher=None)
            return (raised(signature) if high else signature) + bytes([hash_type])

        if self.kind == "p2pkh":
            signature = ecdsa(self.keys[0], legacy_digest(tx, index, self.script, hash_type))
            return replace(spend, script_sig=push(signature) + push(self.public[0]), witness=())
        if self.kind == "p2tr":
            given = 0 if hash_type == 1 else hash_type
            signature = self.tweaked.sign_schnorr(sighash_taproot(tx, index, prevouts, given), bytes(32))
            return replace(spend, script_sig=b"", witness=(signature + (bytes([given]) if given else b""),))
        if self.kind == "p2wsh":
            digest = sighash_segwit_v0(tx, index, self.program, value, hash_type)
            signatures = (ecdsa(key, digest) for key in self.keys)
            return replace(spend, script_sig=b"", witness=(b"", *signatures, self.program))
        digest = sighash_segwit_v0(tx, index, p2wpkh_script_code(self.program), value, hash_type)
        nested = push(self.program) if self.kind == "p2sh-p2wpkh" else b""
        return replace(spend, script_sig=nested, witness=(ecdsa(self.keys[0], digest), self.public[0]))


def legacy_digest(tx: Tx, index: int, code: bytes, hash_type: int) -> bytes:
    """What a P2PKH signature of any hash type signs; for SINGLE without an output of its own, the number one."""
    base = hash_type & 0x1F
    if base == 3 and index >= len(tx.outputs):
        return b"\x01" + bytes(31)
    inputs = [
        replace(
            spend,
            script_sig=code if n == index else b"",
            witness=(),
            sequence=0 if n != index and base in (2, 3) else spend.sequence,
        )
        for n, spend in enumerate(tx.inputs)
    ]
    outputs = {2: b"\x00"}.get(base, varint(len(tx.outputs)) + b"".join(out.serialize() for out in tx.outputs))
    if base == 3:
        blank = b"\xff" * 8 + b"\x00"
        outputs = varint(index + 1) + blank * index + tx.outputs[index].serialize()
    if hash_type & 0x80:
        inputs = [inputs[index]]
    body = varint(len(inputs)) + b"".join(spend.serialize() for spend in inputs) + outputs
    return hash256(struct.pack("<i", tx.version) + body + struct.pack("<II", tx.locktime, hash_type))


def raised(signature: bytes) -> bytes:
    """The same DER signature with the other, high S."""
    r = signature[2 : 4 + signature[3]]
    s = ORDER - int.from_bytes(signature[6 + signature[3] :], "big")
    body = s.to_bytes((s.bit_length() + 8) // 8, "big")
    return b"\x30" + bytes([len(r) + 2 + len(body)]) + r + b"\x02" + bytes([len(body)]) + body


OTHERS = tuple(Purse(kind, 40) for kind in KINDS)


@dataclass(frozen=True)
class World:
    """Coins of one purse on a chain: good ones, and those that cannot be spent now."""

    purse: Purse
    good: tuple[Outpoint, ...]
    spent: tuple[Outpoint, ...]
    immature: Outpoint
    height: int
    median_time: float
    coins: dict[Outpoint, TxOut]

    def prevouts(self, tx: Tx) -> list[TxOut]:
        return [self.coins.get(spend.outpoint, TxOut(50_000, self.purse.script)) for spend in tx.inputs]

    def signed(self, tx: Tx, hash_type: int = 1, *, high: bool = False) -> Tx:
        return self.purse.sign(tx, self.prevouts(tx), hash_type, high=high)

    def draft(self, dice: random.Random) -> Tx:
        """An unsigned transaction that can be broadcast: 1 to 3 coins to one or two places, at 2 to 20 sat/vB."""
        taken = dice.sample(self.good, dice.randint(1, 3))
        total = sum(self.coins[outpoint].value for outpoint in taken)
        scripts = [dice.choice((self.purse.script, dice.choice(OTHERS).script)) for _ in range(dice.randint(1, 2))]
        left = total - dice.randint(2, 20) * (150 * len(taken) + 100)
        first = dice.randint(1_000, left - 1_000) if len(scripts) == 2 else left
        values = [first, left - first][: len(scripts)]
        sequence = dice.choice((FINAL, FINAL - 1, FINAL - 2))
        return Tx(
            2,
            dice.choice((0, self.height)),
            tuple(TxIn(outpoint, sequence=sequence) for outpoint in taken),
            tuple(TxOut(value, script) for value, script in zip(values, scripts, strict=True)),
        )


Spoiling = Callable[[World, Tx, random.Random], Tx]
"""From an unsigned draft that could be broadcast to a signed transaction; sometimes it still can be."""


def _with_input(tx: Tx, index: int, **changes: object) -> Tx:
    inputs = list(tx.inputs)
    inputs[index] = replace(inputs[index], **changes)
    return replace(tx, inputs=tuple(inputs))


def _flip(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return bytes([dice.randrange(256)])
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]


def a_bit_of_the_signatures(world: World, tx: Tx, dice: random.Random) -> Tx:
    tx = world.signed(tx)
    index = dice.randrange(len(tx.inputs))
    spend = tx.inputs[index]
    if not spend.witness or (spend.script_sig and dice.random() < 0.3):
        return _with_input(tx, index, script_sig=_flip(spend.script_sig, dice))
    items = list(spend.witness)
    at = dice.randrange(len(items))
    items[at] = _flip(items[at], dice)
    return _with_input(tx, index, witness=tuple(items))


def another_hash_type(world: World, tx: Tx, dice: random.Random) -> Tx:
    if world.purse.kind == "p2tr":
        return world.signed(tx, dice.choice((2, 0x81, 0x82) + ((3, 0x83) if len(tx.outputs) >= len(tx.inputs) else ())))
    return world.signed(tx, dice.choice((2, 3, 0x81, 0x82, 0x83, 0x00, 0x04, 0x41)))


def the_hash_type_byte(world: World, tx: Tx, dice: random.Random) -> Tx:
    tx = world.signed(tx)
    index = dice.randrange(len(tx.inputs))
    spend = tx.inputs[index]
    if spend.witness:
        at = 1 if world.purse.kind == "p2wsh" else 0
        items = list(spend.witness)
        items[at] = items[at][:-1] + bytes([dice.randrange(256)]) if dice.random() < 0.5 else items[at] + b"\x01"
        return _with_input(tx, index, witness=tuple(items))
    size = spend.script_sig[0]
    changed = spend.script_sig[:size] + bytes([dice.randrange(256)]) + spend.script_sig[size + 1 :]
    return _with_input(tx, index, script_sig=changed)


def a_high_s(world: World, tx: Tx, dice: random.Random) -> Tx:
    return world.signed(tx, high=True)


def other_amounts(world: World, tx: Tx, dice: random.Random) -> Tx:
    outputs = list(tx.outputs)
    at = dice.randrange(len(outputs))
    change = dice.choice((-1, 1, -500, 500, 10**6, 10**15))
    outputs[at] = replace(outputs[at], value=max(outputs[at].value + change, 0))
    changed = replace(tx, outputs=tuple(outputs))
    # Either signed before the change, or after it.
    if dice.random() < 0.5:
        return replace(changed, inputs=world.signed(tx).inputs)
    return world.signed(changed)


def a_fee_near_the_least(world: World, tx: Tx, dice: random.Random) -> Tx:
    """25 sat/kwu is what the lab's chain takes; the size is known after signing, and may change by a byte."""
    size = -(-world.signed(tx).weight // 4)
    fee = dice.choice((0, 1, size // 10 - 1, size // 10, size // 10 + 1, size // 10 + 2))
    total = sum(out.value for out in world.prevouts(tx))
    first, *rest = tx.outputs
    first = replace(first, value=total - fee - sum(out.value for out in rest))
    return world.signed(replace(tx, outputs=(first, *rest)))


def dust(world: World, tx: Tx, dice: random.Random) -> Tx:
    script = dice.choice((world.purse.script, b"\x6a\x04abcd", b"\x51\x02\x4e\x73", b"\x52\x20" + bytes(32), b"\x6a"))
    value = dust_limit(script) + dice.choice((-1, 0, -100, 1)) if dice.random() < 0.8 else 0
    return world.signed(replace(tx, outputs=(*tx.outputs, TxOut(max(value, 0), script))))


def strange_outputs(world: World, tx: Tx, dice: random.Random) -> Tx:
    key = world.purse.keys[0].public_key
    script = dice.choice(
        (
            b"",
            b"\x51",
            push(key.format()) + b"\xac",
            push(key.format(False)) + b"\xac",
            push(b"\x09" + bytes(32)) + b"\xac",
            b"\x51" + push(key.format()) + b"\x51\xae",
            b"\x6a" + push(bytes(60)) + push(bytes(60)),
            b"\x6a\x51\xac",
            b"\x00\x10" + bytes(16),
            b"\x60\x28" + bytes(40),
        )
    )
    extra = [TxOut(dice.choice((0, 700, 1_000)), script)] * dice.choice((1, 1, 2))
    return world.signed(replace(tx, outputs=(*tx.outputs, *extra)))


def another_lock_time(world: World, tx: Tx, dice: random.Random) -> Tx:
    now = int(world.median_time)
    locktime = dice.choice((world.height, world.height + 1, world.height + 2, now - 1, now, now + 1, 0xFFFFFFFF))
    changed = replace(tx, locktime=locktime)
    return world.signed(changed) if dice.random() < 0.8 else replace(changed, inputs=world.signed(tx).inputs)


def other_sequences(world: World, tx: Tx, dice: random.Random) -> Tx:
    def one() -> int:
        return dice.choice(
            (0, 1, 2, 5, 10, 16, 0xFFFF, 1 << 22, (1 << 22) | 1, (1 << 22) | 9, 1 << 31, FINAL, 0x00100003)
        )

    changed = replace(tx, version=dice.choice((1, 2)), inputs=tuple(replace(i, sequence=one()) for i in tx.inputs))
    if dice.random() < 0.8:
        return world.signed(changed)
    signed = world.signed(tx)
    return replace(signed, inputs=tuple(replace(i, sequence=one()) for i in signed.inputs))


def another_version(world: World, tx: Tx, dice: random.Random) -> Tx:
    changed = replace(tx, version=dice.choice((-1, 0, 1, 2, 3, 4, 0x7FFFFFFF)))
    return world.signed(changed) if dice.random() < 0.7 else replace(changed, inputs=world.signed(tx).inputs)


def another_coin(world: World, tx: Tx, dice: random.Random) -> Tx:
    """A coin that is not there, or is spent, or immature, or not the one that was signed for."""
    unknown = Outpoint(dice.randbytes(32).hex(), dice.randrange(3))
    beside = Outpoint(world.good[0].txid, 1000)
    outpoint = dice.choice((unknown, beside, *world.spent, world.immature, dice.choice(world.good)))
    index = dice.randrange(len(tx.inputs))
    if dice.random() < 0.7:
        changed = _with_input(tx, index, outpoint=outpoint)
        more = sum(out.value for out in world.prevouts(changed)) - sum(out.value for out in world.prevouts(tx))
        first = replace(tx.outputs[0], value=max(tx.outputs[0].value + more, 0))
        return world.signed(replace(changed, outputs=(first, *tx.outputs[1:])))
    return _with_input(world.signed(tx), index, outpoint=outpoint)


def an_input_twice(world: World, tx: Tx, dice: random.Random) -> Tx:
    return world.signed(replace(tx, inputs=(*tx.inputs, dice.choice(tx.inputs))))


def other_witness_items(world: World, tx: Tx, dice: random.Random) -> Tx:
    tx = world.signed(tx)
    index = dice.randrange(len(tx.inputs))
    items = list(tx.inputs[index].witness)
    extra = dice.choice((b"", b"\x01", b"\x50", b"\x50annex", bytes(81), dice.randbytes(64)))
    match dice.randrange(4):
        case 0 if items:
            del items[dice.randrange(len(items))]
        case 1 if len(items) > 1:
            dice.shuffle(items)
        case 2:
            items.append(extra)
        case _:
            items.insert(0, extra)
    return _with_input(tx, index, witness=tuple(items))


def other_script_sigs(world: World, tx: Tx, dice: random.Random) -> Tx:
    tx = world.signed(tx)
    index = dice.randrange(len(tx.inputs))
    script_sig = tx.inputs[index].script_sig
    size = script_sig[0] if script_sig else 0
    changed = dice.choice(
        (
            b"",
            b"\x00" + script_sig,
            script_sig + b"\x51",
            b"\x51" + script_sig,
            b"\x61" + script_sig,
            b"\x4c" + script_sig,
            b"\x4d" + bytes([size, 0]) + script_sig[1:],
            script_sig[:-1],
            push(world.purse.program) if world.purse.kind in ("p2pkh", "p2wpkh") else script_sig + script_sig,
            b"\x01\x00" * 900,
        )
    )
    return _with_input(tx, index, script_sig=changed)


def noise(world: World, tx: Tx, dice: random.Random) -> Tx:
    """Any bit of the signed transaction; what cannot be read any more is told by the next mutation instead."""
    raw = world.signed(tx).raw
    for _ in range(20):
        try:
            return Tx.parse(_flip(raw, dice))
        except PeerMistake:
            continue
    return world.signed(tx)


SPOILINGS: tuple[Spoiling, ...] = (
    a_bit_of_the_signatures,
    another_hash_type,
    the_hash_type_byte,
    a_high_s,
    other_amounts,
    a_fee_near_the_least,
    dust,
    strange_outputs,
    another_lock_time,
    other_sequences,
    another_version,
    another_coin,
    an_input_twice,
    other_witness_items,
    other_script_sigs,
    noise,
)
