"""Commands to a session that is under way: cancel, approve, refuse."""

from __future__ import annotations

from tests.story.lab.kit import stage
from tests.story.shell.kit import Shell, code

ASK = {"policy": {"approve": "ask"}}


async def test_a_proposal_that_waits_for_approval_leaves_when_a_person_agrees() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob(), ASK), Shell(await s.alice())
        receiving = bob.start("receive", "150_000", "--until", "closed")
        await receiving.until(lambda running: "\n" in running.stdout)
        sending = alice.start("--json", "send", receiving.stdout.split("\n")[0], "--until", "closed")
        await receiving.says("waiting for your approval")
        (row,) = await bob.party.store.rows()
        agreed = await bob("--json", "approve", row.session[:8])
        assert (code(agreed), agreed.events[0]) == (0, "Approved")
        await sending.line("Seen", what="payjoin")
        await receiving.says("in the mempool")
        again = await bob("approve", row.session[:8])
        assert code(again) == 2
        await s.bury(6)
        assert (await receiving.code(), await sending.code()) == (0, 0)
        assert "Paid: " in receiving.stdout


async def test_a_refused_proposal_is_paid_by_the_original() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob(), ASK), Shell(await s.alice())
        receiving = bob.start("--json", "receive", "150_000", "--until", "closed")
        created = await receiving.line("Created")
        sending = alice.start("--json", "send", created["uri"], "--until", "closed")
        await receiving.line("OriginalAccepted")
        refused = await bob("--json", "refuse", created["session"])
        assert code(refused) == 0
        assert refused.events[0] == "RefusalPosting"
        await sending.line("Seen", what="original")
        await receiving.line("Seen", what="original")
        await s.bury(6)
        assert (await receiving.code(), await sending.code()) == (0, 0)
        assert receiving.lines[-1]["outcome"] == "PaidByFallback"
        assert sending.lines[-1]["payjoin"] is False


async def test_cancelling_a_payment_before_its_original_left_gives_the_coins_back() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob()), Shell(await s.alice())
        made = await bob("--json", "receive", "150_000", "--detach")
        sent = await alice("--json", "send", made.lines[0]["uri"], "--detach")
        stopped = await alice("--json", "cancel", sent.lines[0]["session"], "--reclaim", "5")
        assert code(stopped) == 0
        assert (stopped.events[0], stopped.lines[-1]["outcome"]) == ("CancelRequested", "Cancelled")
        assert not alice.party.wallet.locked()
        ended = await alice("cancel", sent.lines[0]["session"])
        assert code(ended) == 2
        assert "has ended" in ended.stderr
        assert code(await bob("cancel", made.lines[0]["session"])) == 0


async def test_after_its_original_left_a_cancelled_payment_is_paid_or_reclaimed() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob()), Shell(await s.alice())
        made = await bob("--json", "receive", "150_000", "--detach")
        sending = alice.start("--json", "send", made.lines[0]["uri"], "--until", "closed")
        session = (await sending.line("Created"))["session"]
        await sending.line("OriginalPosted")
        sending.interrupt()
        assert await sending.code() == 130
        kept = await alice("cancel", session, "--no-broadcast")
        assert code(kept) == 0
        assert "paying again may pay twice" in kept.stderr
        bad = await alice("cancel", session, "--reclaim", "much")
        assert code(bad) == 2
        back = await alice("--json", "cancel", session, "--reclaim", "20")
        assert code(back) == 0
        assert back.events[:2] == ["ReclaimRequested", "ReclaimBroadcasting"] or "ReclaimBroadcasting" in back.events
        await s.bury(6)
        assert (await alice("--json", "resume")).events[-2:] == ["Closed", "PassDone"]
        row = await alice.party.store.row(session)
        assert row.outcome == "Cancelled"
        wrong = await bob("cancel", made.lines[0]["session"], "--reclaim", "5")
        assert code(wrong) == 2
        assert code(await bob("cancel", made.lines[0]["session"])) == 0
