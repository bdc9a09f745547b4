"""What a payment will need, tried beforehand: mailroom, wallet, chain source, Lightning node, store, clock and policy.

Every check is on its own: it has a deadline, what fails in it is its result, and no other check waits for it. What is opened is opened
once, when the first check asks. Nothing is signed, broadcast or reserved; the only traces are a mailbox of random bytes at each
directory, connections to channel peers, and the caches of keys and health.

It refuses to guess: a check that cannot be made says why, and is a warning or a failure, never ok.

Law: a result holds public facts only, and a failed check says what to do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pjv2 import schedule
from pjv2.backends.mailroom import HttpMailroom, Service, Source
from pjv2.backends.store.sealed import SealedStore
from pjv2.backends.system import SystemClock, SystemEntropy
from pjv2.config import Config, open_chain, open_channels, open_mailroom, open_store, open_wallet
from pjv2.driver import Driver
from pjv2.errors import NotNow, PayjoinError, WrongUsage
from pjv2.ports import Chain, Channels, Clock, Entropy, Mailroom, Store, Wallet
from pjv2.psbt.plan import ChannelOrder, Coin
from pjv2.psbt.tx import ScriptKind, Tx, TxIn, TxOut
from pjv2.session import replay
from pjv2.session.events import Outcome
from pjv2.session.log import State
from pjv2.session.receive import Receiver
from pjv2.units import FeeRate, Network, Outpoint
from pjv2.wire.mailbox import MailboxRequest, short_id
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey

Status = Literal["ok", "warning", "failed"]
T = TypeVar("T")

DEADLINE = 10.0
"""Seconds for one check."""
MESSAGE_BYTES = 7168
GAP_LIMIT = 20
"""Unused addresses in a row after which wallets stop looking when they are restored (BIP44, "Address gap limit")."""
_GAP_OF_BITCOIND = 1_000
_CLOCK_AHEAD = 7_200
"""A block's time may be two hours ahead of the network's, its median time cannot be ahead of a right clock."""
_TIP_AGE = 4 * 3_600
_SPACE = 100 * 2**20
_LOOKED_AT = 60
_OWN_WEIGHT = 440
"""One native input and one output of ours, in weight units."""
_SEQUENCE = 0xFFFFFFFD

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Check:
    """One result: what was looked at, whether it is good, why, and what to do. `usage`: the configuration is at fault."""

    name: str
    status: Status
    why: str
    todo: str = ""
    usage: bool = field(default=False, compare=False)


class Once(Generic[T]):
    """Something that is made when it is first asked for, for everybody."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._making: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        """It, or what went wrong when it was made. Whoever stops waiting does not stop the making."""
        if self._making is None:
            self._making = asyncio.ensure_future(self._make())
        return await asyncio.shield(self._making)

    async def end(self) -> T | None:
        """What was made, to be closed; what is still being made is stopped."""
        if self._making is None:
            return None
        self._making.cancel()
        (made,) = await asyncio.gather(self._making, return_exceptions=True)
        return None if isinstance(made, BaseException) else made


class Installation:
    """What is examined: a configuration, and the ports, opened on demand. `async with Installation(config) as it:`"""

    def __init__(
        self,
        config: Config,
        *,
        store: Callable[[], Awaitable[Store]] | None = None,
        mailroom: Callable[[], Awaitable[Mailroom]] | None = None,
        wallet: Callable[[], Awaitable[Wallet]] | None = None,
        chain: Callable[[], Awaitable[Chain]] | None = None,
        channels: Callable[[], Awaitable[Channels | None]] | None = None,
        clock: Clock | None = None,
        rng: Entropy | None = None,
        keep: bool = False,
    ) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self.rng = rng or SystemEntropy()
        self.store = Once(store or (lambda: open_store(config)))
        self.mailroom = Once(mailroom or self._open_mailroom)
        self.chain = Once(chain or (lambda: open_chain(config)))
        self.wallet = Once(wallet or (lambda: open_wallet(config)))
        self.channels = Once(channels or self._open_channels)
        self._keep = keep

    @classmethod
    def of(cls, config: Config, driver: Driver) -> Installation:
        """The ports that a running program holds; they stay open."""

        async def given(port: T) -> T:
            return port

        return cls(
            config,
            store=lambda: given(driver.store),
            mailroom=lambda: given(driver.mailroom),
            wallet=lambda: given(driver.wallet),
            chain=lambda: given(driver.chain),
            channels=lambda: given(driver.channels),
            clock=driver.clock,
            keep=True,
        )

    async def _open_mailroom(self) -> Mailroom:
        try:
            store: Store | None = await self.store()
        except PayjoinError:
            store = None  # its own check tells; keys are then fetched afresh
        return await open_mailroom(self.config, store)

    async def _open_channels(self) -> Channels | None:
        if self.config.lightning.backend == "none":
            return None
        return await open_channels(self.config, await self.chain())

    async def __aenter__(self) -> Installation:
        return self

    async def __aexit__(self, *_: object) -> None:
        ports: tuple[Once[Any], ...] = (self.channels, self.wallet, self.mailroom, self.chain, self.store)
        for port in ports:
            made = await port.end()
            if made is not None and not self._keep:
                await made.close()


async def examine(it: Installation, *, deadline: float = DEADLINE) -> AsyncIterator[Check]:
    """Every check's results, in the order of `CHECKS`, as soon as they are there. `deadline` is for each check, in seconds."""
    tasks = [asyncio.create_task(_result(name, check(it), deadline)) for name, check in CHECKS]
    try:
        for task in tasks:
            for found in await task:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _result(name: str, work: Coroutine[Any, Any, Sequence[Check]], deadline: float) -> Sequence[Check]:
    try:
        async with asyncio.timeout(deadline):
            return await work
    except TimeoutError:
        return [Check(name, "failed", f"there was no answer within {deadline:g} s", "Try again, or give it more time.")]
    except PayjoinError as exc:
        return [failure(name, exc)]
    except Exception as exc:  # a bug in one check is its result: it must not hide what the others found
        _log.warning("the check %s broke: %s", name, type(exc).__name__, exc_info=True)
        why = f"this is a bug in pjv2: {type(exc).__name__}"
        return [Check(name, "failed", why, "Run it again with -v -v for the traceback, and report that.")]


def failure(name: str, exc: PayjoinError, todo: str = "") -> Check:
    """A check that ended in one of our errors."""
    usage = isinstance(exc, WrongUsage)
    step = "Correct the configuration." if usage else "Try again later; if it stays, look at the service that is named."
    return Check(name, "failed", str(exc), todo or step, usage=usage)


def exit_code(checks: Iterable[Check]) -> int:
    """0 when nothing failed, 2 when the configuration is at fault, else 4."""
    failed = [check for check in checks if check.status == "failed"]
    if not failed:
        return 0
    return WrongUsage.exit_code if any(check.usage for check in failed) else NotNow.exit_code


# ---------------------------------------------------------------- policy


async def check_policy(it: Installation) -> Sequence[Check]:
    """Settings that contradict each other, or that make payjoins impossible."""
    found = list(_contradictions(it.config))
    return found or [Check("policy", "ok", "the limits leave room for payjoins, and no setting contradicts another")]


def _contradictions(config: Config) -> Iterable[Check]:
    policy, lightning = config.policy, config.lightning.backend != "none"
    if config.chain_backend == "lnd":
        yield Check(
            "policy",
            "failed",
            "LND cannot say whether the network would take a payer's transaction, so no Original could be accepted",
            "Give a second chain source: [chain] backend and url.",
            usage=True,
        )
    if policy.max_fee_share == 0:
        why = "max_fee_share is 0: no fee can be paid for coins of ours, so nothing is ever proposed"
        yield Check("policy", "warning", why, "Raise [policy] max_fee_share.")
    elif policy.min_amount and policy.max_fee_share * policy.min_amount < policy.min_fee_rate * _OWN_WEIGHT / 4:
        least = round(policy.min_fee_rate * _OWN_WEIGHT / 4 / policy.max_fee_share)
        yield Check(
            "policy",
            "warning",
            f"from payments below about {least:_} sat, max_fee_share cannot pay for one coin of ours even at min_fee_rate",
            "Raise [policy] min_amount or max_fee_share.",
        )
    if lightning and policy.own_input == "prefer":
        yield Check(
            "policy",
            "warning",
            'own_input = "prefer": without a coin of ours the payer can re-make the transaction under another id, '
            "and a channel's money would need the peer's consent",
            'Set [policy] own_input = "require" unless you trust your payers.',
        )
    if policy.approve == "ask" and policy.expire_in < 3_600:
        why = f"requests expire after {policy.expire_in} s, and a person has to approve before"
        yield Check("policy", "warning", why, "Raise [policy] expire_in.")
    if policy.watch_after_expiry < policy.give_up_blocks * 600:
        yield Check(
            "policy",
            "warning",
            f"an address is watched for {policy.watch_after_expiry / 86_400:.1f} days after its expiry, "
            f"and {policy.give_up_blocks} blocks take about {policy.give_up_blocks / 144:.1f}",
            "Raise [policy] watch_after_expiry.",
        )
    if config.payjoin.ohttp_keys_file is not None and config.network is Network.BITCOIN:
        yield Check(
            "policy",
            "warning",
            "ohttp_keys_file pins the directories' keys: when one changes its key, every new request is dead",
            "Remove [payjoin] ohttp_keys_file; keys are then fetched through relays.",
        )
    if config.hooks.command is not None and not _is_program(config.hooks.command):
        yield Check(
            "policy", "warning", "[hooks] command names no program that can be run", "Correct the path.", usage=True
        )


def _is_program(command: str) -> bool:
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return bool(words) and shutil.which(words[0]) is not None


# ---------------------------------------------------------------- store


async def check_store(it: Installation) -> Sequence[Check]:
    """The database opens (which refuses files that others can read, and databases that forget), and takes a value."""
    store = await it.store()
    name, value = "doctor", it.rng.token(8).hex()
    await store.put(name, value)
    kept = await store.get(name)
    await store.put(name, None)
    if kept != value:
        why = "a value that was just written could not be read back"
        return [Check("store", "failed", why, "Another pjv2 doctor may be running; else check the disk.")]
    file = it.config.store_file
    if file is not None and file.exists() and (free := shutil.disk_usage(file.parent).free) < _SPACE:
        why = f"the disk of the session database has {free // 2**20} MiB left"
        return [Check("store", "warning", why, "Free some space: a payment that cannot be stored is not made.")]
    if isinstance(store, SealedStore):
        if clear := await store.in_the_clear():
            why = f"{clear} stored events are not encrypted yet"
            return [Check("store", "warning", why, "Run pjv2 store encrypt.")]
        return [Check("store", "ok", "durable, writable, its events encrypted")]
    owner = ", readable by its owner alone" if file is not None and os.name == "posix" else ""
    if it.config.network is Network.BITCOIN:
        why = f"durable and writable{owner}, not encrypted: it holds the keys of open sessions"
        todo = "Set [store] encryption_key_file and run pjv2 store encrypt --make-key, or keep it on an encrypted disk."
        return [Check("store", "warning", why, todo)]
    return [Check("store", "ok", f"durable and writable{owner}; not encrypted")]


# ---------------------------------------------------------------- mailroom


async def check_relays(it: Installation) -> Sequence[Check]:
    """Every relay carries to every directory that another operator runs, and there are two operators."""
    mailroom = await it.mailroom()
    if not isinstance(mailroom, HttpMailroom):
        return [Check("relays", "ok", "the program brought a mailroom of its own")]
    if not mailroom.directories:
        why = "no directory is configured: requests cannot be made"
        return [Check("relays", "failed", why, "Set [payjoin] directories.", usage=True)]
    return [await _relays_for(mailroom, directory) for directory in mailroom.directories]


async def _relays_for(mailroom: HttpMailroom, directory: Service) -> Check:
    pairs = mailroom.relays_for(directory.url)
    names = {relay.operator or relay.domain for relay in pairs}
    if not pairs:
        return Check(
            "relays",
            "failed",
            f"no relay is certainly run by another operator than {directory.url}",
            "Add a relay of somebody else, or write the operators of both into [payjoin].",
            usage=True,
        )
    tried = f"{len(pairs)} relays of {len(names)} operators" if len(pairs) > 1 else "one relay"
    if directory.url.startswith("https://"):
        results = await mailroom.check_relays(directory.url)
        broken = [f"{result.relay.url} ({result.said})" for result in results if not result.works]
        if len(broken) == len(results):
            why = f"no relay carries to {directory.url}: {'; '.join(broken)}"
            return Check("relays", "failed", why, "Check the network and [payjoin] relays; try again.")
        if broken:
            why = f"some relays do not carry to {directory.url}: {'; '.join(broken)}"
            return Check("relays", "warning", why, "Payments work through the others; replace it if it stays.")
        tried += f", all carry to {directory.url}"
    if len(names) < 2:
        why = f"{tried}, of one operator: it carries both polls and proposals, and nobody checks the keys it brings"
        return Check("relays", "warning", why, "Add a relay of another operator to [payjoin] relays.")
    return Check("relays", "ok", tried)


async def check_keys(it: Installation) -> Sequence[Check]:
    """The OHTTP keys of each directory, as two relays of different operators tell them."""
    mailroom = await it.mailroom()
    if not isinstance(mailroom, HttpMailroom):
        url, _ = await mailroom.directory()
        return [Check("keys", "ok", f"the mailroom has the keys of {url}")]

    async def check(directory: Service) -> Check:
        try:
            standing = await mailroom.check_keys(directory.url)
        except PayjoinError as exc:
            return failure("keys", exc)
        if standing.warning:
            return Check("keys", "warning", standing.warning, "Add a relay of another operator to [payjoin] relays.")
        age = max(it.clock.now() - standing.fetched, 0.0)
        how = {
            Source.TWO_RELAYS: "two relays of different operators brought the same keys",
            Source.ONE_RELAY: "one relay brought the keys",
            Source.LOOPBACK: "asked directly, as the directory is on this machine",
            Source.FILE: "read from ohttp_keys_file",
        }[standing.source]
        return Check("keys", "ok", f"{directory.url}: {how}, {age / 60:.0f} min ago")

    return await asyncio.gather(*(check(directory) for directory in mailroom.directories))


async def check_directory(it: Installation) -> Sequence[Check]:
    """Each directory keeps a message and gives it back: random bytes, in a mailbox that nobody else knows."""
    mailroom = await it.mailroom()
    if not isinstance(mailroom, HttpMailroom):
        return [await _round_trip(it, mailroom, *(await mailroom.directory()))]

    async def check(directory: Service) -> Check:
        try:
            return await _round_trip(it, mailroom, directory.url, (await mailroom.check_keys(directory.url)).keys)
        except PayjoinError as exc:
            return failure("directory", exc)

    return await asyncio.gather(*(check(directory) for directory in mailroom.directories))


async def _round_trip(it: Installation, mailroom: Mailroom, url: str, keys: KeyConfig) -> Check:
    relays = await round_trip(mailroom, url, keys, it.rng)
    ways = "two relays" if len(relays) > 1 else "one relay"
    return Check("directory", "ok", f"{url} kept a message and gave it back, through {ways}")


async def round_trip(mailroom: Mailroom, directory: str, keys: KeyConfig, rng: Entropy) -> frozenset[str]:
    """Leave random bytes in a mailbox that nobody else knows, and read them back; answers the relays that carried them. NotNow."""
    # Random bytes are what a message looks like: nobody can tell this mailbox from one of a payment.
    message, session = rng.token(MESSAGE_BYTES), rng.token(16).hex()
    mailbox = short_id(SecretKey.generate(rng).public)
    posted = await mailroom.exchange(directory, keys, MailboxRequest("POST", mailbox, message), session=session)
    look = MailboxRequest("GET", mailbox)
    read = await mailroom.exchange(directory, keys, look, session=session, avoid=posted.relay)
    if posted.reply.status != 200 or read.reply.status != 200 or read.reply.body != message:
        answers = f"it answered {posted.reply.status} and {read.reply.status}"
        raise NotNow(f"{directory} did not give back what was left there ({answers})")
    return frozenset((posted.relay, read.relay))


# ---------------------------------------------------------------- wallet


async def check_wallet(it: Installation) -> Sequence[Check]:
    """The wallet answers, is on the configured network, and can sign."""
    wallet = await it.wallet()
    network, fingerprint = await wallet.network(), await wallet.fingerprint()
    if network is not it.config.network:
        why = f"the wallet is on {network.value}, the configuration says {it.config.network.value}"
        return [Check("wallet", "failed", why, "Correct network, or name another wallet.", usage=True)]
    if not await wallet.can_sign():
        why = f"the wallet {fingerprint} cannot sign now: it is locked, or has no private keys"
        return [Check("wallet", "failed", why, "Unlock it, or give keys that sign: nothing can be proposed or paid.")]
    return [Check("wallet", "ok", f"the wallet {fingerprint} on {network.value} can sign")]


async def check_coins(it: Installation) -> Sequence[Check]:
    """A confirmed, free, native segwit coin is there to take part in a payjoin."""
    coins = await (await it.wallet()).coins()
    pledged = await _pledged(it)
    free = [coin for coin in coins if coin.outpoint not in pledged]
    channels = it.config.lightning.backend != "none"
    stopped = channels and it.config.policy.own_input == "require"
    fallback = "no channel can be opened" if stopped else "payments arrive as ordinary ones"
    if not free:
        held = f"all {len(coins)} coins are pledged to open sessions" if coins else "there is no confirmed coin"
        why = f"{held}: {fallback}, for a payjoin takes a coin of ours"
        return [Check("coins", "failed" if stopped and not coins else "warning", why, "Send some coins to the wallet.")]
    native = [coin for coin in free if coin.txout.kind.is_native_segwit]
    if len(native) < len(free):
        why = f"{len(free) - len(native)} of {len(free)} free coins are not native segwit"
        if not native:
            why += "; they cost more, and differ from what most payers spend"
        return [Check("coins", "warning", why, "Send them to a native segwit address (bc1q…, bc1p…) of the wallet.")]
    value = sum(coin.txout.value for coin in free)
    return [Check("coins", "ok", f"{len(free)} free coins of {value:_} sat together, confirmed and native segwit")]


async def _pledged(it: Installation) -> frozenset[Outpoint]:
    try:
        return frozenset(await (await it.store()).coins_in_use())
    except PayjoinError:
        return frozenset()  # the store's own check tells


async def check_gap(it: Installation) -> Sequence[Check]:
    """How many requests in a row were never paid to their address: a restored wallet stops looking after so many."""
    limit = _GAP_OF_BITCOIND if it.config.wallet.backend == "bitcoind" else GAP_LIMIT
    unused = 0
    async for state in _receivers(await it.store()):
        if _used_its_address(state):
            break
        unused += 1
    if unused >= limit:
        why = f"the last {unused} addresses handed out were not paid to: a wallet restored from its seed may stop before them"
        todo = f"Restore with a gap limit above {unused}, or send a coin to the newest address of the wallet."
        return [Check("gap", "warning", why, todo)]
    return [Check("gap", "ok", f"{unused} addresses in a row unused, of {limit} that a restored wallet looks past")]


async def _receivers(store: Store) -> AsyncIterator[Receiver]:
    """The latest requests, newest first."""
    for row in [row for row in await store.rows() if row.role == "receiver"][:_LOOKED_AT]:
        state = await _state(store, row.session)
        if isinstance(state, Receiver):
            yield state


async def _state(store: Store, session: str) -> State:
    return replay([(record.seq, record.name, record.data) for record in await store.load(session)])


def _used_its_address(state: Receiver) -> bool:
    """Whether the chain shows a payment to the session's address. A payjoin into channels does not pay it."""
    if state.late or any(sight.what in {"address", "original"} for sight in state.sightings):
        return True
    closed = state.closed
    return closed is not None and (
        closed.outcome in {Outcome.PAID_BY_FALLBACK, Outcome.PAID_OTHERWISE}
        or (closed.outcome is Outcome.PAID and not closed.channels)
    )


# ---------------------------------------------------------------- chain


async def check_chain(it: Installation) -> Sequence[Check]:
    """The chain source is on the configured network and knows a tip."""
    chain = await it.chain()
    genesis, wanted = await chain.genesis_hash(), it.config.network.genesis_hash
    if genesis != wanted:
        why = f"the chain source's block 0 is {genesis[:16]}…, that of {it.config.network.value} is {wanted[:16]}…"
        return [Check("chain", "failed", why, "Correct network, or [chain] url.", usage=True)]
    tip = await chain.tip()
    return [Check("chain", "ok", f"on {it.config.network.value}, at block {tip.height:_}")]


async def check_original(it: Installation) -> Sequence[Check]:
    """The chain source can tell a bad transaction from a good one: a made-up one must be refused."""
    chain = await it.chain()
    coin = await _a_coin(it)
    tx = made_up(coin, await chain.fee_rate(6), it.rng)
    verdict = await chain.test(tx.raw)
    if verdict.verdict == "refused":
        how = "with a false signature on a coin of ours" if coin is not None else "with an input that does not exist"
        return [Check("original", "ok", f"the chain source refuses a made-up transaction {how}")]
    if verdict.verdict == "unverifiable":
        why = f"the chain source cannot tell whether the network would take a payer's transaction: {verdict.reason}"
        todo = "Use a source that can ([chain] backend = bitcoind), or install what is named."
        return [Check("original", "failed", why, todo, usage=True)]
    why = f"the chain source calls a transaction {verdict.verdict} that cannot be: its word is worth nothing"
    return [Check("original", "failed", why, "Use another one: [chain] url.", usage=True)]


async def _a_coin(it: Installation) -> Coin | None:
    """The largest coin of ours: the source knows of it already."""
    try:
        coins = await (await it.wallet()).coins()
    except PayjoinError:
        return None  # the wallet's own check tells
    return max(coins, key=lambda coin: coin.txout.value, default=None)


def made_up(coin: Coin | None, rate: FeeRate, rng: Entropy) -> Tx:
    """A transaction that can never be valid: a false signature on `coin`, or an output that does not exist."""
    if coin is None:
        outpoint, value, script = Outpoint(rng.token(32).hex(), 0), 100_000, b"\x00\x14" + rng.token(20)
    else:
        outpoint, value, script = coin.outpoint, coin.txout.value, coin.txout.script
    # DER's form of r = s = 1, and a point of the curve that is nobody's key.
    signature, key = bytes.fromhex("300602010102010101"), SecretKey.generate(rng).public.compressed
    witness = (bytes(64),) if coin is not None and coin.txout.kind is ScriptKind.P2TR else (signature, key)
    fee = min(max(1_000, rate.fee(4 * 150)), value // 2)
    return Tx(2, 0, (TxIn(outpoint, b"", _SEQUENCE, witness),), (TxOut(value - fee, script),))


async def check_clock(it: Installation) -> Sequence[Check]:
    """This machine's clock and the chain's agree: expiry and fallback are by the clock."""
    tip = await (await it.chain()).tip()
    behind = it.clock.now() - tip.median_time
    if behind < -60:
        why = f"this machine's clock is {-behind / 60:.0f} min behind the median time of the last eleven blocks"
        return [Check("clock", "failed", why, "Set the clock (NTP): requests would expire at the wrong time.")]
    if it.config.network is not Network.REGTEST and behind > _TIP_AGE:
        why = f"the chain source's tip is {behind / 3600:.1f} h old by this clock: it is not synced, or the clock is ahead"
        return [Check("clock", "warning", why, "Let the source sync, and set the clock (NTP).")]
    return [Check("clock", "ok", "the clock agrees with the chain")]


async def check_fees(it: Installation) -> Sequence[Check]:
    """The policy's rates fit the market."""
    rate, policy = (await (await it.chain()).fee_rate(6)).sat_per_vb, it.config.policy
    if rate > policy.max_fee_rate:
        why = f"the market asks {rate:g} sat/vB, and max_fee_rate is {policy.max_fee_rate:g}: proposals confirm late or never"
        return [Check("fees", "warning", why, "Raise [policy] max_fee_rate, or wait.")]
    if policy.min_fee_rate > rate:
        why = f"min_fee_rate is {policy.min_fee_rate:g} sat/vB, and the market asks only {rate:g}: payers are refused in vain"
        return [Check("fees", "warning", why, "Lower [policy] min_fee_rate.")]
    return [Check("fees", "ok", f"about {rate:g} sat/vB for six blocks, within the policy")]


# ---------------------------------------------------------------- lightning


async def check_lightning(it: Installation) -> Sequence[Check]:
    """The node answers, can open channels now, and its wallet holds what they must keep in reserve."""
    node = await it.channels()
    if node is None:
        return [Check("lightning", "ok", "none configured: payments become payjoins without channels")]
    info = await node.node()
    if not info.ready:
        why = f"the node {info.pubkey[:16]}… cannot open channels now: {info.why_not or 'it does not say why'}"
        return [Check("lightning", "failed", why, "Bring the node into order; until then payments get no channels.")]
    missing = await node.anchor_reserve(1)
    if missing > 0:
        why = f"the node's own wallet lacks {missing:_} sat that one more public channel must keep in reserve"
        return [Check("lightning", "warning", why, "Send that to the node's wallet, or open private channels.")]
    span = f"{info.min_capacity:_} to {info.max_capacity:_} sat"
    return [Check("lightning", "ok", f"the node {info.pubkey[:16]}… is ready for channels of {span}")]


async def check_peers(it: Installation) -> Sequence[Check]:
    """The peers that channels are planned with can be reached, and none still holds an abandoned channel."""
    node = await it.channels()
    if node is None:
        return []
    store = await it.store()
    orders = await _planned(store)
    if not orders:
        return [Check("peers", "ok", "no channel is planned; peers are tried when one is")]
    blocked, tip = await store.blocked_peers(), (await (await it.chain()).tip()).height

    async def problem(order: ChannelOrder) -> str | None:
        if blocked.get(order.peer, 0) > tip:
            return f"{order.peer[:16]}… may refuse until block {blocked[order.peer]:_}: it holds an abandoned channel"
        try:
            async with asyncio.timeout(DEADLINE * 0.8):
                await node.connect(order.peer, order.host)
        except TimeoutError:
            return f"{order.peer[:16]}… does not answer"
        except PayjoinError as exc:
            return f"{order.peer[:16]}… cannot be reached: {exc}"
        return None

    troubles = [said for said in await asyncio.gather(*(problem(order) for order in orders)) if said is not None]
    if troubles:
        todo = "Their channels are left out or deferred, as on_peer_failure says; plan with other peers if it stays."
        return [Check("peers", "warning", "; ".join(troubles), todo)]
    return [Check("peers", "ok", f"all {len(orders)} peers of planned channels are connected")]


async def _planned(store: Store) -> tuple[ChannelOrder, ...]:
    """Channels that open requests and the schedule wait for, one per peer."""
    found = {plan.order.peer: plan.order for plan in await schedule.read(store) if plan.state == "waiting"}
    for row in await store.rows(open_only=True):
        if row.role == "receiver":
            state = await _state(store, row.session)
            plan = state.created.plan if isinstance(state, Receiver) and not state.channels_pending else None
            found |= {order.peer: order for order in (plan.orders if plan is not None else ())}
    return tuple(found.values())


CHECKS: tuple[tuple[str, Callable[[Installation], Coroutine[Any, Any, Sequence[Check]]]], ...] = (
    ("policy", check_policy),
    ("store", check_store),
    ("relays", check_relays),
    ("keys", check_keys),
    ("directory", check_directory),
    ("wallet", check_wallet),
    ("coins", check_coins),
    ("gap", check_gap),
    ("chain", check_chain),
    ("original", check_original),
    ("clock", check_clock),
    ("fees", check_fees),
    ("lightning", check_lightning),
    ("peers", check_peers),
)
