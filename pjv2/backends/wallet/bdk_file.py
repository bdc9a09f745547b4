"""The embedded wallet's file, and everything bdkpython does with it. Synchronous: `BdkWallet` runs it on one thread.

```
keys ─► WalletFile(path) ─► alone: reveal · coins · hold/drop · build · sign · request ─(server)─► alone: apply
           │ path              SQLite by the library: public descriptors, addresses, transactions, blocks (0600)
           │ path.leases       lock ids and their ends (0600)
           │ path.broadcasts   what we broadcast in the last ten minutes (0600)
           └ path.lock         held by whose turn it is
```

Any number of processes, and of objects in one process, use the file at a time, in turns. A turn (`alone`) is short: it has the
lock, reads what others wrote since its last one, does its work, and has it on disk before it ends. Whether others wrote is told
by SQLite's own change counter, which a commit moves together with what it changes: no crash comes in between. Nobody has the lock
while a server is asked; an answer that another process has overtaken meanwhile is put on top of what that one stored, or asked
for again where it would take blocks of a newer answer back.

It refuses a file that belongs to other keys or another network, that it cannot read, or whose addresses are not those of its keys,
and a wait without end. The library stores nothing by itself: each method that changes something persists it before it answers.

Our codec owns PSBTs. The library never sees a PSBT of somebody else: it gets a shadow with the same transaction, in which the
inputs to sign hold our own record of the coin, and all others a previous output and a stand-in for a final witness, so that it
cannot sign them. Only the final scripts of the named inputs are taken back, after the curve has agreed to them.

Law: what is in memory is what is on disk: a turn that fails is forgotten, and the next one reads again. The library's coins locked
by us are always among the leases on disk; a crash in between leaves a lease, never a lost lock.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pjv2.backends.files import TurnLock
from pjv2.backends.wallet.bdk_keys import KeyRing, library
from pjv2.backends.wallet.leases import Broadcasts, Leases
from pjv2.backends.wallet.signature import check_signed_input
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.ports import WalletAddress
from pjv2.psbt.coin import Coin
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxOut, script_to_address
from pjv2.units import FeeRate, Instant, Network, Outpoint, Sats, Txid

COINBASE_MATURITY = 100
MAX_OWN_CHAIN = 20
"""Unconfirmed ancestors of a coin that are followed before it counts as somebody else's (nodes relay 25)."""

PATIENCE = 30.0
"""Seconds that a turn is waited for. Turns last milliseconds; whoever has one this long was stopped in it."""

Block: TypeAlias = tuple[int, str]
"""Height and hash."""

_LARGEST_DUST: Sats = 546
_STAND_IN = (b"\x51",)
_KEPT = 600
"""Seconds for which our own broadcast is repeated while no server lists it."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A coin that was ever ours, as the library has it."""

    outpoint: Outpoint
    txout: TxOut
    branch: int
    index: int


class WalletFile:
    """An open wallet file. Raises NotNow (no turn, disk trouble), WrongUsage (other keys or network), CannotRead."""

    def __init__(self, path: Path, keys: KeyRing, *, gap: int, patience: float = PATIENCE) -> None:
        self.keys = keys
        self._path = path
        self._gap = gap
        self._patience = patience
        self._persister: Any = None
        self._wallet: Any = None
        self._bdk = library()
        self._branches = (self._bdk.KeychainKind.EXTERNAL, self._bdk.KeychainKind.INTERNAL)
        self._redeem: dict[tuple[int, int], bytes] = {}
        self._scripts: tuple[list[bytes], list[bytes]] = ([], [])
        self._lock = TurnLock(path.with_name(path.name + ".lock"))
        self._seen: tuple[int, int, int] | None = None
        with _disk(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._turn(time.monotonic(), lambda: False):
            self._persister, self._wallet = self._open()
            self._leases = Leases(path.with_name(path.name + ".leases"), keys.name)
            self._broadcasts = Broadcasts(path.with_name(path.name + ".broadcasts"), keys.name)
            self._settle()

    def close(self) -> None:
        """Let go of the file; everything is on disk already."""
        self._wallet = self._persister = None

    # ------------------------------------------------------------ turns

    @contextmanager
    def alone(self, asked: float, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """A turn: nobody else reads or writes the file meanwhile, and what others wrote before is known. Not reentrant.

        Waits, blocking this thread, until `given_up`, or for `patience` seconds since it was `asked` for (by time.monotonic()) or
        since this object's last turn: of many who wait together, the others do not wait anew. Raises NotNow; CannotRead,
        WrongUsage for what is there now.
        """
        with self._turn(asked, given_up):
            self._leases.refresh()
            if self._seen is None or self._seen != self._written():
                self._persister, self._wallet = self._open()
                self._settle()
            yield
            self._seen = self._written()

    @contextmanager
    def _turn(self, asked: float, given_up: Callable[[], bool]) -> Iterator[None]:
        until = max(asked, self._lock.let_go) + self._patience
        with contextlib.ExitStack() as stack:
            try:
                with _disk(self._path):
                    stack.enter_context(self._lock.held(until, given_up))
            except TimeoutError as exc:
                if given_up():
                    raise NotNow("the wallet is closed") from exc
                raise NotNow(
                    f"the wallet file {self._path} is held by another process for more than {self._patience:g} s: "
                    "one that was stopped in its work must go on, or end"
                ) from exc
            try:
                yield
            except BaseException:
                self._seen = None
                raise

    def _written(self) -> tuple[int, int, int] | None:
        """Which file this is, and the counter that SQLite moves with each commit. None when it does not tell: read it again then.

        Only in a turn: closing a file ends this process's locks on it, those of SQLite in another object of ours included.
        """
        with _disk(self._path):
            handle = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                head, place = os.read(handle, 28), os.fstat(handle)
            finally:
                os.close(handle)
        # File format, 1.3: byte 18 is 1 for a rollback journal; with a write-ahead log the counter may stand still.
        return (place.st_dev, place.st_ino, int.from_bytes(head[24:28], "big")) if head[18:19] == b"\x01" else None

    # ------------------------------------------------------------ the file

    def _open(self) -> tuple[Any, Any]:
        bdk, keys = self._bdk, self.keys
        network = _network(keys.network)
        with _disk(self._path), contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        # The library keeps the scripts it derived: with ten thousand addresses that is reading again in 50 ms instead of a second.
        params = bdk.LoadParams(check_network=network, check_genesis_hash=None, lookahead=self._gap, use_spk_cache=True)
        made = bdk.CreateParams(genesis_hash=None, lookahead=self._gap, use_spk_cache=True)
        try:
            persister = bdk.Persister.new_sqlite(str(self._path))
            try:
                return persister, bdk.Wallet.load_with_params(keys.external, keys.change, persister, params)
            except bdk.LoadWithPersistError.CouldNotLoad:  # nothing in it yet
                return persister, bdk.Wallet.create_with_params(keys.external, keys.change, network, persister, made)
        except bdk.LoadWithPersistError.InvalidChangeSet as exc:
            what = "for another network" if "Network mismatch" in exc.error_message else "of other keys"
            raise WrongUsage(
                f"{self._path} is a wallet {what}: choose another file, or the keys it was made with"
            ) from exc
        except (bdk.LoadWithPersistError, bdk.CreateWithPersistError, bdk.PersistenceError) as exc:
            if self._wallet is not None:  # it could be read before
                raise NotNow(f"the wallet file {self._path} cannot be read now: {exc}") from exc
            raise CannotRead(f"{self._path} cannot be read as a wallet file; it is left as it was") from exc

    def _persist(self) -> None:
        try:
            self._wallet.persist(self._persister)
        except self._bdk.PersistenceError as exc:
            raise NotNow(f"the wallet file {self._path} cannot be written now: {exc}") from exc

    def _settle(self) -> None:
        """After reading. A crash may have come between lease and lock; the lease counts."""
        for coin in self._leases.held():
            self._wallet.lock_outpoint(self._outpoint(coin))
        for branch in self._branches:
            if (last := self._wallet.derivation_index(branch)) is not None:
                self._wallet.reveal_addresses_to(branch, last)  # reveals nothing: stages the scripts just derived
        self._persist()  # nothing where there is nothing new
        self._seen = self._written()

    # ------------------------------------------------------------ addresses

    def reveal(self, *, change: bool) -> WalletAddress:
        """The next address of the branch, its index on disk."""
        branch = self._branches[change]
        index = int(self._wallet.next_derivation_index(branch))
        script = self._own_script(int(change), index)  # before the library looks at its own, which may end the process
        self._wallet.reveal_addresses_to(branch, index)
        self._persist()
        return WalletAddress(script_to_address(script, self.keys.network), script, index)

    def _script(self, branch: int, index: int) -> bytes:
        descriptor = self.keys.change if branch else self.keys.external
        return bytes(descriptor.derive_address(index, _network(self.keys.network)).script_pubkey().to_bytes())

    def _own_script(self, branch: int, index: int) -> bytes:
        """From the keys, and known to the file, whose scripts the library derives but once: only so money is found and can leave."""
        script = self._script(branch, index)
        known = self._wallet.derivation_of_spk(self._bdk.Script(script))
        if known is None or (known.keychain, known.index) != (self._branches[branch], index):
            raise CannotRead(
                f"{self._path} is damaged: what it holds as address {index} is not the one of these keys, so none was given out; "
                "move the file away, and the wallet is found again from its keys"
            )
        return script

    # ------------------------------------------------------------ coins

    def mine(self, outpoints: Sequence[Outpoint]) -> frozenset[Outpoint]:
        return frozenset(outpoint for outpoint in outpoints if self._held(outpoint) is not None)

    def coins(self, now: Instant) -> tuple[Coin, ...]:
        """Confirmed, mature, unlocked; none when there are no keys to sign for them."""
        if not self.keys.signs:
            return ()
        self._end_leases(now)
        locked = self._locked()
        coins = []
        for output in self._wallet.list_unspent():
            held, height = self._listed(output), _height(output.chain_position)
            if height is None or held.outpoint in locked or not self._mature(held, height):
                continue
            legacy = held.txout.kind is ScriptKind.P2PKH
            coins.append(
                Coin.of(
                    held.outpoint,
                    held.txout,
                    height=height,
                    redeem_script=self._redeem_script(held),
                    non_witness=bytes(self._parent(held).serialize()) if legacy else None,
                )
            )
        return tuple(coins)

    def balance(self) -> Sats:
        return int(self._wallet.balance().confirmed.to_sat())

    def _held(self, outpoint: Outpoint) -> _Held | None:
        """What we know about a coin of ours, spent ones too; None for everything else."""
        try:
            place = self._outpoint(outpoint)
            unspent = self._wallet.get_utxo(place)
        except (self._bdk.HashParseError, ValueError):  # no txid, or an index beyond 32 bits
            return None
        if unspent is not None:
            return self._listed(unspent)
        known = self._wallet.get_tx(place.txid)
        outputs = known.transaction.output() if known is not None else []
        if outpoint.vout >= len(outputs):
            return None
        script = outputs[outpoint.vout].script_pubkey
        ours = self._wallet.derivation_of_spk(script)
        if ours is None:
            return None
        txout = TxOut(outputs[outpoint.vout].value.to_sat(), bytes(script.to_bytes()))
        return _Held(outpoint, txout, self._branches.index(ours.keychain), ours.index)

    def _listed(self, output: Any) -> _Held:
        txout = TxOut(output.txout.value.to_sat(), bytes(output.txout.script_pubkey.to_bytes()))
        return _Held(_outpoint(output), txout, self._branches.index(output.keychain), output.derivation_index)

    def _parent(self, held: _Held) -> Any:
        return self._wallet.get_tx(self._bdk.Txid.from_string(held.outpoint.txid)).transaction

    def _unspent(self, outpoint: Outpoint) -> bool:
        return self._wallet.get_utxo(self._outpoint(outpoint)) is not None

    def _mature(self, held: _Held, height: int) -> bool:
        return self.tip() + 1 - height >= COINBASE_MATURITY or not self._parent(held).is_coinbase()

    def _redeem_script(self, held: _Held) -> bytes | None:
        inner = self.keys.redeem[held.branch]
        if inner is None:
            return None
        place = (held.branch, held.index)
        if place not in self._redeem:
            address = inner.derive_address(held.index, _network(self.keys.network))
            self._redeem[place] = bytes(address.script_pubkey().to_bytes())
        return self._redeem[place]

    def _outpoint(self, outpoint: Outpoint) -> Any:
        return self._bdk.OutPoint(txid=self._bdk.Txid.from_string(outpoint.txid), vout=outpoint.vout)

    # ------------------------------------------------------------ locks

    def hold(self, coins: Sequence[Outpoint], lock_id: bytes, until: Instant, now: Instant) -> tuple[Outpoint, ...]:
        """Lock or renew all of them, or answer those that stand in the way and lock none."""
        self._end_leases(now)
        locked = self._locked()
        refused = tuple(
            coin
            for coin in coins
            if (coin in locked and self._leases.owner(coin) != lock_id)
            or self._held(coin) is None
            or not self._unspent(coin)
        )
        if not refused:
            self._leases.add(coins, lock_id, until)
            for coin in coins:
                self._wallet.lock_outpoint(self._outpoint(coin))
            self._persist()
        return refused

    def drop(self, coins: Sequence[Outpoint], lock_id: bytes) -> None:
        self._unlock(frozenset(coin for coin in coins if self._leases.owner(coin) == lock_id))

    def _end_leases(self, now: Instant) -> None:
        self._unlock(self._leases.expired(now))

    def _unlock(self, coins: frozenset[Outpoint]) -> None:
        if coins:
            for coin in coins:
                self._wallet.unlock_outpoint(self._outpoint(coin))
            self._persist()
            self._leases.remove(coins)

    def _locked(self) -> frozenset[Outpoint]:
        """Leased coins, and those that somebody locked in the file without a lease."""
        frozen = (Outpoint(str(coin.txid), coin.vout) for coin in self._wallet.list_locked_outpoints())
        return self._leases.held().union(frozen)

    def locked(self, now: Instant) -> frozenset[Outpoint]:
        self._end_leases(now)
        return self._locked()

    def revealed(self) -> tuple[int, int]:
        """How many addresses of either branch were given out."""
        last = [self._wallet.derivation_index(branch) for branch in self._branches]
        external, change = (0 if index is None else index + 1 for index in last)
        return external, change

    def scripts(self, revealed: tuple[int, int]) -> frozenset[bytes]:
        """The first so many scripts of either branch. Needs no turn, and would make it a long one."""
        found: set[bytes] = set()
        for branch, (known, count) in enumerate(zip(self._scripts, revealed, strict=True)):
            known += [self._script(branch, index) for index in range(len(known), count)]
            found.update(known[:count])
        return frozenset(found)

    # ------------------------------------------------------------ paying

    def build(
        self,
        payments: Sequence[TxOut],
        rate: FeeRate,
        lock_id: bytes,
        until: Instant,
        now: Instant,
        avoid: frozenset[Outpoint],
    ) -> bytes:
        """A signed payment as PSBT with metadata, its inputs locked. Our own unconfirmed change is used only when the rest is short."""
        if not self.keys.signs:
            raise WrongUsage("this wallet holds public keys only: it can watch, not pay")
        if not payments:
            raise WrongUsage("a payment needs an output")
        self._end_leases(now)
        confirmed, own = self._purse(avoid)
        psbt = self._compose(payments, rate, confirmed, last=not own)
        if psbt is None:
            psbt = self._compose(payments, rate, {**confirmed, **own}, last=True)
        if psbt is None:
            raise NotNow("the wallet's library built no payment: try again")
        inputs = [spend.outpoint for spend in psbt.tx.inputs]
        if refused := self.hold(inputs, lock_id, until, now):
            raise NotNow(f"{refused[0]} was locked meanwhile: try again")
        signed = self.sign(psbt, inputs, {})
        # A signature may come out a few units lighter than planned; a rest below dust joins the fee.
        if not 0 <= signed.fee - rate.fee(signed.extract().weight) <= rate.fee(8 * len(inputs) + 8) + _LARGEST_DUST:
            raise NotNow("the wallet's library chose another fee than the one asked for: nothing was paid")
        return signed.serialize()

    def _purse(self, avoid: frozenset[Outpoint]) -> tuple[dict[Outpoint, Sats], dict[Outpoint, Sats]]:
        """What may be spent: confirmed coins, and unconfirmed ones of transactions that are ours alone."""
        confirmed: dict[Outpoint, Sats] = {}
        own: dict[Outpoint, Sats] = {}
        taken = self._locked() | avoid
        for output in self._wallet.list_unspent():
            held, height = self._listed(output), _height(output.chain_position)
            if held.outpoint in taken:
                continue
            if height is None:
                if self._is_our_own(held.outpoint.txid, set()):
                    own[held.outpoint] = held.txout.value
            elif self._mature(held, height):
                confirmed[held.outpoint] = held.txout.value
        return confirmed, own

    def _is_our_own(self, txid: Txid, seen: set[Txid]) -> bool:
        """Confirmed, or made of our coins alone all the way down: nobody else can replace it."""
        known = self._wallet.get_tx(self._bdk.Txid.from_string(txid))
        if known is None or (txid not in seen and len(seen) >= MAX_OWN_CHAIN):
            return False
        if txid in seen or _height(known.chain_position) is not None:
            return True
        seen.add(txid)
        parents = [Outpoint(str(s.previous_output.txid), s.previous_output.vout) for s in known.transaction.input()]
        return all(self._held(parent) is not None and self._is_our_own(parent.txid, seen) for parent in parents)

    def _compose(
        self, payments: Sequence[TxOut], rate: FeeRate, purse: Mapping[Outpoint, Sats], *, last: bool
    ) -> Psbt | None:
        """Let the library select and build. None when the purse is short and it is not the last one; WrongUsage when it is."""
        bdk = self._bdk
        # Told to the library as where the rest goes: by itself it would use up a change address for every attempt.
        index = self._wallet.next_derivation_index(self._branches[1])
        ours = self._own_script(1, index)
        change = self._bdk.Script(ours)
        others = [output.outpoint for output in self._wallet.list_unspent() if _outpoint(output) not in purse]
        builder = (
            bdk.TxBuilder()
            .set_recipients(
                [
                    bdk.ScriptAmount(script=bdk.Script(out.script), amount=bdk.Amount.from_sat(out.value))
                    for out in payments
                ]
            )
            .fee_rate(bdk.FeeRate.from_sat_per_kwu(rate.sat_per_kwu))
            .unspendable(others)
            .drain_to(change)
        )
        try:
            psbt = Psbt.from_base64(builder.finish(self._wallet).serialize())
        except (bdk.CreateTxError.CoinSelection, bdk.CreateTxError.InsufficientFunds) as exc:
            if not last:
                return None
            raise WrongUsage(_too_little(sum(purse.values()), sum(out.value for out in payments), exc)) from exc
        except bdk.CreateTxError.OutputBelowDustLimit as exc:
            raise WrongUsage("an output of this payment is so small that no node relays it") from exc
        except bdk.CreateTxError as exc:
            raise WrongUsage(f"the wallet cannot build this payment ({type(exc).__name__})") from exc
        rest = [out for out in psbt.tx.outputs if out not in payments]
        if (
            any(spend.outpoint not in purse for spend in psbt.tx.inputs)
            or len(psbt.tx.outputs) != len(payments) + len(rest)
            or len(rest) > 1
            or any(out.script != ours for out in rest)
        ):
            raise NotNow("the wallet's library built another payment than the one asked for: nothing was signed")
        if rest:
            self._wallet.reveal_addresses_to(self._branches[1], index)
            self._persist()
        return psbt

    # ------------------------------------------------------------ signing

    def unknown_prevouts(self, psbt: Psbt, ours: Sequence[Outpoint]) -> tuple[Outpoint, ...]:
        """Previous outputs that a taproot signature of `ours` needs, and that neither we nor the PSBT know."""
        held = self._named(psbt, ours)
        if not any(coin.txout.kind is ScriptKind.P2TR for coin in held.values()):
            return ()
        return tuple(
            spend.outpoint for spend, told in zip(psbt.tx.inputs, self._prevouts(psbt, {}), strict=True) if told is None
        )

    def sign(self, psbt: Psbt, ours: Sequence[Outpoint], found: Mapping[Outpoint, TxOut]) -> Psbt:
        """The PSBT with exactly these inputs final. `found` holds previous outputs from elsewhere."""
        if not self.keys.signs:
            raise NotNow("this wallet holds public keys only and cannot sign: open it with its private keys")
        held = self._named(psbt, ours)
        prevouts = self._prevouts(psbt, found)
        shadow = []
        for spend, prevout in zip(psbt.tx.inputs, prevouts, strict=True):
            coin = held.get(spend.outpoint) or self._held(spend.outpoint)
            known = PsbtInput(witness_utxo=prevout) if coin is None else self._record(coin)
            shadow.append(known if spend.outpoint in held else replace(known, final_script_witness=_STAND_IN))
        signed = self._sign(Psbt(psbt.tx, tuple(shadow), tuple(PsbtOutput() for _ in psbt.outputs)))
        if signed.tx != psbt.tx:
            raise NotNow("the wallet's library changed the transaction: nothing was signed")
        maps = list(psbt.inputs)
        for index, spend in enumerate(psbt.tx.inputs):
            if spend.outpoint in held:
                maps[index] = replace(
                    maps[index],
                    final_script_sig=signed.inputs[index].final_script_sig or None,
                    final_script_witness=signed.inputs[index].final_script_witness or None,
                    partial_sigs=(),
                    tap_key_sig=None,
                )
        done = replace(psbt, inputs=tuple(maps))
        tx = done.extract()
        for index, spend in enumerate(tx.inputs):
            if spend.outpoint in held:
                check_signed_input(tx, index, prevouts)
        return done

    def _sign(self, shadow: Psbt) -> Psbt:
        bdk = self._bdk
        options = bdk.SignOptions(
            trust_witness_utxo=True,  # they are our own records
            assume_height=None,
            allow_all_sighashes=False,
            try_finalize=True,
            sign_with_tap_internal_key=True,
            allow_grinding=True,
        )
        try:
            taken = bdk.Psbt(shadow.to_base64())
            self._wallet.sign(taken, options)
            return Psbt.from_base64(taken.serialize())
        except (bdk.SignerError, bdk.PsbtParseError) as exc:
            raise NotNow(f"the wallet's library did not sign ({type(exc).__name__})") from exc

    def _named(self, psbt: Psbt, ours: Sequence[Outpoint]) -> dict[Outpoint, _Held]:
        places = {spend.outpoint: known for spend, known in zip(psbt.tx.inputs, psbt.inputs, strict=True)}
        held = {}
        for outpoint in ours:
            coin = self._held(outpoint)
            if coin is None:
                raise WrongUsage(f"{outpoint} is not a coin of this wallet: it will not be signed")
            if outpoint not in places:
                raise WrongUsage(f"{outpoint} is not spent by the PSBT")
            if places[outpoint].sighash_type not in (None, 0, 1):
                raise WrongUsage(f"{outpoint} asks for a signature that is neither ALL nor DEFAULT")
            held[outpoint] = coin
        return held

    def _record(self, coin: _Held) -> PsbtInput:
        """Our own record of a coin, in the form that its kind of script is signed from."""
        if coin.txout.kind is ScriptKind.P2PKH:
            return PsbtInput(non_witness_utxo=Tx.parse(bytes(self._parent(coin).serialize())))
        return PsbtInput(witness_utxo=coin.txout)

    def _prevouts(self, psbt: Psbt, found: Mapping[Outpoint, TxOut]) -> list[TxOut | None]:
        """The spent outputs in input order: ours by our records, the others' as the PSBT tells, or as found elsewhere."""
        prevouts: list[TxOut | None] = []
        for spend, told in zip(psbt.tx.inputs, psbt.inputs, strict=True):
            coin = self._held(spend.outpoint)
            parent, vout = told.non_witness_utxo, spend.outpoint.vout
            if coin is not None:
                prevouts.append(coin.txout)
            elif parent is not None and parent.txid == spend.outpoint.txid and vout < len(parent.outputs):
                prevouts.append(parent.outputs[vout])
            else:
                prevouts.append(told.witness_utxo or found.get(spend.outpoint))
        return prevouts

    # ------------------------------------------------------------ the chain

    def tip(self) -> int:
        return self._tip()[0]

    def _tip(self) -> Block:
        return _block(self._wallet.latest_checkpoint())

    def never_synced(self) -> bool:
        return self.tip() == 0

    def request(self, *, everything: bool) -> tuple[bool, Any, Block]:
        """What to ask a server: every script (True) when told so or when none was ever asked, else the revealed ones; and the tip."""
        if everything or self.never_synced():
            return True, self._wallet.start_full_scan().build(), self._tip()
        return False, self._wallet.start_sync_with_revealed_spks().build(), self._tip()

    def apply(self, update: Any, asked_at: Block, now: Instant) -> bool:
        """Take a server's update in, on disk. `asked_at` is the tip of its request, `now` is real time in seconds.

        False: another process told of blocks meanwhile that this older answer does not know. Nothing of it is kept; ask again.
        """
        before = self._tip()
        overtaken = before != asked_at
        try:
            self._wallet.apply_update(update)
        except self._bdk.CannotConnectError as exc:
            if overtaken:
                return False
            raise NotNow(
                "the wallet's server tells of blocks that do not join those it told before: try again"
            ) from exc
        if overtaken and before not in map(_block, self._wallet.checkpoints()):
            self._persister, self._wallet = self._open()  # as it was before this update
            self._settle()
            return False
        self._repeat_broadcasts(now)
        self._persist()
        return True

    def saw(self, raw: bytes, now: Instant) -> None:
        """Count a transaction of our own broadcast before a server lists it. `now` is real time in seconds."""
        tx = Tx.parse(raw)
        spent = {spend.outpoint for spend in tx.inputs}
        self._broadcasts.refresh()
        kept = {
            txid: (older, since)
            for txid, (older, since) in self._broadcasts.known().items()
            if spent.isdisjoint(spend.outpoint for spend in Tx.parse(older).inputs)
        }
        self._broadcasts.keep({**kept, tx.txid: (raw, now)})
        self._put(raw, now)
        self._persist()

    def _put(self, raw: bytes, now: Instant) -> None:
        # A second ahead: an eviction by a sync within this very second would win otherwise.
        entry = self._bdk.UnconfirmedTx(tx=self._bdk.Transaction(raw), last_seen=int(now) + 1)
        self._wallet.apply_unconfirmed_txs([entry])

    def _repeat_broadcasts(self, now: Instant) -> None:
        """A sync evicts what its server does not list yet: put it back for ten minutes, unless something else spends its inputs."""
        self._broadcasts.refresh()
        kept = self._broadcasts.known()
        if not kept:
            return
        spent: dict[Outpoint, Txid] = {}
        for known in self._wallet.transactions():
            for spend in known.transaction.input():
                at = spend.previous_output
                spent[Outpoint(str(at.txid), at.vout)] = str(known.transaction.compute_txid())
        for txid, (raw, since) in list(kept.items()):
            rivals = {spent.get(spend.outpoint, txid) for spend in Tx.parse(raw).inputs} - {txid}
            listed = self._wallet.get_tx(self._bdk.Txid.from_string(txid)) is not None
            if rivals or now - since > _KEPT:
                del kept[txid]
            elif not listed:
                self._put(raw, now)
        self._broadcasts.keep(kept)


# ---------------------------------------------------------------- small things


def _network(network: Network) -> Any:
    return getattr(library().Network, network.name)


def _outpoint(output: Any) -> Outpoint:
    return Outpoint(str(output.outpoint.txid), output.outpoint.vout)


def _block(at: Any) -> Block:
    return int(at.height), str(at.hash)


def _height(position: Any) -> int | None:
    return int(position.confirmation_block_time.block_id.height) if position.is_CONFIRMED() else None


def _too_little(have: Sats, wanted: Sats, error: Any) -> str:
    return (
        f"the wallet can spend {have} sat now, and {wanted} sat plus the fee are asked: "
        f"at least {max(wanted - have, 1)} sat are missing"
    )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except OSError as exc:
        raise NotNow(f"the wallet file {path} cannot be opened now: {exc.strerror or type(exc).__name__}") from exc
