"""A store that came back from an older copy, and a log that a new interpreter reads.

"Restored" (session-model.md 7): a power cut took the unsynced end of the database, or somebody put a backup back. The world is then
newer than the log: a peer holds channels, the mailbox a proposal, the payer a transaction that the log has never heard of.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from pjv2 import session as model
from pjv2.session.monitor import LEASE
from tests.story.crash.interpreter import digest
from tests.story.crash.kit import PAST_DEADLINE, Ending, Person, Play, copy_database, play_out, reopen
from tests.story.crash.stories import CANCELLED, CHANNELS, PLAIN, SENDER, WAY_OUT, WHOLE, Story, tells_all
from tests.story.lab.kit import BDK, PAPER, Pair

ROOT = Path(__file__).parents[3]


# ---------------------------------------------------------------- a new interpreter reads the log


@pytest.mark.parametrize("story", [SENDER, CANCELLED, WAY_OUT], ids=lambda story: story.name)
async def test_a_new_interpreter_tells_the_same_state_after_every_event(story: Story, tmp_path: Path) -> None:
    states: dict[int, model.State] = {}
    copies: dict[int, Path] = {}
    live: dict[int, str] = {}
    play = story.play()
    script = story.on

    async def after(play: Play, name: str, event: str) -> None:
        if name == play.victim:
            person = play.people[name]
            row = (await person.party.store.rows())[0]
            records = await person.party.store.load(row.session)
            copy = copy_database(person.party, f"after-{len(records)}")
            copies[len(records)] = copy.rename(tmp_path / copy.name)
            state: model.State | None = None
            for record in records:
                state = model.evolve(state, model.decode(record.name, record.data))
            assert state is not None
            states[len(records)] = state
        if script is not None:
            await script(play, name, event)

    def note(person: Person, state: model.State) -> None:
        if person.party.name == play.victim:
            live[state.seq] = digest(state)

    play.on, play.watch = after, note
    assert await play_out(play, story.act) == story.ending
    assert max(states) - len(states) <= 1  # a command is another process's append

    session = next(iter(states.values())).session
    turn = asyncio.Semaphore(2)

    async def in_a_new_interpreter(copy: Path) -> str:
        command = ("-m", "tests.story.crash.interpreter", "replay", str(copy), session)
        async with turn:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
            )
            said, _ = await process.communicate()
            return said.decode().strip()

    told = dict(zip(copies, await asyncio.gather(*map(in_a_new_interpreter, copies.values())), strict=True))
    assert told == {seq: digest(state) for seq, state in states.items()}
    assert live.items() <= told.items()  # as the worker that never stopped had it, too


# ---------------------------------------------------------------- the end of the log is lost


async def lose(
    story: Story, lost: str, then: str, pair: Pair, otherwise: Mapping[str, Ending], *, wallet: bool = False
) -> None:
    """Event `lost` was stored and what follows it was done; then the power went, and the database had never synced it.

    With `wallet` the whole disk came back from a copy of that moment, the wallet's files, too.
    """
    play = story.play(f"before append {then}", pair)
    play.backups = True
    play.on = _deadline_when_found

    async def revive(person: Person) -> None:
        copy = play.copies[lost]
        older = copy.wallet if wallet else None
        await reopen(person.party, older_database=copy.database, older_wallet=older)

    play.revive = revive
    play.two_contents = lost in ("OriginalPosting", "ProposalPosting")
    play.lapse = (
        LEASE if lost == "CoinsReserved" else 0.0
    )  # under a lock id that nobody knows any more: it ends by itself
    ending = await play_out(play, story.act)
    assert ending == otherwise.get(lost, story.ending), f"lost {lost}, before {then}: {ending}"
    assert play.people[story.victim].crashes == 1


async def _deadline_when_found(play: Play, name: str, event: str) -> None:
    if event == "ProposalFound" and play.first(name, event):
        play.world.clock.skip(PAST_DEADLINE)


def tails(story: Story) -> list[tuple[str, str]]:
    appends = [point.removeprefix("append ") for point in story.points if point.startswith("append ")]
    appends = [event for event in appends if "(" not in event]
    return list(pairwise(appends))


def losses(story: Story, pairs: tuple[Pair, ...] = (PAPER, BDK)) -> list[ParameterSet]:
    return [
        pair.case(*tail, id="-".join(tail))
        for pair in pairs
        if pair is PAPER or tells_all(story)
        for tail in tails(story)
    ]


LOST_WITH_CHANNELS: Mapping[str, Ending] = {
    # The ids of the reservations are lost, and the peers keep their only slots for them: the attempt fails, the payment does not.
    "ChannelsIntended": Ending("Paid", "Paid", 0),
    # M11: the node lists channels of a T that the log does not know: nothing is proposed any more, the Original is collected.
    "ProposalDrafted": Ending("PaidByFallback", "PaidByFallback", 0),
}


@pytest.mark.parametrize(("lost", "then", "pair"), losses(PLAIN))
async def test_a_plain_receiver_survives_the_loss_of_its_last_event(lost: str, then: str, pair: Pair) -> None:
    await lose(PLAIN, lost, then, pair, {})


@pytest.mark.parametrize(("lost", "then", "pair"), losses(CHANNELS))
async def test_a_receiver_with_channels_survives_the_loss_of_its_last_event(lost: str, then: str, pair: Pair) -> None:
    await lose(CHANNELS, lost, then, pair, LOST_WITH_CHANNELS)


@pytest.mark.parametrize(("lost", "then", "pair"), losses(SENDER))
async def test_a_sender_survives_the_loss_of_its_last_event(lost: str, then: str, pair: Pair) -> None:
    await lose(SENDER, lost, then, pair, {})


@pytest.mark.parametrize(("lost", "then", "pair"), losses(CHANNELS, pairs=(BDK,)))
async def test_a_receiver_survives_the_loss_of_its_last_event_and_of_what_its_wallet_wrote_since(
    lost: str, then: str, pair: Pair
) -> None:
    await lose(CHANNELS, lost, then, pair, LOST_WITH_CHANNELS, wallet=True)


@pytest.mark.parametrize(("lost", "then", "pair"), losses(SENDER, pairs=(BDK,)))
async def test_a_sender_survives_the_loss_of_its_last_event_and_of_what_its_wallet_wrote_since(
    lost: str, then: str, pair: Pair
) -> None:
    await lose(SENDER, lost, then, pair, {}, wallet=True)


# ---------------------------------------------------------------- an older copy, and the payer holds T


BEFORE_POST = tuple(
    point.removeprefix("append ")
    for point in CHANNELS.points[: CHANNELS.points.index("append ProposalPosted") + 1]
    if point.startswith("append ")
)
FORGOTTEN = BEFORE_POST[: BEFORE_POST.index("ProposalDrafted") + 1]
"""Back to before one of these the log does not know T: it can only tell that its inputs paid us otherwise (session-model.md 3.4)."""


async def older(story: Story, back_to: str, pair: Pair) -> None:
    """The proposal is out; the store goes back to before an earlier event; Bob acts as he then can; and only now Alice sends T."""
    play = story.play("after append ProposalPosted", pair)
    play.backups = True
    play.two_contents = True
    play.lapse = LEASE  # the coin of a lost CoinsReserved stays locked: it may be in T
    acted = asyncio.Event()

    async def revive(person: Person) -> None:
        await reopen(person.party, older_database=play.copies[back_to].database)

    async def on(play: Play, name: str, event: str) -> None:
        if play.bob.crashes and name == "bob" and event in ("ProposalPosted", "ProposalFound"):
            acted.set()

    async def late(play: Play) -> None:
        async def alice() -> None:
            await play.live("alice", lambda state: state.stage == "PollingForProposal")
            await acted.wait()
            await play.live("alice")

        async with asyncio.TaskGroup() as group:
            group.create_task(play.live("bob"))
            group.create_task(alice())

    play.revive, play.on = revive, on
    ending = await play_out(play, late)
    permitted = {replace(story.ending, bob="PaidOtherwise" if back_to in FORGOTTEN else "Paid")}
    if story is PLAIN and back_to == "ProposalDrafted":
        permitted.add(
            story.ending
        )  # drafted again with the same coin, the order of its parts can come out the same: T once more
    assert ending in permitted, f"back to before {back_to}: {ending}, {play.told}"
    assert play.bob.crashes == 1


def backs(events: Sequence[str]) -> list[ParameterSet]:
    pairs = (PAPER, BDK) if WHOLE else (PAPER,)
    return [pair.case(event, id=event) for pair in pairs for event in events]


@pytest.mark.parametrize(("back_to", "pair"), backs(BEFORE_POST))
async def test_a_store_older_than_the_lightning_peer_loses_nothing_when_the_payer_sends_the_proposal(
    back_to: str, pair: Pair
) -> None:
    await older(CHANNELS, back_to, pair)


@pytest.mark.parametrize(
    ("back_to", "pair"), backs([event for event in BEFORE_POST if not event.startswith("Channels")])
)
async def test_a_store_older_than_a_plain_proposal_loses_nothing_when_the_payer_sends_it(
    back_to: str, pair: Pair
) -> None:
    await older(PLAIN, back_to, pair)
