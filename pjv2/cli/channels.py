"""`pjv2 channels [list|abandon ID]`: the channels of our sessions, as the Lightning node has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pjv2.cli.command import Cli
from pjv2.errors import NotNow, WrongUsage

if TYPE_CHECKING:
    from pjv2.app import Payjoin
    from pjv2.ports import Channels, SessionRow
    from pjv2.session import Receiver
    from pjv2.session.facts import NodeChannel

TAG = "pj:"
"""What the memo of a channel begins with that a session of ours opened."""


async def run(
    cli: Cli,
    action: Annotated[
        Literal["list", "abandon"], typer.Argument(metavar="[list|abandon]", help="What to do; default: list.")
    ] = "list",
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="With abandon: the session, by the beginning of its id.")
    ] = None,
) -> None:
    """List channels by session, or abandon those of a session whose transaction is proved dead."""
    if (action == "abandon") is (id is None):
        raise WrongUsage("write pjv2 channels, pjv2 channels list, or pjv2 channels abandon ID")
    async with cli.payjoin() as pj:
        node = pj.driver.channels
        if node is None:
            raise WrongUsage("there is no Lightning node whose channels could be listed: configure [lightning]")
        if id is None:
            await _list(cli, pj, node)
        else:
            await _abandon(cli, pj, node, id)


async def _list(cli: Cli, pj: Payjoin, node: Channels) -> None:
    from pjv2.cli.output import plain, table

    rows = {row.session: row for row in await pj.driver.store.rows()}
    ours = [channel for channel in await node.channels() if channel.memo.startswith(TAG)]
    if cli.json:
        for channel in ours:
            cli.out.result("Channel", **_facts(channel, rows))
        return
    if not ours:
        cli.out.say("The node has no channel of a session.")
        return
    drawn = table("session", "sats", "state", "outpoint", "peer", "session is")
    for channel in ours:
        row = rows.get(channel.memo.removeprefix(TAG))
        stands = "unknown here" if row is None else (row.outcome or row.state)
        where = "" if channel.outpoint is None else str(channel.outpoint)
        id = channel.memo.removeprefix(TAG)[:8]
        drawn.add_row(plain(id), f"{channel.capacity:_}", channel.state, where, f"{channel.peer[:16]}…", stands)
    cli.out.show(drawn)


def _facts(channel: NodeChannel, rows: dict[str, SessionRow]) -> dict[str, Any]:
    session = channel.memo.removeprefix(TAG)
    row = rows.get(session)
    return {
        "session": session,
        "peer": channel.peer,
        "capacity": channel.capacity,
        "state": channel.state,
        "outpoint": channel.outpoint,
        "session_state": None if row is None else row.state,
        "outcome": None if row is None else row.outcome,
    }


async def _abandon(cli: Cli, pj: Payjoin, node: Channels, beginning: str) -> None:
    """The session's own release comes first; what it leaves behind is abandoned only with the same proof."""
    from pjv2 import session as model
    from pjv2.cli.progress import choose

    driver = pj.driver
    session = await choose(pj, beginning)
    state = await driver.load(session)
    if not isinstance(state, model.Receiver):
        raise WrongUsage(f"session {session[:8]} is a payment: it has no channel")
    pending = [one for one in await node.channels(state.memo) if one.state == "pending" and one.outpoint is not None]
    if not pending:
        raise WrongUsage(f"the node lists no pending channel of session {session[:8]}: there is nothing to abandon")
    dead = await _proved_dead(pj, state, pending)
    if len(dead) < len(pending):
        raise WrongUsage(
            f"{len(pending) - len(dead)} of {len(pending)} pending channels of session {session[:8]} are not proved dead: a channel is "
            "abandoned only when an input of its transaction is six blocks deep in another one, for until then the payment may arrive in it"
        )
    # Recorded first, in the order that keeps money: the session itself releases what its log knows.
    await driver.drive(session, once=True, deadline=driver.clock.now() + 20)
    left = {one.outpoint for one in await node.channels(state.memo) if one.state == "pending"}
    closed = (await driver.load(session)).closed is not None
    for channel in dead:
        if channel.outpoint in left and channel.outpoint is not None:
            if not closed:
                raise NotNow(
                    f"session {session[:8]} is still releasing its channels; {cli.words('run')} finishes that", after=30
                )
            await node.abandon(channel.outpoint)
        rows = {row.session: row for row in (await driver.store.row(session),)}
        facts = _facts(channel, rows) | {"state": "abandoned"}
        cli.out.result("Channel", f"abandoned {channel.outpoint} ({channel.capacity:_} sat)", **facts)


async def _proved_dead(pj: Payjoin, state: Receiver, pending: Sequence[NodeChannel]) -> list[NodeChannel]:
    """Those whose transaction cannot confirm any more: an input of it is buried in another (every proposal spends the Original's)."""
    from pjv2.session.monitor import read_view

    watch = state.stakes.watch()
    view = await pj.driver.chain.view(watch.txids, watch.outpoints, watch.scripts, watch.since)
    seen = read_view(state.stakes, view)
    drafts = {draft.txid: draft for draft in state.drafts}
    dead = []
    for channel in pending:
        txid = channel.outpoint.txid if channel.outpoint is not None else ""
        draft = drafts.get(txid)
        known = draft is not None and seen.dead(draft)
        if known or (draft is None and seen.burial is not None and seen.burial.txid != txid):
            dead.append(channel)
    return dead
