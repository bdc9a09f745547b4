"""What a need asks of the ports: one `match` over needs, an effect or a question behind each, and the answer for the session.

It decides nothing and remembers nothing that money depends on: what it did is told by its answer, and by the ports themselves when
it is asked again. A peer's failure is an answer in words, not an exception: the payment goes on without that channel (money rule 7).

Law: the order inside a release is cancel, cut off, list, abandon (session-model.md 3.2); whatever a lost worker reserved is given
back (M17).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

from pjv2.errors import NotNow, PayjoinError, PeerMistake
from pjv2.ports import (
    Chain,
    Channels,
    Clock,
    Entropy,
    Mailroom,
    Store,
    Wallet,
)
from pjv2.psbt.original import OriginalFacts, RuleFacts
from pjv2.psbt.plan import ChannelOrder, ReceiverScripts
from pjv2.session import State
from pjv2.session.facts import ChannelFailure, Inspection, ReservedChannel, SecuredChannel
from pjv2.session.needs import (
    Answer,
    Bip78Answer,
    Broadcast,
    BroadcastAnswer,
    ChannelsCleared,
    ChannelsCommitted,
    ChannelsOffered,
    CoinsFound,
    CoinsFreed,
    CoinsHeld,
    Delivered,
    FindCoins,
    GatherFacts,
    InspectChannels,
    Memory,
    Need,
    Poll,
    Polled,
    PostBip78,
    PostOriginal,
    PostReply,
    ReadReply,
    ReleaseChannels,
    ReleaseCoins,
    ReplyRead,
    ReserveChannels,
    ReserveCoins,
    SecureChannels,
    Sign,
    SignedPsbt,
    Watch,
)
from pjv2.units import Instant, Outpoint, SessionId
from pjv2.wire.mailbox import MailboxReply, MailboxRequest
from pjv2.wire.message import seal_message_a
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import PublicKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a want that stays due is performed again, in seconds. Nothing here is a rule of money."""

    watch: float = 30.0
    rebroadcast: float = 120.0
    retry: float = 2.0
    retry_max: float = 120.0
    poll_floor: float = 5.0
    """A poll that came back empty sooner than this waits for the rest (a directory that answers 202 at once)."""
    node_timer: float = 60.0
    """How long a peer may take to reserve or to secure a channel."""
    claim: float = 60.0


@dataclass(slots=True)
class Run:
    """A session as one worker holds it: its snapshot of the log, and what it remembers of this run."""

    session: SessionId
    state: State
    memory: Memory = field(default_factory=Memory)
    excluded: set[Outpoint] = field(default_factory=set)
    scripts: ReceiverScripts | None = None
    not_before: dict[object, Instant] = field(default_factory=dict)
    failures: dict[object, int] = field(default_factory=dict)


class Errands:
    """The ports, and how each need is performed over them; the driver's other half."""

    def __init__(
        self,
        *,
        store: Store,
        mailroom: Mailroom,
        wallet: Wallet,
        chain: Chain,
        clock: Clock,
        entropy: Entropy,
        channels: Channels | None,
        pace: Pace,
    ) -> None:
        self.store = store
        self.mailroom = mailroom
        self.wallet = wallet
        self.chain = chain
        self.channels = channels
        self.clock = clock
        self.entropy = entropy
        self.pace = pace
        self._coin_choice = asyncio.Lock()

    async def _undo(self, run: Run, need: Need) -> None:
        """M17: a worker that lost the race gives back what it reserved: at the node, and at the wallet what is not the session's."""
        if isinstance(need, ReserveCoins):
            held = frozenset(run.state.own_coins)
            stray = tuple(coin for coin in need.coins if coin not in held)
            if stray:
                with contextlib.suppress(NotNow):
                    await self.wallet.unlock(stray, need.lock_id)
        if isinstance(need, ReserveChannels) and self.channels is not None:
            for id, order in need.orders:
                with contextlib.suppress(NotNow):
                    await self.channels.cancel(id)
                    await self.channels.disconnect(order.peer)

    # ------------------------------------------------------------ answers

    async def _perform(self, run: Run, need: Need) -> Answer:  # noqa: PLR0911, PLR0912  one match over needs, nothing else
        """Get one answer from the world."""
        match need:
            case Poll():
                return await self._poll(run, need)
            case ReadReply(mailbox=mailbox):
                try:
                    reply, _ = await self._exchange(
                        run, mailbox.directory, mailbox.keys, MailboxRequest("GET", mailbox.short_id)
                    )
                except NotNow:
                    return ReplyRead(readable=False)
                if reply.status == 200:
                    return ReplyRead(readable=True, body=reply.body)
                return ReplyRead(readable=reply.status == 202)
            case PostOriginal(mailbox=mailbox, message=message):
                request = MailboxRequest("POST", mailbox.short_id, message)
                reply, relay = await self._exchange(run, mailbox.directory, mailbox.keys, request)
                return Delivered(reply.status, relay)
            case PostBip78(url=url, body=body):
                answer = await self.mailroom.bip78(url, body, session=run.session)
                return Bip78Answer(answer.status, answer.body)
            case PostReply(mailbox=mailbox, method=method, message=message, avoid_relay=avoid):
                request = MailboxRequest(method, mailbox.short_id, message)
                reply, relay = await self._exchange(run, mailbox.directory, mailbox.keys, request, avoid)
                return Delivered(reply.status, relay)
            case Watch(txids=txids, outpoints=outpoints, scripts=scripts, since=since):
                return await self.chain.view(txids, outpoints, scripts, since)
            case Broadcast(purpose=purpose, txid=txid, raw=raw):
                result = await self.chain.broadcast(raw)
                if result.verdict == "accepted":
                    await self.wallet.saw(raw)
                return BroadcastAnswer(purpose, txid, result)
            case GatherFacts():
                return await self._facts(need)
            case FindCoins():
                return await self._find_coins(run, need)
            case ReserveCoins(coins=coins, lock_id=lock_id, until=until, inputs=inputs, memo=memo):
                missing = await self.wallet.lock(coins, lock_id, until)
                return CoinsHeld(missing, await self._inspect(memo, inputs, coins))
            case ReleaseCoins(coins=coins, lock_id=lock_id):
                await self.wallet.unlock(coins, lock_id)
                return CoinsFreed(coins)
            case Sign(purpose=purpose, psbt=psbt, ours=ours):
                return SignedPsbt(purpose, await self.wallet.sign(psbt, ours))
            case InspectChannels(memo=memo, inputs=inputs, coins=coins):
                return await self._inspect(memo, inputs, coins)
            case ReserveChannels():
                return await self._reserve_channels(need)
            case SecureChannels():
                return await self._secure_channels(need)
            case ReleaseChannels():
                return await self._release_channels(need)
            case _:
                assert_never(need)

    async def _exchange(
        self, run: Run, directory: str, keys: bytes, request: MailboxRequest, avoid: str = ""
    ) -> tuple[MailboxReply, str]:
        try:
            carried = await self.mailroom.exchange(
                directory, KeyConfig.parse(keys), request, session=run.session, avoid=avoid
            )
        except PeerMistake as exc:
            # What the directory or a relay garbled is not the session's fault: the next attempt is a fresh envelope.
            raise NotNow(f"the directory's answer could not be read: {exc}") from exc
        if carried.reply.status >= 500:
            raise NotNow(f"the directory answered {carried.reply.status}")
        return carried.reply, carried.relay

    async def _poll(self, run: Run, need: Poll) -> Polled:
        body = b""
        if need.cover is not None:
            receiver, reply_key = (PublicKey.parse(key) for key in need.cover)
            body = seal_message_a(receiver, reply_key, b"", self.entropy)
        started = self.clock.now()
        request = MailboxRequest("GET", need.mailbox.short_id, body)
        reply, relay = await self._exchange(run, need.mailbox.directory, need.mailbox.keys, request)
        if reply.status == 200:
            return Polled(reply.body, relay)
        if reply.status != 202:
            raise NotNow(f"the directory answered {reply.status} to a poll", after=self.pace.retry_max)
        early = self.pace.poll_floor - (self.clock.now() - started)
        if early > 0:
            await self.clock.sleep(min(early, self.pace.poll_floor))
        return Polled(None, relay)

    async def _facts(self, need: GatherFacts) -> OriginalFacts:
        suitability, prevouts, owned, tip, rate = await asyncio.gather(
            self.chain.test(need.tx),
            self.chain.prevouts(need.outpoints),
            self.wallet.mine(need.outpoints),
            self.chain.tip(),
            self.chain.fee_rate(144),
        )
        return OriginalFacts(
            tip=tip.height,
            suitability=suitability,
            prevouts=prevouts,
            owned=owned,
            economy_rate=rate,
            tip_time=tip.median_time,
        )

    async def _rule_facts(self, outpoints: Sequence[Outpoint]) -> RuleFacts:
        prevouts, tip, rate, can_sign = await asyncio.gather(
            self.chain.prevouts(outpoints), self.chain.tip(), self.chain.fee_rate(144), self.wallet.can_sign()
        )
        return RuleFacts(
            tip=tip.height,
            tip_time=tip.median_time,
            prevouts=prevouts,
            spends_seen=frozenset(at for at, prevout in prevouts.items() if prevout.spent_by is not None),
            can_sign=can_sign,
            economy_rate=rate,
        )

    async def _inspect(self, memo: str, inputs: Sequence[Outpoint], coins: Sequence[Outpoint]) -> Inspection:
        facts = await self._rule_facts([*inputs, *coins])
        if self.channels is None:
            return Inspection((), facts, listed=False)
        return Inspection(await self.channels.channels(memo), facts)

    async def _find_coins(self, run: Run, need: FindCoins) -> CoinsFound:
        async with self._coin_choice:
            in_use = await self.store.coins_in_use()
            candidates = [
                coin
                for coin in await self.wallet.coins()
                if in_use.get(coin.outpoint, run.session) == run.session
                and coin.outpoint not in need.exclude
                and coin.outpoint not in run.excluded
            ]
        if run.scripts is None:
            change = await self.wallet.new_address(change=True)
            deposit = await self.wallet.new_address() if need.orders else None
            reserve = await self.channels.reserve_script() if need.orders and self.channels is not None else None
            run.scripts = ReceiverScripts(change.script, deposit.script if deposit else None, reserve)
        unreachable = await self._unreachable(run, need.orders)
        inspection = await self._inspect(need.memo, need.inputs, [coin.outpoint for coin in candidates])
        return CoinsFound(tuple(candidates), run.scripts, inspection, unreachable)

    async def _unreachable(self, run: Run, orders: Sequence[ChannelOrder]) -> tuple[str, ...]:
        """Peers of the plan that cannot open a channel now: offline, busy for another session, or still holding a dead one."""
        if not orders or self.channels is None:
            return tuple(order.peer for order in orders)
        channels = self.channels
        in_use = await self.store.peers_in_use()
        blocked = await self.store.blocked_peers()
        height = (await self.chain.tip()).height

        async def unreachable(order: ChannelOrder) -> bool:
            if in_use.get(order.peer, run.session) != run.session or blocked.get(order.peer, 0) > height:
                return True
            return isinstance(await self._timed(channels.connect(order.peer, order.host)), str)

        answers = await asyncio.gather(*(unreachable(order) for order in orders))
        return tuple(order.peer for order, away in zip(orders, answers, strict=True) if away)

    async def _timed(self, work: Awaitable[T]) -> T | str:
        """The answer, or in words why there is none within the node timer."""
        try:
            async with asyncio.timeout(self.pace.node_timer):
                return await work
        except TimeoutError:
            return f"no answer within {self.pace.node_timer:g} s"
        except (
            PayjoinError
        ) as exc:  # whoever's fault: this channel failed, the payment goes on without it (money rule 7)
            return str(exc)

    def _node(self) -> Channels:
        if self.channels is None:
            raise NotNow("this session opens channels, and no Lightning node is configured")
        return self.channels

    async def _reserve_channels(self, need: ReserveChannels) -> ChannelsOffered:
        node = self._node()

        async def reserve(id: bytes, order: ChannelOrder) -> ReservedChannel:
            # Connected before, perhaps: an earlier attempt ended by cutting every peer off, the ones that did nothing wrong too.
            await node.connect(order.peer, order.host)
            return await node.reserve(id, order, need.memo)

        answers = await asyncio.gather(*(self._timed(reserve(id, order)) for id, order in need.orders))
        reserved: list[ReservedChannel] = []
        failed: list[ChannelFailure] = []
        for (id, order), answer in zip(need.orders, answers, strict=True):
            if isinstance(answer, str):
                failed.append(ChannelFailure(id, order.peer, answer))
            else:
                reserved.append(answer)
        return ChannelsOffered(tuple(reserved), tuple(failed))

    async def _secure_channels(self, need: SecureChannels) -> ChannelsCommitted:
        node = self._node()
        answers = await asyncio.gather(
            *(self._timed(node.secure(id, need.psbt, need.txid, funding)) for id, funding in need.funding)
        )
        secured: list[SecuredChannel] = []
        failed: list[ChannelFailure] = []
        for (id, _), answer in zip(need.funding, answers, strict=True):
            if isinstance(answer, str):
                failed.append(ChannelFailure(id, "", answer))
            else:
                secured.append(answer)
        return ChannelsCommitted(tuple(secured), tuple(failed))

    async def _release_channels(self, need: ReleaseChannels) -> ChannelsCleared:
        """session-model.md 3.2, steps 3 and 4: cancel, cut off, list, abandon what this log drafted, in that order."""
        node = self._node()
        for id in need.ids:
            await node.cancel(id)
        await asyncio.gather(*(node.disconnect(peer) for peer in need.peers))
        listed = await node.channels(need.memo)
        abandoned: list[Outpoint] = []
        for channel in listed:
            if channel.state == "pending" and channel.outpoint is not None and channel.outpoint in need.drafted:
                await node.abandon(channel.outpoint)
                abandoned.append(channel.outpoint)
        remaining = tuple(
            channel
            for channel in await node.channels(need.memo)
            if channel.state == "pending" and channel.outpoint not in need.drafted
        )
        return ChannelsCleared(remaining, tuple(abandoned), (await self.chain.tip()).height)
