"""What the commands that move money say and when they end, without a world."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pjv2.cli.amounts import parse_amount
from pjv2.cli.command import Cli, Until
from pjv2.cli.progress import EXIT_CODES, Waiting, depth, payment_in_sight, reached, waiting_for
from pjv2.errors import WrongUsage
from pjv2.qr import draw
from pjv2.session import events as ev
from pjv2.session.events import Outcome, Policy
from pjv2.session.monitor import Sighting
from pjv2.session.receive import Receiver
from pjv2.session.receive import Stage as R
from pjv2.session.send import Sender
from pjv2.session.send import Stage as S

TXID = "ab" * 32


@pytest.mark.parametrize(
    ("text", "sats"),
    [
        ("100_000", 100_000),
        ("1", 1),
        (" 42 ", 42),
        ("7sat", 7),
        ("7 sats", 7),
        ("0.001btc", 100_000),
        (".5BTC", 50_000_000),
        ("21btc", 2_100_000_000),
        ("0.00000001 btc", 1),
        ("21000000btc", 2_100_000_000_000_000),
    ],
)
def test_an_amount_is_in_satoshis_or_in_bitcoin_with_the_unit(text: str, sats: int) -> None:
    assert parse_amount(text) == sats


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "0.001", "1e5", "1,000", "_1", "0btc", "0.000000001btc", "21000001btc", "btc", "١", "1 2", "1.btc"],
)
def test_an_amount_that_is_not_exact_is_refused(text: str) -> None:
    with pytest.raises(WrongUsage, match="is not an amount"):
        parse_amount(text)


def test_every_outcome_has_its_exit_code() -> None:
    assert EXIT_CODES == {
        Outcome.PAID: 0,
        Outcome.PAID_BY_FALLBACK: 0,
        Outcome.PAID_OTHERWISE: 0,
        Outcome.CANCELLED: 0,
        Outcome.REFUSED: 3,
        Outcome.CONFLICTED: 3,
        Outcome.EXPIRED: 5,
    }
    assert set(EXIT_CODES) == set(Outcome)


# ---------------------------------------------------------------- how far it came


def state(role: type[Any] = Receiver, *sightings: Sighting, policy: Policy | None = None, **more: Any) -> Any:
    created = SimpleNamespace(policy=policy or Policy(), expires=1_000, session="aa" * 16, plan=None)
    told = {"stage": R.INITIALIZED if role is Receiver else S.CREATED, "sightings": sightings} | more
    # A created event needs keys and transactions that no rule here looks at.
    made = object.__new__(role)
    for name, field in role.__dataclass_fields__.items():
        value = told.get(name, created if name == "created" else None)
        if value is None and name not in told and field.default is not None and name != "created":
            value = field.default
        object.__setattr__(made, name, value)
    return made


def seen(what: Any, height: int | None = None) -> Sighting:
    return Sighting(TXID, what, height, 1, 0.0)


def closed() -> ev.Closed:
    return ev.Closed(0.0, Outcome.EXPIRED, None, 1, 0)


@pytest.mark.parametrize("role", [Receiver, Sender])
def test_seen_confirmed_and_closed_are_three_distances(role: type[Any]) -> None:
    nothing, pending, confirmed = state(role), state(role, seen("payjoin")), state(role, seen("payjoin", 100))
    ended = state(role, closed=closed())
    assert [reached(one, Until.SEEN, 100) for one in (nothing, pending, confirmed, ended)] == [False, True, True, True]
    assert [reached(one, Until.CONFIRMED, 100) for one in (nothing, pending, confirmed, ended)] == [
        False,
        False,
        True,
        True,
    ]
    assert [reached(one, Until.CLOSED, 105) for one in (nothing, pending, confirmed, ended)] == [False] * 3 + [True]


def test_confirmed_counts_blocks_as_the_policy_says_and_an_old_tip_as_one() -> None:
    twice = state(Receiver, seen("payjoin", 100), policy=Policy(confirmations=2))
    assert [reached(twice, Until.CONFIRMED, tip) for tip in (0, 100, 101)] == [False, False, True]
    assert [depth(seen("payjoin", 100), tip) for tip in (0, 100, 105)] == [1, 1, 6]
    assert depth(seen("payjoin"), 100) == 0


@pytest.mark.parametrize(
    ("role", "what", "more", "pays"),
    [
        (Receiver, "payjoin", {}, True),
        (Receiver, "original", {}, True),
        (Receiver, "bumped", {}, True),
        (Receiver, "address", {}, True),
        (Receiver, "address", {"accepted": object()}, False),
        (Receiver, "conflict", {}, False),
        (Receiver, "way_out", {}, False),
        (Sender, "payjoin", {}, True),
        (Sender, "original", {}, True),
        (Sender, "conflict", {}, False),
        (Sender, "reclaim", {}, False),
    ],
)
def test_only_what_pays_counts_as_seen(role: type[Any], what: str, more: dict[str, Any], pays: bool) -> None:
    assert reached(state(role, seen(what), **more), Until.SEEN, 0) is pays


def test_a_confirmed_payment_comes_before_one_in_the_mempool() -> None:
    both = state(Receiver, seen("original"), replace(seen("payjoin", 9), txid="cd" * 32))
    found = payment_in_sight(both)
    assert found is not None
    assert found.what == "payjoin"


# ---------------------------------------------------------------- in words


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (state(), "waiting for the payer, until 1970-01-01 00:16 UTC; then the request expires"),
        (state(expired=True), "expired: looking into the mailbox once more"),
        (state(stage=R.MONITOR), "waiting for the payer to sign, until 1970-01-01 00:26 UTC; then his Original is broadcast"),
        (state(stage=R.MONITOR, fallback_broadcasting=True), "waiting for the network to take the Original"),
        (state(stage=R.RESERVING_CHANNELS), "asking the channel peers"),
        (
            state(stage=R.CHECKED_ORIGINAL, policy=Policy(approve="ask")),
            "waiting for your approval (pjv2 approve aaaaaaaa or pjv2 refuse aaaaaaaa), until 1970-01-01 00:16 UTC; "
            "then the Original is broadcast",
        ),
        (state(Receiver, seen("payjoin")), "the payjoin is in the mempool: waiting for a block"),
        (state(Receiver, seen("original", 98)), "the Original has 3 of 6 confirmations"),
        (state(Sender, stage=S.POLLING_FOR_PROPOSAL), "waiting for a proposal, until 1970-01-01 00:16 UTC; then the Original pays"),
        (
            state(Sender, stage=S.POLLING_FOR_PROPOSAL, policy=Policy(require_payjoin=True)),
            "waiting for a proposal, until 1970-01-01 00:16 UTC",
        ),
        (
            state(Sender, stage=S.PENDING_FALLBACK, no_broadcast=True),
            "there is no payjoin; the coins stay leased until the receiver broadcasts the Original, or you",
        ),
        (state(Sender, stage=S.PENDING_FALLBACK), "waiting for the Original to be buried"),
        (state(closed=closed()), "ended: Expired"),
    ],
)  # fmt: skip
def test_what_is_waited_for_is_said_and_until_when(told: Any, says: str) -> None:
    assert str(waiting_for(told, 100)) == says


def test_what_has_no_end_names_none() -> None:
    assert str(Waiting("waiting", None, "something")) == "waiting"


def test_a_command_is_named_as_it_was_typed(tmp_path: Any) -> None:
    assert Cli().words("resume", "aa") == "pjv2 resume aa"
    assert Cli(config_path=tmp_path / "my file").words("run") == f"pjv2 --config '{tmp_path / 'my file'}' run"


@pytest.mark.parametrize("length", [1, 100, 400, 900])
def test_a_qr_code_is_square_with_its_quiet_zone(length: int) -> None:
    rows = draw("A" * length).splitlines()
    width = {len(row) for row in rows}
    assert len(width) == 1
    assert len(rows) == (width.pop() + 1) // 2
    assert set(rows[0]) == {"█"}
