"""A wallet on paper: keys from a seed, real signatures, its coins read from any `ports.Chain`. For tests and the lab only.

It speaks every single-key script that payers use: P2WPKH, P2TR (key path, BIP86), P2WPKH nested in P2SH, and P2PKH. Its keys are
HMAC-SHA512 of the seed and a path of its own: this is not BIP32, no other wallet finds its coins, and it must never hold money.
It refuses to sign inputs that are not its own, sighash types other than ALL and DEFAULT, and coins the chain does not know.

Law: what it signs is decided by its own knowledge of the coin, never by what a PSBT says about it; the seed is never on disk and
never in a repr.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from coincurve import PrivateKey

from pjv2.backends.files import replace_whole
from pjv2.errors import CannotRead, NotNow, PeerMistake, WrongUsage
from pjv2.ports import Chain, WalletAddress
from pjv2.psbt.coin import Coin, input_weight
from pjv2.psbt.scripts import (
    p2pkh_script,
    p2sh_script,
    p2tr_script,
    p2wpkh_script,
    p2wpkh_script_code,
    sighash_legacy,
    sighash_segwit_v0,
    sighash_taproot,
    taproot_tweak,
)
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxIn, TxOut, dust_limit, script_to_address
from pjv2.units import FeeRate, Instant, Network, Outpoint, Sats, Txid

PaperKind: TypeAlias = Literal["p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh"]
"""The script types a paper wallet speaks."""

GAP = 20
"""Scripts watched beyond the last one handed out, so that a wallet without a file finds its coins again."""

COINBASE_MATURITY = 100
_ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
_SCRIPT_KINDS: Mapping[PaperKind, ScriptKind] = {
    "p2wpkh": ScriptKind.P2WPKH,
    "p2tr": ScriptKind.P2TR,
    "p2sh-p2wpkh": ScriptKind.P2SH,
    "p2pkh": ScriptKind.P2PKH,
}


@dataclass(frozen=True, slots=True)
class _Path:
    kind: PaperKind
    branch: int
    index: int

    @property
    def chain(self) -> str:
        return f"{self.kind}/{self.branch}"


@dataclass(frozen=True, slots=True)
class _Key:
    """One key and the script it guards; for P2TR `private` is already tweaked and `internal` is the key before the tweak."""

    path: _Path
    private: PrivateKey = field(repr=False)
    public: bytes
    script: bytes
    redeem: bytes | None = None
    internal: bytes | None = None

    @classmethod
    def of(cls, path: _Path, private: PrivateKey) -> _Key:
        public = private.public_key.format()
        if path.kind == "p2tr":
            secret = private.to_int() if public[0] == 2 else _ORDER - private.to_int()
            tweaked = PrivateKey.from_int((secret + int.from_bytes(taproot_tweak(public[1:]), "big")) % _ORDER)
            output = tweaked.public_key.format()[1:]
            return cls(path, tweaked, public, p2tr_script(output), internal=public[1:])
        if path.kind == "p2pkh":
            return cls(path, private, public, p2pkh_script(public))
        program = p2wpkh_script(public)
        if path.kind == "p2wpkh":
            return cls(path, private, public, program)
        return cls(path, private, public, p2sh_script(program), redeem=program)

    def unlock(self, tx: Tx, index: int, prevouts: Sequence[TxOut]) -> tuple[bytes, tuple[bytes, ...]]:
        """The scriptSig and witness that spend this key's coin at `index` of `tx`."""
        kind = self.path.kind
        if kind == "p2tr":
            return b"", (self.private.sign_schnorr(sighash_taproot(tx, index, prevouts), bytes(32)),)
        if kind == "p2pkh":
            return _push(self._ecdsa(sighash_legacy(tx, index, self.script))) + _push(self.public), ()
        program = self.redeem or self.script
        digest = sighash_segwit_v0(tx, index, p2wpkh_script_code(program), prevouts[index].value)
        return (_push(self.redeem) if self.redeem else b""), (self._ecdsa(digest), self.public)

    def largest(self) -> tuple[bytes, tuple[bytes, ...]]:
        """Stand-ins of the largest size that `unlock` can return."""
        if self.path.kind == "p2tr":
            return b"", (bytes(64),)
        if self.path.kind == "p2pkh":
            return _push(bytes(72)) + _push(self.public), ()
        return (_push(self.redeem) if self.redeem else b""), (bytes(72), self.public)

    def _ecdsa(self, digest: bytes) -> bytes:
        return self.private.sign(digest, hasher=None) + b"\x01"  # libsecp256k1 makes S low


@dataclass(frozen=True, slots=True)
class _Held:
    """A coin that was ever ours, as the chain told it."""

    outpoint: Outpoint
    txout: TxOut
    key: _Key
    parent: Tx
    height: int | None
    spent_by: Txid | None
    spent_height: int | None

    @property
    def coinbase(self) -> bool:
        return self.parent.inputs[0].outpoint.txid == "0" * 64

    def mature(self, tip: int) -> bool:
        return self.height is not None and (not self.coinbase or tip + 1 - self.height >= COINBASE_MATURITY)


@dataclass(slots=True)
class _Memory:
    """What survives a restart: the next index of every key chain, and the locks. Nothing secret."""

    following: dict[str, int] = field(default_factory=dict)
    locks: dict[Outpoint, tuple[bytes, Instant]] = field(default_factory=dict)


class PaperWallet:
    """A `ports.Wallet` whose coins are found with `chain.view` and whose signatures are real.

    `seed` is at least 16 bytes; `kinds` are the script types it uses, the first one for new addresses and change. `store_path`
    keeps derivation indexes and locks (JSON, mode 0600, fsynced before an address is returned); without it they live in memory,
    and used addresses are found again by looking ahead. `locked_for_signing = True` makes it behave like a locked wallet.
    `now` dates lock expiry. Raises WrongUsage for a file of another seed, CannotRead for a file of another version.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        seed: bytes,
        network: Network = Network.REGTEST,
        store_path: Path | None = None,
        kinds: Sequence[PaperKind] = ("p2wpkh", "p2tr"),
        now: Callable[[], Instant] = time.time,
    ) -> None:
        if len(seed) < 16:
            raise WrongUsage("a paper wallet's seed has at least 16 bytes")
        if not kinds or any(kind not in get_args(PaperKind) for kind in kinds):
            raise WrongUsage(f"a paper wallet speaks {', '.join(get_args(PaperKind))}")
        self.locked_for_signing = False
        self._chain = chain
        self._seed = seed
        self._network = network
        self._kinds: tuple[PaperKind, ...] = tuple(dict.fromkeys(kinds))
        self._now = now
        self._store_path = store_path
        self._keys: dict[_Path, _Key] = {}
        self._by_script: dict[bytes, _Key] = {}
        self._parsed: dict[Txid, Tx] = {}
        self._watched: set[Outpoint] = set()
        self._closed = False
        identity = self._private("identity").public_key.format()
        self._fingerprint = hashlib.sha256(b"pjv2 paper wallet" + identity).hexdigest()[:8]
        self._memory = self._load()
        self._look_ahead()

    def __repr__(self) -> str:
        return f"PaperWallet({self._fingerprint}, {self._network}, {'/'.join(self._kinds)})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise WrongUsage("a paper wallet is not pickled: make another one from its seed")

    # ------------------------------------------------------------ ports.Wallet

    async def fingerprint(self) -> str:
        return self._fingerprint

    async def network(self) -> Network:
        return self._network

    async def new_address(self, *, change: bool = False, kind: PaperKind | None = None) -> WalletAddress:
        """A fresh address of the first kind, or of `kind`. Coins sent to a used address are looked for first."""
        self._open()
        chosen = self._kinds[0] if kind is None else kind
        if chosen not in self._kinds:
            raise WrongUsage(f"this paper wallet has no {chosen} addresses")
        if self._store_path is None:
            await self._scan()
        return self._reveal(chosen, change)

    async def mine(self, outpoints: Sequence[Outpoint]) -> frozenset[Outpoint]:
        _, held = await self._scan()
        return frozenset(outpoint for outpoint in outpoints if outpoint in held)

    async def coins(self) -> tuple[Coin, ...]:
        tip, held = await self._scan()
        self._forget_expired()
        return tuple(
            Coin(
                outpoint=coin.outpoint,
                txout=coin.txout,
                weight=input_weight(_SCRIPT_KINDS[coin.key.path.kind]),
                height=coin.height,
                redeem_script=coin.key.redeem,
                non_witness=coin.parent.raw if coin.key.path.kind == "p2pkh" else None,
            )
            for coin in self._spendable(held.values(), tip)
            if coin.outpoint not in self._memory.locks
        )

    async def balance(self) -> Sats:
        """Everything confirmed, mature and unspent, locked coins included."""
        tip, held = await self._scan()
        return sum(coin.txout.value for coin in self._spendable(held.values(), tip))

    async def lock(self, coins: Sequence[Outpoint], lock_id: bytes, until: Instant) -> tuple[Outpoint, ...]:
        """All or nothing: the coins that are not ours, spent, or locked under another id are answered, and none is locked then."""
        _, held = await self._scan()
        return self._take(coins, held, lock_id, until)

    async def unlock(self, coins: Sequence[Outpoint], lock_id: bytes) -> None:
        """Coins that are locked under another id, or not at all, are left as they are."""
        self._open()
        for outpoint in coins:
            if self._memory.locks.get(outpoint, (b"", 0.0))[0] == lock_id:
                del self._memory.locks[outpoint]
        self._save()

    def locked(self) -> frozenset[Outpoint]:
        """Every coin that is locked now, under whatever id."""
        now = self._now()
        return frozenset(outpoint for outpoint, (_, until) in self._memory.locks.items() if until > now)

    def scripts(self) -> frozenset[bytes]:
        """Every script this wallet would recognise as its own."""
        return frozenset(self._by_script)

    async def can_sign(self) -> bool:
        return not self.locked_for_signing and not self._closed

    async def sign(self, psbt: bytes, ours: Sequence[Outpoint]) -> bytes:
        """The PSBT with exactly these inputs final and every other map as it was.

        Our prevouts come from the chain, the others' from the PSBT (a taproot signature commits to them) and, where it is silent,
        from the chain. Raises NotNow while the wallet is locked, WrongUsage for an input that is not ours or a foreign sighash type.
        """
        self._ready_to_sign()
        try:
            parsed = Psbt.parse(psbt)
        except PeerMistake as exc:
            raise WrongUsage(f"the wallet was given no PSBT to sign: {exc}") from exc
        _, held = await self._scan()
        places = {spend.outpoint: index for index, spend in enumerate(parsed.tx.inputs)}
        for outpoint in ours:
            if outpoint not in held:
                raise WrongUsage(f"{outpoint} is not a coin of this wallet: it will not be signed")
            if outpoint not in places:
                raise WrongUsage(f"{outpoint} is not spent by the PSBT")
            if parsed.inputs[places[outpoint]].sighash_type not in (None, 0, 1):
                raise WrongUsage(f"{outpoint} asks for a signature that is neither ALL nor DEFAULT")
        prevouts = await self._prevouts(parsed, held)
        maps = list(parsed.inputs)
        for outpoint in ours:
            index = places[outpoint]
            script_sig, witness = held[outpoint].key.unlock(parsed.tx, index, prevouts)
            maps[index] = replace(
                maps[index],
                final_script_sig=script_sig or None,
                final_script_witness=witness or None,
                partial_sigs=(),
                tap_key_sig=None,
            )
        return replace(parsed, inputs=tuple(maps)).serialize()

    async def fund(
        self,
        payments: Sequence[TxOut],
        rate: FeeRate,
        lock_id: bytes,
        until: Instant,
        *,
        avoid: frozenset[Outpoint] = frozenset(),
    ) -> bytes:
        """A signed version 2 transaction to `payments` as PSBT, its inputs locked.

        The fee is `rate` on the largest weight the signatures can have (at most one unit per input above the real one); change
        below dust joins the fee. The lock time is the tip's height, every sequence 0xfffffffd. Raises WrongUsage with what is missing.
        """
        self._ready_to_sign()
        tip, held = await self._scan()
        self._forget_expired()
        purse = [
            coin
            for coin in self._spendable(held.values(), tip)
            if coin.outpoint not in self._memory.locks and coin.outpoint not in avoid
        ]
        change = self._peek(self._kinds[0], 1)
        taken, tx = self._compose(payments, rate, purse, change.script, tip)
        if any(out.script == change.script for out in tx.outputs):
            self._reveal(self._kinds[0], True)
        if self._take([coin.outpoint for coin in taken], held, lock_id, until):
            raise NotNow("the wallet's coins were locked by somebody else meanwhile: try again")
        prevouts = [coin.txout for coin in taken]
        inputs = []
        for index, coin in enumerate(taken):
            script_sig, witness = coin.key.unlock(tx, index, prevouts)
            inputs.append(
                replace(self._metadata(coin), final_script_sig=script_sig or None, final_script_witness=witness or None)
            )
        outputs = tuple(
            self._output_metadata(change) if out.script == change.script else PsbtOutput() for out in tx.outputs
        )
        return Psbt(tx, tuple(inputs), outputs).serialize()

    async def saw(self, tx: bytes) -> None:
        """Nothing to do: every answer is read from the chain."""

    async def close(self) -> None:
        self._closed = True

    # ------------------------------------------------------------ keys

    def _private(self, path: str) -> PrivateKey:
        """HMAC-SHA512 of the path under the seed; a counter steps over the 1 in 2^128 that is no scalar."""
        for attempt in range(256):
            message = f"pjv2 paper wallet/{self._network}/{path}/{attempt}".encode()
            secret = hmac.digest(self._seed, message, "sha512")[:32]
            if 0 < int.from_bytes(secret, "big") < _ORDER:
                return PrivateKey(secret)
        raise WrongUsage("this seed makes no keys")

    def _key(self, path: _Path) -> _Key:
        key = self._keys.get(path)
        if key is None:
            key = _Key.of(path, self._private(f"{path.chain}/{path.index}"))
            self._keys[path] = key
            self._by_script[key.script] = key
        return key

    def _peek(self, kind: PaperKind, branch: int) -> _Key:
        return self._key(_Path(kind, branch, self._memory.following.get(f"{kind}/{branch}", 0)))

    def _reveal(self, kind: PaperKind, change: bool) -> WalletAddress:
        key = self._peek(kind, int(change))
        self._memory.following[key.path.chain] = key.path.index + 1
        self._save()
        self._look_ahead()
        return WalletAddress(script_to_address(key.script, self._network), key.script, key.path.index)

    def _look_ahead(self) -> None:
        for kind in self._kinds:
            for branch in (0, 1):
                for index in range(self._memory.following.get(f"{kind}/{branch}", 0) + GAP):
                    self._key(_Path(kind, branch, index))

    # ------------------------------------------------------------ coins

    async def _scan(self) -> tuple[int, dict[Outpoint, _Held]]:
        """Height of the tip, and every coin that was ever ours. Looks again while it finds coins or addresses it did not know."""
        self._open()
        while True:
            scripts = frozenset(self._by_script)
            watched = frozenset(self._watched)
            view = await self._chain.view(frozenset(), watched, scripts, 0)
            held: dict[Outpoint, _Held] = {}
            spenders: dict[Outpoint, tuple[Txid, int | None]] = {}
            used = False
            for seen in view.txs:
                tx = self._parsed.get(seen.txid)
                if tx is None:
                    tx = self._parsed[seen.txid] = Tx.parse(seen.raw)
                for spend in tx.inputs:
                    spenders[spend.outpoint] = (seen.txid, seen.height)
                for vout, out in enumerate(tx.outputs):
                    key = self._by_script.get(out.script)
                    if key is not None:
                        outpoint = Outpoint(seen.txid, vout)
                        held[outpoint] = _Held(outpoint, out, key, tx, seen.height, None, None)
                        used |= self._mark_used(key.path)
            for outpoint, (txid, height) in spenders.items():
                if outpoint in held:
                    held[outpoint] = replace(held[outpoint], spent_by=txid, spent_height=height)
            known = held.keys() <= watched
            self._watched |= held.keys()
            if known and not used:
                return view.tip.height, held

    def _mark_used(self, path: _Path) -> bool:
        if self._memory.following.get(path.chain, 0) > path.index:
            return False
        self._memory.following[path.chain] = path.index + 1
        self._save()
        self._look_ahead()
        return True

    @staticmethod
    def _spendable(held: Iterable[_Held], tip: int) -> list[_Held]:
        return [coin for coin in held if coin.spent_by is None and coin.mature(tip)]

    def _take(
        self, coins: Sequence[Outpoint], held: Mapping[Outpoint, _Held], lock_id: bytes, until: Instant
    ) -> tuple[Outpoint, ...]:
        self._forget_expired()
        refused = tuple(
            outpoint
            for outpoint in coins
            if outpoint not in held
            or held[outpoint].spent_by is not None
            or self._memory.locks.get(outpoint, (lock_id, 0.0))[0] != lock_id
        )
        if not refused:
            for outpoint in coins:
                self._memory.locks[outpoint] = (lock_id, until)
            self._save()
        return refused

    def _forget_expired(self) -> None:
        now = self._now()
        for outpoint in [o for o, (_, until) in self._memory.locks.items() if until <= now]:
            del self._memory.locks[outpoint]

    # ------------------------------------------------------------ transactions

    def _compose(
        self, payments: Sequence[TxOut], rate: FeeRate, purse: Sequence[_Held], change: bytes, tip: int
    ) -> tuple[list[_Held], Tx]:
        """The largest coins first, until they pay; the change's place is drawn from the seed and the first coin."""
        if not payments:
            raise WrongUsage("a payment needs an output")
        wanted = sum(out.value for out in payments)
        taken: list[_Held] = []
        fee = 0
        for coin in sorted(purse, key=lambda held: (-held.txout.value, held.outpoint)):
            taken.append(coin)
            have = sum(held.txout.value for held in taken)
            inputs = tuple(TxIn(held.outpoint, *_sized(held.key)) for held in taken)
            plain = Tx(2, tip, inputs, tuple(payments))
            place = hmac.digest(self._seed, str(taken[0].outpoint).encode(), "sha256")[0] % (len(payments) + 1)
            outputs = (*payments[:place], TxOut(0, change), *payments[place:])
            rest = have - wanted - rate.fee(replace(plain, outputs=outputs).weight)
            if rest >= dust_limit(change):
                outputs = (*payments[:place], TxOut(rest, change), *payments[place:])
                return taken, replace(plain, outputs=outputs).stripped()
            fee = rate.fee(plain.weight)
            if have >= wanted + fee:
                return taken, plain.stripped()
        have = sum(held.txout.value for held in taken)
        raise WrongUsage(
            f"the wallet can spend {have} sat now, and {wanted} sat with a fee of {fee} sat are asked: "
            f"{wanted + fee - have} sat are missing"
        )

    def _derivation(self, key: _Key) -> bytes:
        return bytes.fromhex(self._fingerprint) + struct.pack("<II", key.path.branch, key.path.index)

    def _metadata(self, coin: _Held) -> PsbtInput:
        """What a wallet knows about its own coin. Coins that are not native segwit carry their whole parent (BIP174)."""
        key = coin.key
        known = PsbtInput(
            witness_utxo=None if key.path.kind == "p2pkh" else coin.txout,
            non_witness_utxo=coin.parent if key.path.kind in ("p2pkh", "p2sh-p2wpkh") else None,
        )
        if key.internal is not None:
            path = ((key.internal, b"\x00" + self._derivation(key)),)
            return replace(known, tap_internal_key=key.internal, tap_bip32_derivation=path)
        return replace(known, bip32_derivation=((key.public, self._derivation(key)),))

    def _output_metadata(self, key: _Key) -> PsbtOutput:
        if key.internal is not None:
            path = ((key.internal, b"\x00" + self._derivation(key)),)
            return PsbtOutput(tap_internal_key=key.internal, tap_bip32_derivation=path)
        return PsbtOutput(redeem_script=key.redeem, bip32_derivation=((key.public, self._derivation(key)),))

    async def _prevouts(self, psbt: Psbt, held: Mapping[Outpoint, _Held]) -> list[TxOut]:
        """The spent outputs in input order: ours by our own knowledge, the others' as the PSBT or else the chain tells them."""
        found: list[TxOut | None] = []
        for spend, known in zip(psbt.tx.inputs, psbt.inputs, strict=True):
            coin = held.get(spend.outpoint)
            parent = known.non_witness_utxo
            if coin is not None:
                found.append(coin.txout)
            elif known.witness_utxo is not None:
                found.append(known.witness_utxo)
            elif (
                parent is not None and parent.txid == spend.outpoint.txid and spend.outpoint.vout < len(parent.outputs)
            ):
                found.append(parent.outputs[spend.outpoint.vout])
            else:
                found.append(None)
        unknown = [spend.outpoint for spend, out in zip(psbt.tx.inputs, found, strict=True) if out is None]
        asked = await self._chain.prevouts(unknown) if unknown else {}
        prevouts = []
        for spend, out in zip(psbt.tx.inputs, found, strict=True):
            if out is None and spend.outpoint not in asked:
                raise WrongUsage(f"nobody knows the output {spend.outpoint}, which the PSBT spends")
            prevouts.append(out if out is not None else asked[spend.outpoint].txout)
        return prevouts

    # ------------------------------------------------------------ state

    def _open(self) -> None:
        if self._closed:
            raise NotNow("the wallet is closed")

    def _ready_to_sign(self) -> None:
        self._open()
        if self.locked_for_signing:
            raise NotNow("the wallet is locked and cannot sign: unlock it")

    def _load(self) -> _Memory:
        if self._store_path is None or not self._store_path.exists():
            return _Memory()
        try:
            data = json.loads(self._store_path.read_text(encoding="ascii"))
            version, owner = data["version"], data["fingerprint"]
            memory = _Memory(
                {str(name): int(index) for name, index in data["next"].items()},
                {
                    Outpoint.parse(outpoint): (bytes.fromhex(lock), float(until))
                    for outpoint, (lock, until) in data["locks"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError, WrongUsage) as exc:
            raise CannotRead(f"{self._store_path} is not the file of a paper wallet") from exc
        if version != 1:
            raise CannotRead(f"{self._store_path} is of version {version}, and only version 1 is known")
        if owner != self._fingerprint:
            raise WrongUsage(f"{self._store_path} belongs to wallet {owner}, not to {self._fingerprint}")
        return memory

    def _save(self) -> None:
        path = self._store_path
        if path is None:
            return
        text = json.dumps(
            {
                "version": 1,
                "fingerprint": self._fingerprint,
                "next": self._memory.following,
                "locks": {
                    str(outpoint): [lock_id.hex(), until] for outpoint, (lock_id, until) in self._memory.locks.items()
                },
            }
        )
        replace_whole(path, text.encode("ascii"))


def _push(data: bytes) -> bytes:
    return bytes([len(data)]) + data


def _sized(key: _Key) -> tuple[bytes, int, tuple[bytes, ...]]:
    script_sig, witness = key.largest()
    return script_sig, 0xFFFFFFFD, witness
