"""The wallet of a Bitcoin Core node, as `ports.Wallet`: its keys and coins stay with the node, the ends of locks with us.

It works with descriptor wallets (bech32, bech32m, p2sh-segwit and legacy addresses), encrypted ones while somebody has unlocked
them, and watch-only ones as far as they can. A wallet that is not loaded is loaded. It refuses another network, a wallet that is
not there, legacy (BDB) wallets, and to sign where there are no keys.

```
lock    ─► lease on disk ─► lockunspent (persistent)         unlock ─► lockunspent ─► lease gone
start   ─► listlockunspent against the leases: ended ones are unlocked, lost ones locked again, others' locks left alone
sign    ─► a shadow PSBT: ours by the wallet's records, every other input a stand-in ─► walletprocesspsbt ─► our final scripts
fund    ─► walletcreatefundedpsbt ─► lock ─► walletprocesspsbt
```

bitcoind's locks have neither owner nor end: leases say both. Any number of processes share them, in turns.

Law: only a coin that has a lease of ours is ever unlocked; a crash leaves a lease, never a lost lock. A signature is believed when
the curve agrees.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pjv2.backends.bitcoind_rpc import (
    ALREADY_LOADED,
    INSUFFICIENT_FUNDS,
    KEYPOOL_RAN_OUT,
    LOAD_TIMEOUT,
    NO_METHOD,
    NOT_FOUND,
    UNLOCK_NEEDED,
    WALLET_ERROR,
    WALLET_NOT_FOUND,
    BitcoindRpc,
    Call,
    Refused,
    flag,
    in_btc,
    items,
    places_of,
    sats_of,
    text,
    txout_of,
    whole,
)
from pjv2.backends.files import TurnLock
from pjv2.backends.wallet.bitcoind_shapes import (
    AddressType,
    address_index,
    all_listed,
    has_keys,
    identity_of,
    is_mine,
    places_in,
    script_of,
    signs_now,
    tx_of,
    unspent_of,
    wallet_block,
)
from pjv2.backends.wallet.leases import Leases
from pjv2.backends.wallet.signature import check_signed_input
from pjv2.errors import NotNow, PayjoinError, PeerMistake, WrongUsage
from pjv2.ports import WalletAddress
from pjv2.psbt.coin import Coin
from pjv2.psbt.tx import (
    Psbt,
    PsbtInput,
    PsbtOutput,
    ScriptKind,
    Tx,
    TxOut,
    script_to_address,
)
from pjv2.units import FeeRate, Instant, Network, Outpoint, Sats, Txid

PATIENCE = 30.0
"""Seconds that another process' turn at the leases is waited for."""

_AVOIDED: Instant = 120.0
"""For how long coins to avoid are leased while a payment is built; a crash in between ends by itself."""

_LARGEST_REST: Sats = 5_000
"""What bitcoind may give to the fee instead of making change of it."""

COINBASE_MATURITY = 100
_IMMATURE = {"include_unsafe": True, "query_options": {"include_immature_coinbase": True}}
"""bitcoind's wallet waits one block longer than the network does."""

_REMEMBERED = 10_000
_REPLACEABLE = 0xFFFFFFFD
_STAND_IN = (b"\x51",)


@dataclass(frozen=True, slots=True)
class _Held:
    """A coin that was ever ours, as the wallet has it."""

    txout: TxOut
    parent: Tx


class BitcoindWallet:
    """The wallet that `rpc`'s URL names. Leases are kept in `home`. No question is asked before the first use.

    `address_type` None: native segwit where the wallet has it. `now` dates leases. Every method raises NotNow while the node is
    away, starts, or has no time; WrongUsage for another network, a missing or legacy wallet; CannotRead.
    """

    def __init__(
        self,
        rpc: BitcoindRpc,
        home: Path,
        *,
        address_type: AddressType | None = None,
        now: Callable[[], Instant] = time.time,
        patience: float = PATIENCE,
    ) -> None:
        self._rpc = rpc
        self._home = home
        self._wanted_type = address_type
        self._type: AddressType = address_type or "bech32"
        self._now = now
        self._patience = patience
        self._name = ""
        self._signs = False
        self._known = -1
        self._reconciled = -1
        self._leases: Leases | None = None
        self._turns: TurnLock | None = None
        self._turn = asyncio.Lock()
        self._held: OrderedDict[Outpoint, _Held] = OrderedDict()

    def __repr__(self) -> str:
        return f"BitcoindWallet({self._name or 'not asked yet'}, {self._rpc.network}, {self._rpc.name})"

    # ------------------------------------------------------------ ports.Wallet

    async def fingerprint(self) -> str:
        """16 hex characters over network and the wallet's oldest public descriptor: the same after a restore from its backup."""
        await self._ready()
        return self._name

    async def network(self) -> Network:
        await self._ready()
        return self._rpc.network

    async def new_address(self, *, change: bool = False) -> WalletAddress:
        """The next address of the wallet's type, never given out before."""
        await self._ready()
        method = "getrawchangeaddress" if change else "getnewaddress"
        made = await self._do(Call(method, (self._type,) if change else ("", self._type)))
        if isinstance(made, Refused) and made.code == KEYPOOL_RAN_OUT:
            raise NotNow(
                f"{self._whose} has no fresh address: unlock it with walletpassphrase once, so that it makes new ones"
            )
        address = self._rpc.read(method, text, self._rpc.told(method, made))
        script = self._rpc.read(method, script_of, address, self._rpc.network)
        (info,) = await self._told(Call("getaddressinfo", (address,)))
        index = self._rpc.read("getaddressinfo", address_index, info)
        return WalletAddress(address, script, index)

    async def mine(self, outpoints: Sequence[Outpoint]) -> frozenset[Outpoint]:
        """Which of these are ours: locked, unconfirmed and spent ones too. One round trip, two where one may be."""
        await self._ready()
        return frozenset(await self._find(outpoints))

    async def coins(self) -> tuple[Coin, ...]:
        """Confirmed, mature, unlocked single-key coins; none without keys to sign for them."""
        await self._ready()
        async with self._alone() as leases:
            await self._end(leases)
            leased = leases.held()
        if not self._signs:
            return ()
        height, listed = await self._unspent()
        found = []
        for one in listed:
            told = self._rpc.read("listunspent", unspent_of, one)
            if told is not None and told.outpoint not in leased:
                found.append(told)
        legacy = [one for one in found if one.txout.kind is ScriptKind.P2PKH]
        parents = await self._find([one.outpoint for one in legacy])
        return tuple(
            Coin.of(
                one.outpoint,
                one.txout,
                height=height + 1 - one.depth,
                redeem_script=one.redeem_script,
                non_witness=parents[one.outpoint].parent.raw if one in legacy else None,
            )
            for one in found
            if one not in legacy or one.outpoint in parents
        )

    async def balance(self) -> Sats:
        """Everything confirmed, mature and unspent, locked coins included."""
        await self._ready()
        (found,) = await self._told(Call("getbalance", ("*", 1)))
        return self._rpc.read("getbalance", sats_of, found)

    async def lock(self, coins: Sequence[Outpoint], lock_id: bytes, until: Instant) -> tuple[Outpoint, ...]:
        """All or nothing: the coins that are not ours, spent, or locked otherwise are answered, and none is locked then."""
        ours = await self.mine(coins)
        async with self._alone() as leases:
            await self._end(leases)
            return await self._hold(leases, coins, lock_id, until, ours)

    async def unlock(self, coins: Sequence[Outpoint], lock_id: bytes) -> None:
        """Coins that are locked under another id, or by somebody else, are left as they are."""
        await self._ready()
        async with self._alone() as leases:
            await self._let_go(leases, frozenset(coin for coin in coins if leases.owner(coin) == lock_id))

    async def can_sign(self) -> bool:
        """False while the wallet is locked, unreachable, or has no keys."""
        try:
            await self._ready()
            (info,) = await self._told(Call("getwalletinfo"))
        except NotNow:
            return False
        return self._rpc.read("getwalletinfo", signs_now, info, time.time())

    async def sign(self, psbt: bytes, ours: Sequence[Outpoint]) -> bytes:
        """The PSBT with exactly these inputs final and every other map as it was.

        Raises NotNow (locked, or a signature that does not hold), WrongUsage (watch-only, an input that is not ours, a foreign
        sighash type).
        """
        await self._ready()
        self._needs_keys("sign")
        try:
            parsed = Psbt.parse(psbt)
        except PeerMistake as exc:
            raise WrongUsage(f"the wallet was given no PSBT to sign: {exc}") from exc
        held = await self._named(parsed, ours)
        return (await self._sign(parsed, held)).serialize()

    async def fund(
        self,
        payments: Sequence[TxOut],
        rate: FeeRate,
        lock_id: bytes,
        until: Instant,
        *,
        avoid: frozenset[Outpoint] = frozenset(),
    ) -> bytes:
        """A signed version 2 transaction to `payments` as PSBT with metadata, its inputs locked.

        bitcoind selects: coins of others' unconfirmed transactions are never used, ones of our own only when the rest is short.
        A rest that is too small for change joins the fee. Raises WrongUsage (too little, dust, watch-only), NotNow.
        """
        await self._ready()
        self._needs_keys("pay")
        if not payments:
            raise WrongUsage("a payment needs an output")
        (info,) = await self._told(Call("getwalletinfo"))
        if not self._rpc.read("getwalletinfo", signs_now, info, time.time()):
            raise self._rpc.refusal("walletprocesspsbt", Refused(UNLOCK_NEEDED, ""))
        height = self._rpc.read("getwalletinfo", wallet_block, info)[0]
        async with self._alone() as leases:
            await self._end(leases)
            async with self._left_out(leases, avoid):
                built, change = await self._compose(payments, rate, height)
                inputs = [spend.outpoint for spend in built.tx.inputs]
                found = await self._find(inputs)
                await self._check_payment(built, payments, change, found, avoid)
                if refused := await self._hold(leases, inputs, lock_id, until, frozenset(found)):
                    raise NotNow(f"{refused[0]} was locked or spent meanwhile: try again")
            try:
                done = await self._signed(built, found)
                weight = done.extract().weight
                if not 0 <= done.fee - rate.fee(weight) <= rate.fee(8 * len(inputs) + 8) + _LARGEST_REST:
                    raise NotNow(f"{self._whose} chose another fee than the one asked for: nothing was paid")
            except PayjoinError:
                await self._let_go(leases, frozenset(inputs))
                raise
        return done.serialize()

    async def saw(self, tx: bytes) -> None:
        """Hand a transaction of ours to the node where it does not have it yet; it knows about what it broadcast itself."""
        try:
            parsed = Tx.parse(tx)
        except PeerMistake as exc:
            raise WrongUsage(f"the wallet was told of no transaction: {exc}") from exc
        await self._ready()
        (there,) = await self._ask(Call("getmempoolentry", (parsed.txid,)))
        if isinstance(there, Refused):
            # What this node refuses it may have in a block, or hear of from the network: nothing depends on it.
            await self._do(Call("sendrawtransaction", (tx.hex(), 0, "21000000")))

    async def close(self) -> None:
        await self._rpc.close()

    # ------------------------------------------------------------ beyond the port

    async def locked(self) -> frozenset[Outpoint]:
        """Every coin that is locked at the node, by whomever."""
        await self._ready()
        return await self._locked()

    async def scripts(self) -> frozenset[bytes]:
        """Every script that this wallet's descriptors have handed out."""
        await self._ready()
        (listed,) = await self._told(Call("listdescriptors"))
        used = self._rpc.read(
            "listdescriptors",
            lambda: [
                (text(one["desc"]), whole(one["next_index"]))
                for one in items(listed["descriptors"])
                if one.get("next_index")
            ],
        )
        made = await self._told(*(Call("deriveaddresses", (desc, [0, count - 1])) for desc, count in used))
        network = self._rpc.network
        return self._rpc.read(
            "deriveaddresses",
            lambda: frozenset(script_of(text(address), network) for each in made for address in items(each)),
        )

    # ------------------------------------------------------------ the node

    @property
    def _whose(self) -> str:
        return f"the wallet {self._rpc.wallet or ''} of {self._rpc.name}".replace("  ", " ")

    async def _ready(self) -> None:
        """Once per start of the node: who it is, and its locks against our leases."""
        if self._known != self._rpc.epoch or not self._name:
            await self._identify()
        known = self._known
        if self._reconciled != known:
            async with self._alone() as leases:
                if self._reconciled != known:
                    await self._reconcile(leases)
                    self._reconciled = known

    async def _identify(self) -> None:
        """The network, the wallet, its name and its keys. Raises WrongUsage when it is not the one that it was."""
        await self._rpc.greet()
        epoch = self._rpc.epoch
        info, listed = await self._opened()
        if not self._rpc.read("getwalletinfo", lambda: flag(info["descriptors"])):
            raise WrongUsage(f"{self._whose} is a legacy one: run bitcoin-cli migratewallet")
        self._refuse_rescan(info)
        name, types = self._rpc.read("listdescriptors", identity_of, listed, self._rpc.network)
        if self._name not in ("", name):
            raise WrongUsage(f"{self._whose} is another one than before: {name}, not {self._name}")
        self._signs = self._rpc.read("getwalletinfo", has_keys, info)
        self._type = self._choose(types)
        self._open_leases(name)
        self._name, self._known = name, epoch

    async def _opened(self) -> tuple[Any, Any]:
        """Facts about the wallet, which is loaded where it was not."""
        for attempt in range(2):
            info, listed = await self._rpc.ask(Call("getwalletinfo"), Call("listdescriptors"))
            if isinstance(info, Refused):
                if info.code == WALLET_NOT_FOUND and self._rpc.wallet is not None and not attempt:
                    await self._load(self._rpc.wallet)
                    continue
                raise self._rpc.refusal("getwalletinfo", info)
            if isinstance(listed, Refused):
                if listed.code == WALLET_ERROR:  # a legacy wallet has no descriptors to list
                    return info, {"descriptors": []}
                raise self._rpc.refusal("listdescriptors", listed)
            return info, listed
        raise NotNow(f"{self._whose} is unloaded by somebody as soon as it is loaded", after=5.0)

    async def _load(self, wallet: str) -> None:
        answer = await self._rpc.do(Call("loadwallet", (wallet,)), within=LOAD_TIMEOUT)
        if not isinstance(answer, Refused) or answer.code == ALREADY_LOADED:
            return
        if answer.code == NO_METHOD:
            raise self._rpc.refusal("loadwallet", answer)
        if answer.code == WALLET_NOT_FOUND:
            raise WrongUsage(
                f"{self._rpc.name} has no wallet {wallet}: make it with bitcoin-cli createwallet, or correct the URL"
            )
        raise NotNow(f"{self._whose} cannot be loaded now: {answer.message}")

    def _refuse_rescan(self, info: Any) -> None:
        scanning = info.get("scanning")
        if isinstance(scanning, dict):
            done = f"{float(scanning.get('progress') or 0):.0%}"
            raise NotNow(
                f"{self._whose} looks through old blocks ({done}): its coins are not all known yet", after=30.0
            )

    def _choose(self, types: Sequence[AddressType]) -> AddressType:
        """The type of addresses: the one asked for, else the first of the usual order that the wallet makes."""
        if self._wanted_type is not None:
            if self._wanted_type not in types:
                raise WrongUsage(f"{self._whose} makes no {self._wanted_type} addresses")
            return self._wanted_type
        if not types:
            raise WrongUsage(f"{self._whose} makes no addresses: it has no active descriptor of a single key")
        return types[0]

    def _open_leases(self, name: str) -> None:
        if self._leases is not None:
            return
        path = self._home / f"wallet-{self._rpc.network}-{name}.leases"
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise NotNow(f"locks cannot be kept in {self._home}: {exc.strerror or type(exc).__name__}") from exc
        self._leases = Leases(path, name)
        self._turns = TurnLock(path.with_name(path.name + ".lock"))

    async def _ask(self, *calls: Call) -> list[Any]:
        """As `rpc.ask`; a wallet that somebody unloaded is loaded again, and after a restart it is looked who answered."""
        answers = await self._rpc.ask(*calls)
        if any(isinstance(one, Refused) and one.code == WALLET_NOT_FOUND for one in answers):
            await self._reload()
            answers = await self._rpc.ask(*calls)
        if self._known != self._rpc.epoch:
            await self._identify()
        return answers

    async def _told(self, *calls: Call) -> list[Any]:
        answers = await self._ask(*calls)
        return [self._rpc.told(call.method, answer) for call, answer in zip(calls, answers, strict=True)]

    async def _do(self, call: Call) -> Any:
        answer = await self._rpc.do(call)
        if isinstance(answer, Refused) and answer.code == WALLET_NOT_FOUND:
            await self._reload()
            answer = await self._rpc.do(call)
        if self._known != self._rpc.epoch:
            await self._identify()
        return answer

    async def _reload(self) -> None:
        if self._rpc.wallet is not None:
            await self._load(self._rpc.wallet)

    def _needs_keys(self, what: str) -> None:
        if not self._signs:
            raise WrongUsage(f"{self._whose} holds no private keys: it can watch, not {what}")

    # ------------------------------------------------------------ coins

    async def _find(self, outpoints: Sequence[Outpoint]) -> dict[Outpoint, _Held]:
        """The wallet's own record of each of these that is or was a coin of ours."""
        asked = list(dict.fromkeys(outpoints))
        unknown = [outpoint for outpoint in asked if outpoint not in self._held]
        if unknown:
            await self._learn(unknown)
        found = {outpoint: self._held[outpoint] for outpoint in asked if outpoint in self._held}
        for outpoint in found:
            self._held.move_to_end(outpoint)
        while len(self._held) > _REMEMBERED:
            self._held.popitem(last=False)
        return found

    async def _learn(self, outpoints: Sequence[Outpoint]) -> None:
        txids = sorted({outpoint.txid for outpoint in outpoints})
        answers = await self._ask(*(Call("gettransaction", (txid,)) for txid in txids))
        parents: dict[Txid, Tx] = {}
        for txid, answer in zip(txids, answers, strict=True):
            # NOT_FOUND: none of the wallet's; INVALID_PARAMETER does not come, ids are checked where they are made.
            if isinstance(answer, Refused) and answer.code == NOT_FOUND:
                continue
            told = self._rpc.told("gettransaction", answer)
            parents[txid] = self._rpc.read("gettransaction", tx_of, told, txid)
        places: list[tuple[Outpoint, str]] = []
        for outpoint in outpoints:
            parent = parents.get(outpoint.txid)
            if parent is not None and outpoint.vout < len(parent.outputs):
                with contextlib.suppress(WrongUsage):  # a script without an address is no single key's
                    script = parent.outputs[outpoint.vout].script
                    places.append((outpoint, script_to_address(script, self._rpc.network)))
        infos = await self._told(*(Call("getaddressinfo", (address,)) for _, address in places))
        for (outpoint, _), info in zip(places, infos, strict=True):
            if self._rpc.read("getaddressinfo", is_mine, info):
                parent = parents[outpoint.txid]
                self._held[outpoint] = _Held(parent.outputs[outpoint.vout], parent)

    async def _unspent(self) -> tuple[int, list[Any]]:
        """The height that the wallet is at, and its unlocked confirmed coins there."""
        for _ in range(4):
            info, listed, young, after = await self._told(
                Call("getwalletinfo"),
                Call("listunspent", {"minconf": 1, "include_unsafe": True}, fresh=True),
                Call(
                    "listunspent", {"minconf": COINBASE_MATURITY, "maxconf": COINBASE_MATURITY} | _IMMATURE, fresh=True
                ),
                Call("getwalletinfo", fresh=True),
            )
            self._refuse_rescan(after)
            before, now = (self._rpc.read("getwalletinfo", wallet_block, one) for one in (info, after))
            if before == now:
                return now[0], self._rpc.read("listunspent", all_listed, listed, young)
        raise NotNow(f"{self._whose} moved while it was read", after=1.0)

    # ------------------------------------------------------------ locks

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[Leases]:
        """A turn at the leases: what other processes wrote is known, and none writes meanwhile. Not reentrant."""
        if self._leases is None or self._turns is None:
            raise NotNow(f"{self._whose} was not asked yet")
        until = time.monotonic() + self._patience
        async with self._turn:
            with contextlib.ExitStack() as stack:
                while True:
                    try:
                        stack.enter_context(self._turns.held(0.0))
                        break
                    except TimeoutError as exc:
                        if time.monotonic() > until:
                            raise NotNow(f"the locks of {self._whose} are in use by another pjv2", after=1.0) from exc
                    except OSError as exc:
                        raise NotNow(
                            f"the locks of {self._whose} cannot be kept: {exc.strerror or type(exc).__name__}"
                        ) from exc
                    await asyncio.sleep(0.02)
                self._leases.refresh()
                yield self._leases

    async def _locked(self) -> frozenset[Outpoint]:
        (told,) = await self._told(Call("listlockunspent", fresh=True))
        return self._rpc.read("listlockunspent", places_in, told)

    async def _hold(
        self,
        leases: Leases,
        coins: Sequence[Outpoint],
        lock_id: bytes,
        until: Instant,
        ours: frozenset[Outpoint],
    ) -> tuple[Outpoint, ...]:
        """Lock or renew all of them, or answer those that stand in the way and lock none."""
        if not coins:
            return ()
        told, *unspent = await self._told(
            Call("listlockunspent", fresh=True),
            *(Call("gettxout", (coin.txid, coin.vout, True), True) for coin in coins),
        )
        locked = self._rpc.read("listlockunspent", places_in, told)
        taken = locked | leases.held()
        refused = tuple(
            coin
            for coin, there in zip(coins, unspent, strict=True)
            if coin not in ours or there is None or (coin in taken and leases.owner(coin) != lock_id)
        )
        if refused:
            return refused
        fresh = frozenset(coins) - leases.held()
        leases.add(coins, lock_id, until)
        missing = frozenset(coins) - locked
        if missing and isinstance(await self._lock_at_node(missing), Refused):
            leases.remove(fresh)
            return tuple(coin for coin in coins if coin in missing)
        return ()

    async def _lock_at_node(self, coins: frozenset[Outpoint]) -> Any:
        return await self._do(Call("lockunspent", (False, places_of(sorted(coins)), True)))

    async def _let_go(self, leases: Leases, coins: frozenset[Outpoint]) -> None:
        """Unlock leased coins at the node, and only then forget the leases."""
        leased = coins & leases.held()
        if not leased:
            return
        present = leased & await self._locked()
        if present and isinstance(await self._do(Call("lockunspent", (True, places_of(sorted(present))))), Refused):
            # One of them was spent in this moment, which unlocks it: the others one by one.
            for coin in sorted(present):
                await self._do(Call("lockunspent", (True, places_of([coin]))))
        leases.remove(leased)

    async def _end(self, leases: Leases) -> None:
        await self._let_go(leases, leases.expired(self._now()))

    async def _reconcile(self, leases: Leases) -> None:
        """What a crash, a restore or a person left: leases that ended or whose coin is spent go, those that lost their lock get it."""
        await self._end(leases)
        if not leases.held():
            return
        lost = sorted(leases.held() - await self._locked())
        there = await self._told(*(Call("gettxout", (coin.txid, coin.vout, True)) for coin in lost))
        leases.remove(coin for coin, found in zip(lost, there, strict=True) if found is None)
        again = frozenset(lost) & leases.held()
        if again and isinstance(await self._lock_at_node(again), Refused):
            for coin in sorted(again):
                await self._lock_at_node(frozenset({coin}))

    @asynccontextmanager
    async def _left_out(self, leases: Leases, avoid: frozenset[Outpoint]) -> AsyncIterator[None]:
        """Keep coins out of bitcoind's selection, which has no word for that: a short lease each."""
        if not avoid:
            yield
            return
        _, listed = await self._unspent()
        free = self._rpc.read("listunspent", places_in, listed)
        (told,) = await self._told(Call("listunspent", {"minconf": 0, "maxconf": 0, "include_unsafe": False}))
        free |= self._rpc.read("listunspent", places_in, told)
        kept = frozenset(avoid & free)
        lock_id = hashlib.sha256(b"left out" + b"".join(str(coin).encode() for coin in sorted(kept))).digest()
        await self._hold(leases, sorted(kept), lock_id, self._now() + _AVOIDED, kept)
        try:
            yield
        finally:
            await self._let_go(leases, frozenset(coin for coin in kept if leases.owner(coin) == lock_id))

    # ------------------------------------------------------------ paying

    async def _compose(self, payments: Sequence[TxOut], rate: FeeRate, height: int) -> tuple[Psbt, int]:
        """bitcoind's unsigned payment, and where its change is (-1: none). Raises WrongUsage when the money does not suffice."""
        options: dict[str, Any] = {
            "fee_rate": f"{rate.sat_per_kwu / 250:.3f}",
            "change_type": self._type,
            "replaceable": True,
        }
        network = self._rpc.network
        try:
            addresses = [script_to_address(out.script, network) for out in payments]
        except WrongUsage:
            addresses = []
        if addresses and max(Counter(addresses).values()) == 1:
            method = "walletcreatefundedpsbt"
            outputs = [{address: in_btc(out.value)} for address, out in zip(addresses, payments, strict=True)]
            made = await self._do(Call(method, ([], outputs, height, options, True)))
        else:
            # bitcoind takes an address once, and scripts only in a transaction.
            method = "fundrawtransaction"
            bare = Tx(2, height, (), tuple(payments))
            made = await self._do(Call(method, (bare.legacy.hex(), options, False)))
        if isinstance(made, Refused):
            raise self._unpayable(made, payments)
        if method == "fundrawtransaction":
            raw = self._rpc.read(method, lambda: text(made["hex"]))
            (made["psbt"],) = await self._told(Call("converttopsbt", (raw, False, True)))
        try:
            psbt = self._rpc.read(method, lambda: Psbt.from_base64(text(made["psbt"])))
        except PeerMistake as exc:
            raise NotNow(f"{self._whose} built a payment that cannot be read: {exc}") from exc
        return psbt, self._rpc.read(method, lambda: int(made["changepos"]))

    def _unpayable(self, refused: Refused, payments: Sequence[TxOut]) -> PayjoinError:
        wanted = sum(out.value for out in payments)
        said = refused.message.rstrip(".")
        if refused.code == INSUFFICIENT_FUNDS or "nsufficient funds" in said or "exceeds your balance" in said:
            return WrongUsage(f"{self._whose} cannot pay {wanted} sat plus the fee now: {said}")
        if refused.code == KEYPOOL_RAN_OUT or "eypool ran out" in said:
            return NotNow(f"{self._whose} has no fresh address for change: unlock it with walletpassphrase once")
        if refused.code in (WALLET_ERROR, -8, -5, -3, -26):
            return WrongUsage(f"{self._whose} cannot build this payment: {said}")
        return self._rpc.refusal("walletcreatefundedpsbt", refused)

    async def _check_payment(
        self,
        built: Psbt,
        payments: Sequence[TxOut],
        change: int,
        found: Mapping[Outpoint, _Held],
        avoid: frozenset[Outpoint],
    ) -> None:
        """The payment is the one asked for: its inputs ours, its outputs the payments, and one of ours at most."""
        tx = built.tx
        rest = Counter(tx.outputs)
        rest.subtract(Counter(payments))
        extra = [out for out, count in rest.items() for _ in range(count)]
        ours = []
        if len(extra) == 1 and 0 <= change < len(tx.outputs) and tx.outputs[change] == extra[0]:
            address = script_to_address(extra[0].script, self._rpc.network)
            (info,) = await self._told(Call("getaddressinfo", (address,)))
            ours = extra if self._rpc.read("getaddressinfo", is_mine, info) else []
        if (
            any(count < 0 for count in rest.values())
            or extra != ours
            or not tx.inputs
            or any(spend.outpoint not in found or spend.outpoint in avoid for spend in tx.inputs)
            or any(spend.sequence > _REPLACEABLE for spend in tx.inputs)
            or tx.version != 2
        ):
            raise NotNow(f"{self._whose} built another payment than the one asked for: nothing was signed")

    async def _signed(self, built: Psbt, found: Mapping[Outpoint, _Held]) -> Psbt:
        """A payment of ours alone, signed and with all its metadata."""
        signed = await self._process(built, derivations=True)
        self._check_signed(signed, built.tx, {outpoint: held.txout for outpoint, held in found.items()})
        return signed

    # ------------------------------------------------------------ signing

    async def _named(self, psbt: Psbt, ours: Sequence[Outpoint]) -> dict[Outpoint, _Held]:
        places = {spend.outpoint: known for spend, known in zip(psbt.tx.inputs, psbt.inputs, strict=True)}
        found = await self._find(ours)
        for outpoint in ours:
            if outpoint not in found:
                raise WrongUsage(f"{outpoint} is not a coin of this wallet: it will not be signed")
            if outpoint not in places:
                raise WrongUsage(f"{outpoint} is not spent by the PSBT")
            if places[outpoint].sighash_type not in (None, 0, 1):
                raise WrongUsage(f"{outpoint} asks for a signature that is neither ALL nor DEFAULT")
        return found

    async def _sign(self, psbt: Psbt, held: Mapping[Outpoint, _Held]) -> Psbt:
        prevouts = await self._prevouts(psbt, held)
        shadow = []
        for spend in psbt.tx.inputs:
            coin = held.get(spend.outpoint)
            if coin is None:
                # Its owner's business: with a final witness in its place the wallet has nothing to sign here.
                shadow.append(PsbtInput(witness_utxo=prevouts[spend.outpoint], final_script_witness=_STAND_IN))
            elif coin.txout.kind is ScriptKind.P2PKH:
                shadow.append(PsbtInput(non_witness_utxo=coin.parent))
            else:
                shadow.append(PsbtInput(witness_utxo=coin.txout))
        signed = await self._process(
            Psbt(psbt.tx, tuple(shadow), tuple(PsbtOutput() for _ in psbt.outputs)), derivations=False
        )
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
        self._check_signed(done, psbt.tx, prevouts, frozenset(held))
        return done

    async def _process(self, psbt: Psbt, *, derivations: bool) -> Psbt:
        params = {"psbt": psbt.to_base64(), "sign": True, "bip32derivs": derivations, "finalize": True}
        answer = self._rpc.told("walletprocesspsbt", await self._do(Call("walletprocesspsbt", params)))
        try:
            signed = self._rpc.read("walletprocesspsbt", lambda: Psbt.from_base64(text(answer["psbt"])))
        except PeerMistake as exc:
            raise NotNow(f"{self._whose} answers with a PSBT that cannot be read: {exc}") from exc
        if signed.tx != psbt.tx:
            raise NotNow(f"{self._whose} changed the transaction: nothing was signed")
        return signed

    def _check_signed(
        self,
        signed: Psbt,
        unsigned: Tx,
        prevouts: Mapping[Outpoint, TxOut | None],
        named: frozenset[Outpoint] | None = None,
    ) -> None:
        """The curve agrees to our final scripts, and nothing else of the transaction is another."""
        tx = signed.extract()
        spent = [prevouts.get(spend.outpoint) for spend in unsigned.inputs]
        for index, spend in enumerate(tx.inputs):
            if named is None or spend.outpoint in named:
                check_signed_input(tx, index, spent)

    async def _prevouts(self, psbt: Psbt, held: Mapping[Outpoint, _Held]) -> dict[Outpoint, TxOut | None]:
        """The spent outputs: ours by the wallet's records, the others' as the PSBT tells, or as the node knows them."""
        unnamed = [spend.outpoint for spend in psbt.tx.inputs if spend.outpoint not in held]
        ours = {**await self._find(unnamed), **held}
        prevouts: dict[Outpoint, TxOut | None] = {}
        for spend, told in zip(psbt.tx.inputs, psbt.inputs, strict=True):
            parent, vout = told.non_witness_utxo, spend.outpoint.vout
            if spend.outpoint in ours:
                prevouts[spend.outpoint] = ours[spend.outpoint].txout
            elif parent is not None and parent.txid == spend.outpoint.txid and vout < len(parent.outputs):
                prevouts[spend.outpoint] = parent.outputs[vout]
            else:
                prevouts[spend.outpoint] = told.witness_utxo
        unknown = [outpoint for outpoint, prevout in prevouts.items() if prevout is None]
        if unknown and any(coin.txout.kind is ScriptKind.P2TR for coin in held.values()):
            found = await self._told(*(Call("gettxout", (one.txid, one.vout, True)) for one in unknown))
            for outpoint, answer in zip(unknown, found, strict=True):
                if answer is None:
                    raise WrongUsage(f"nobody knows the output {outpoint}, which the PSBT spends")
                prevouts[outpoint] = self._rpc.read("gettxout", txout_of, answer)
        return prevouts
