"""A receiver that is a process of its own: over HTTP, relays and sockets, dying by `os._exit`, again and again, within one payment."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.story.crash.kit import PATIENCE, Ending, Play, play_out
from tests.story.crash.process import serve
from tests.story.crash.stories import WHOLE
from tests.story.lab.kit import BDK, PAPER, Pair

ROOT = Path(__file__).parents[3]
KILLED = 137

PLAIN_DEATHS = (
    "after append OriginalReceived",
    "after append CoinsReserved",
    "after append ProposalDrafted",
    "after append ProposalPosting",
    "after append ProposalPosted",
    "after append Seen",
)
CHANNEL_DEATHS = (
    "after reserve (2)",  # the first attempt's reservations: released, and tried again with new ids
    "after secure (2)",
    "after append ChannelsSecured",
    "after append ProposalPosting",
    "after POST mailbox",  # the first mailbox that this process has to do with is the reply's
    "after append Seen",
)


async def die_and_live(play: Play, deaths: tuple[str, ...]) -> None:
    """One process after the other, each ending at its point; the last one brings the payment to its end."""
    world, bob = play.world, play.bob
    seen = asyncio.Event()

    async def blocks() -> None:
        await play.alice.party.diary.until("Seen", seconds=PATIENCE)
        await seen.wait()
        await world.chain.mine(6)
        play.look_again()

    bob.session = await bob.begin(play.driver(bob))
    await bob.party.close()
    server = await serve(world.chain)
    port = server.sockets[0].getsockname()[1]
    orders = {
        "session": bob.session,
        "pair": play.pair.name,
        "seed": bob.party.seed.hex(),
        "chain": (await world.serve_chain()).url if play.pair is BDK else port,
        "relays": [relay.url for relay in world.relays],
        "directory": world.directory.url,
        "lightning": bob.party.lightning,
    }

    async def processes() -> None:
        for armed in (*deaths, None):
            (bob.party.home / "orders.json").write_text(json.dumps({**orders, "armed": armed}))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.story.crash.interpreter", "receive", str(bob.party.home)),
                cwd=ROOT,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            try:
                async for line in process.stdout:
                    if line == b"Seen\n":
                        seen.set()
                code = await process.wait()
            except asyncio.CancelledError:
                process.kill()
                await process.wait()
                raise
            assert code == (KILLED if armed is not None else 0), (
                f"the process that was to die {armed} ended with {code}"
            )

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(processes())
            group.create_task(play.live("alice"))
            group.create_task(blocks())
    finally:
        server.close()
        await bob.party.start()


CASES = [
    pair.case(channels, deaths, id=id)
    for pair in (PAPER, BDK)
    for channels, deaths, id in ((0, PLAIN_DEATHS, "plain"), (2, CHANNEL_DEATHS, "with channels"))
    if pair is PAPER or channels or WHOLE
]


@pytest.mark.parametrize(("channels", "deaths", "pair"), CASES)
async def test_a_process_that_dies_again_and_again_is_paid_as_if_it_had_lived(
    channels: int, deaths: tuple[str, ...], pair: Pair
) -> None:
    play = Play(pair=pair, channels=channels, http=True, witnesses=("nobody",))
    assert await play_out(play, lambda play: die_and_live(play, deaths)) == Ending("Paid", "Paid", channels)
