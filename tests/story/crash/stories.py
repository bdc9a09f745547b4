"""The payments that are stopped at every point: what happens, and how it ends when nothing stops."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from _pytest.mark import ParameterSet

from pjv2.session.events import Policy
from pjv2.session.needs import Cancel
from pjv2.start import FUND_LEASE
from tests.story.crash.kit import PAST_DEADLINE, Ending, Play, Told, play_out, side_by_side
from tests.story.lab.kit import BDK, PAPER, Pair

WHOLE = os.environ.get("PJV2_CRASH") == "whole"
"""Both are on BDK, and stopped at every point. Without it who is not stopped is on paper, and the stories beside the main ones stop
on BDK at effects only: their events are the same."""


@dataclass(frozen=True, slots=True)
class Story:
    """Who does what, and the undisturbed ending."""

    name: str
    victim: str
    act: Callable[[Play], Awaitable[None]]
    ending: Ending
    channels: int = 0
    policy: Policy = field(default_factory=Policy)
    witnesses: tuple[str, ...] = ("bob", "alice")
    on: Told | None = None
    held_until: str = ""
    points: tuple[str, ...] = ()
    """Every point of the victim's process, in no binding order."""
    races: tuple[str, ...] = ()
    """Points that pass by or do not: another process's command decides it, by when it is read."""
    since: str = ""
    """Stop at the points from this one on: those before it are another story's."""
    otherwise: Mapping[str, Ending] = field(default_factory=dict)
    """Where the ending may differ from the undisturbed one, and to what exactly."""
    lapses: Mapping[str, float] = field(default_factory=dict)
    """Where something of the dead process ends by itself, after so many seconds."""

    def play(self, armed: str | None = None, pair: Pair = PAPER) -> Play:
        return Play(
            victim=self.victim,
            armed=armed,
            pair=pair,
            both=armed is None or WHOLE,
            channels=self.channels,
            policy=self.policy,
            witnesses=self.witnesses,
            on=self.on,
            held_until=self.held_until,
            lapse=self.lapses.get(armed or "", 0.0),
        )

    @property
    def stops(self) -> tuple[str, ...]:
        first = self.points.index(self.since) if self.since else 0
        return tuple(f"{when} {point}" for point in self.points[first:] for when in ("before", "after"))


async def stopped_once(story: Story, stop: str, pair: Pair) -> None:
    """Stop the victim there, start it again: the same ending, or the one that is permitted there; audit clean."""
    play = story.play(stop, pair)
    ending = await play_out(play, story.act)
    crashes = play.people[story.victim].crashes
    assert crashes == 1, f"{story.name}: the process was to be stopped {stop}, and was stopped {crashes} times"
    assert ending == story.otherwise.get(stop, story.ending), f"{story.name}, stopped {stop}"


async def undisturbed(story: Story, pair: Pair) -> None:
    """Nothing is stopped; and the points that pass by are the ones that are stopped at, no more and no fewer."""
    play = story.play(pair=pair)
    assert await play_out(play, story.act) == story.ending
    passed = [point for point in play.people[story.victim].switch.points if point not in story.races]
    assert sorted(passed) == sorted(story.points)
    assert set(story.otherwise) | set(story.lapses) <= set(story.stops)


def is_effect(point: str) -> bool:
    """Whether it touches the world outside of the log."""
    return not point.startswith(("append", "create"))


def tells_all(story: Story) -> bool:
    """Whether a story is told on BDK from end to end."""
    return WHOLE or story in (CHANNELS, SENDER)


def whole_tales(*stories: Story) -> list[ParameterSet]:
    return [pair.case(story, id=story.name) for pair in (PAPER, BDK) for story in stories]


def stops(*stories: Story) -> list[ParameterSet]:
    return [
        pair.case(story, stop, id=f"{story.name}, {stop}")
        for pair in (PAPER, BDK)
        for story in stories
        for stop in story.stops
        if pair is PAPER or tells_all(story) or is_effect(stop.partition(" ")[2])
    ]


async def both(play: Play) -> None:
    await play.together("bob", "alice")


async def silent_payer(play: Play) -> None:
    """Alice hands over her Original and is not seen again until Bob is done."""

    async def hand_over() -> None:
        await play.live("alice", lambda state: state.stage == "PollingForProposal")

    await side_by_side(play.live("bob"), hand_over())
    await play.live("alice")


async def silent_receiver(play: Play) -> None:
    """Bob shows his request and is not seen again until Alice is done."""
    play.bob.session = await play.bob.begin(play.driver(play.bob))
    await play.live("alice")
    await play.live("bob")


async def deadline_after_post(play: Play, name: str, event: str) -> None:
    if (name, event) == ("bob", "ProposalPosted") and play.first(name, event):
        play.world.clock.skip(PAST_DEADLINE)


async def deadline_after_original(play: Play, name: str, event: str) -> None:
    if (name, event) == ("alice", "OriginalPosted") and play.first(name, event):
        play.world.clock.skip(PAST_DEADLINE)


async def cancel_when_secured(play: Play, name: str, event: str) -> None:
    if (name, event) == ("bob", "ChannelsSecured") and play.first(name, event):
        # Another process of Bob's says so, while this one is about to sign.
        await play.bob.party.make_driver().command(play.bob.session, Cancel())


async def blocks_after_post(play: Play, name: str, event: str) -> None:
    if (name, event) == ("bob", "ProposalPosted") and play.first(name, event):
        await play.world.chain.mine(play.policy.give_up_blocks)


POINTS = {
    "start": "new_address | create",
    "original": "GET mailbox | append OriginalReceived | append OriginalAccepted",
    "plain": "new_address (2) | append CoinsReserved | lock | append ProposalDrafted",
    "channels": """new_address (2) | new_address (3) | connect (3) | connect (4) | append CoinsReserved | lock |
        append ChannelsIntended | connect (5) | connect (6) | reserve | reserve (2) | append ChannelsReserved |
        append ProposalDrafted | secure | secure (2) | append ChannelsSecured""",
    "post": "sign | append ProposalSigned | lock (2) | append ProposalPosting | POST reply | append ProposalPosted",
    "fallback": "append FallbackBroadcasting | broadcast | append FallbackBroadcasted",
    "seen": "append Seen | append Seen (2)",
    "clear": "cancel | cancel (2) | disconnect | disconnect (2) | abandon | abandon (2) | append ChannelsReleased",
    "end": "unlock | append CoinsReleased | append Closed",
    "pay": "fund | create | lock | append OriginalPosting | POST mailbox | append OriginalPosted",
}


def points(*names: str) -> tuple[str, ...]:
    text = " | ".join(POINTS.get(name, name) for name in names)
    return tuple(" ".join(part.split()) for part in text.split("|"))


WITH_CHANNELS = ("connect | connect (2)", "start", "original", "channels")
"""Up to the proposal."""
PLAIN_INSTEAD = Ending("Paid", "Paid", 0)
"""session-model.md 2.1, SecuringChannels: a worker without the memory secures what the node lists for all of T, else pays plainly."""

PLAIN = Story(
    "receiver",
    "bob",
    both,
    Ending("Paid", "Paid"),
    points=points("start", "original", "plain", "post", "seen", "end"),
)
CHANNELS = Story(
    "receiver with channels",
    "bob",
    both,
    Ending("Paid", "Paid", 2),
    channels=2,
    points=points(*WITH_CHANNELS, "post", "seen", "end"),
    otherwise={
        "after append ProposalDrafted": PLAIN_INSTEAD,
        "before secure": PLAIN_INSTEAD,
        "after secure": PLAIN_INSTEAD,
        "before secure (2)": PLAIN_INSTEAD,
    },
)
FALLBACK = Story(
    "the payer never signs",
    "bob",
    silent_payer,
    Ending("PaidByFallback", "PaidByFallback"),
    channels=2,
    witnesses=("bob",),
    on=deadline_after_post,
    points=points(
        *WITH_CHANNELS,
        "post",
        "append ExpiryPassed",
        "fallback",
        "seen",
        "append ChannelsReleasing",
        "clear",
        "end",
    ),
    since="append ProposalPosting",
)
SENDER = Story(
    "sender",
    "alice",
    both,
    Ending("Paid", "Paid"),
    points=points(
        "pay",
        "GET reply | append ProposalAccepted | sign | append Signed | append Broadcasting | broadcast",
        "seen",
        "end",
    ),
    # The wallet locked the coins for a payment that was never written down: it forgets them by itself.
    lapses={"after fund": FUND_LEASE, "before create": FUND_LEASE},
)
UNANSWERED = Story(
    "the receiver never answers",
    "alice",
    silent_receiver,
    Ending("PaidByFallback", "PaidByFallback"),
    witnesses=("alice",),
    on=deadline_after_original,
    points=points("pay", "append ExpiryPassed | append ProposalRefused", "fallback", "seen", "end"),
    since="POST mailbox",
)
CANCELLED = Story(
    "cancelled with channels secured",
    "bob",
    both,
    Ending("PaidByFallback", "PaidByFallback"),
    channels=2,
    on=cancel_when_secured,
    held_until="ChannelsReleased",
    points=points(
        *WITH_CHANNELS,
        "append ChannelsReleasing | GET reply",
        "fallback",
        "clear",
        "seen",
        "end",
    ),
    races=("sign",),
    since="append ChannelsSecured",
)
WAY_OUT = Story(
    "the way out",
    "bob",
    silent_payer,
    Ending("PaidByFallback", "PaidByFallback"),
    channels=2,
    policy=Policy(give_up_blocks=3),
    witnesses=("bob",),
    on=blocks_after_post,
    points=points(
        *WITH_CHANNELS,
        "post",
        "sign (2) | append WayOutBroadcasting | broadcast",
        "seen",
        "append ChannelsReleasing",
        "clear",
        "append FallbackBroadcasting | broadcast (2) | append FallbackBroadcasted | append Seen (3) | append Seen (4)",
        "end",
    ),
    since="POST reply",
)
RECEIVERS = (PLAIN, CHANNELS, FALLBACK, CANCELLED, WAY_OUT)
SENDERS = (SENDER, UNANSWERED)
