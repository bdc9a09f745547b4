"""`history`, `show` and `explain`: looking at stored sessions, beside whoever works on them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pjv2 import session
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.system import SystemEntropy
from pjv2.ports import Change, Record, SessionRow
from pjv2.session import events as ev
from pjv2.units import Network
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey
from tests.unit.cli.conftest import Call, lines

ONE, TWO, THREE = "aa11" + "0" * 28, "aa22" + "0" * 28, "bb33" + "0" * 28
ROW = SessionRow(
    session=ONE,
    role="receiver",
    state="Monitor",
    outcome=None,
    created=1_700_000_000.0,
    expires=1_700_086_400.0,
    next_due=1_700_000_030.0,
    label="a coffee",
    order="order-1",
    amount=100_000,
)
ROWS = (
    ROW,
    replace(ROW, session=TWO, state="Closed", outcome="Paid", created=1_700_000_100.0, next_due=None, label=None, order=None),
    replace(ROW, session=THREE, role="sender", created=1_700_000_200.0, label="[red]\x1b[2Jme", order=None, amount=None),
)  # fmt: skip


def stored(database: Path, *changes: Change) -> None:
    async def store() -> None:
        async with await SqlStore.open(f"sqlite:///{database}") as open_store:
            for change in changes:
                await open_store.create(change)

    asyncio.run(store())


def rows_only(database: Path) -> None:
    """Sessions whose events nobody replays."""
    stored(database, *(Change(row, 0, (Record(0, row.created, "Unknown", "{}"),)) for row in ROWS))


# ---------------------------------------------------------------- history


def test_before_the_first_session_there_is_no_history_and_no_database_is_made(pjv2: Call, database: Path) -> None:
    assert pjv2("history") == (0, "", "No session yet.\n")
    assert pjv2("--json", "history") == (0, "", "")
    assert pjv2("show", "aa")[0] == 2
    assert not database.parent.exists()


def test_history_lists_the_newest_session_first(pjv2: Call, database: Path) -> None:
    rows_only(database)
    code, stdout, stderr = pjv2("history")
    assert (code, stderr) == (0, "")
    head, *rest = stdout.splitlines()
    assert head.split() == ["id", "created", "(UTC)", "role", "sats", "state", "outcome", "label"]
    assert [line.split()[0] for line in rest] == [THREE[:8], TWO[:8], ONE[:8]]
    assert rest[2].split() == ["aa110000", "2023-11-14", "22:13", "receiver", "100_000", "Monitor", "a", "coffee"]


def test_what_somebody_wrote_into_a_label_cannot_steer_the_terminal(pjv2: Call, database: Path) -> None:
    rows_only(database)
    stdout = pjv2("history")[1]
    assert "\x1b" not in stdout
    assert "[red]" in stdout


def test_history_as_json_is_one_session_per_line_with_public_facts_only(pjv2: Call, database: Path) -> None:
    rows_only(database)
    code, stdout, stderr = pjv2("history", "--json")
    assert (code, stderr) == (0, "")
    found = lines(stdout)
    assert [line["session"] for line in found] == [THREE, TWO, ONE]
    assert all(line["event"] == "Session" and line.pop("at").endswith("Z") for line in found)
    assert found[2] == {
        "event": "Session",
        "session": ONE,
        "role": "receiver",
        "state": "Monitor",
        "outcome": None,
        "created": 1_700_000_000.0,
        "expires": 1_700_086_400.0,
        "next_due": 1_700_000_030.0,
        "amount_requested": 100_000,
        "label": "a coffee",
        "note": None,
        "order": "order-1",
    }


def test_closed_sessions_can_be_left_out(pjv2: Call, database: Path) -> None:
    rows_only(database)
    assert [line["session"] for line in lines(pjv2("--json", "history", "--open")[1])] == [THREE, ONE]


def test_ids_grow_until_they_name_one_session(pjv2: Call, database: Path) -> None:
    twins = [replace(ROW, session="ab" * 6 + digit + "0" * 19, order=None) for digit in "12"]
    stored(database, *(Change(row, 0, (Record(0, row.created, "Unknown", "{}"),)) for row in twins))
    ids = {line.split()[0] for line in pjv2("history")[1].splitlines()[1:]}
    assert ids == {"ab" * 6 + "1", "ab" * 6 + "2"}


async def test_history_is_told_beside_a_worker_that_writes(pjv2: Call, database: Path) -> None:
    await asyncio.to_thread(rows_only, database)
    async with await SqlStore.open(f"sqlite:///{database}") as worker:
        stop = asyncio.Event()

        async def work() -> int:
            count = 0
            while not stop.is_set():
                assert await worker.claim(ONE, "worker", 60)
                count += 1
            return count

        working = asyncio.create_task(work())
        for _ in range(3):
            code, stdout, _ = await asyncio.to_thread(pjv2, "--json", "history")
            assert (code, len(lines(stdout))) == (0, 3)
        stop.set()
        assert await working > 0
        assert not await worker.claim(ONE, "another", 1), "looking must not touch a claim"


# ---------------------------------------------------------------- one session


@pytest.mark.parametrize("command", ["show", "explain"])
@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("nonsense", "is no session id"),
        ("a" * 33, "is no session id"),
        ("", "is no session id"),
        ("cc", "no session begins with cc"),
        ("AA", f"2 sessions begin with aa: {TWO}, {ONE}"),
    ],
)
def test_an_id_that_names_no_session_or_several_is_wrong_usage(
    pjv2: Call, database: Path, command: str, id: str, says: str
) -> None:
    rows_only(database)
    code, stdout, stderr = pjv2(command, id)
    assert (code, stdout) == (2, "")
    assert says in stderr


@pytest.mark.parametrize("command", [["history"], ["show", "aa11"], ["explain", "aa11"]])
def test_a_database_that_is_damaged_is_left_alone_and_told_by_its_exit_code(
    pjv2: Call, database: Path, command: list[str]
) -> None:
    database.parent.mkdir(mode=0o700)
    database.write_bytes(b"this is no database, whatever its name says" * 100)
    database.chmod(0o600)
    before = database.read_bytes()
    code, stdout, stderr = pjv2(*command)
    assert (code, stdout) == (6, "")
    assert "Traceback" not in stderr
    assert database.read_bytes() == before


def request(database: Path) -> ev.ReceiverCreated:
    """A request that nobody paid: made, expired, closed."""
    created = session.create_receiver(
        1_700_000_000.0,
        SystemEntropy(),
        session=ONE,
        network=Network.REGTEST,
        genesis=Network.REGTEST.genesis_hash,
        wallet="a wallet",
        node=None,
        address="bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080",
        script=bytes.fromhex("0014751e76e8199196d454941c45d1b3a323f1433bd6"),
        address_index=0,
        amount=100_000,
        directory="https://directory.example",
        keys=KeyConfig(1, SecretKey.generate(SystemEntropy()).public),
        expires=1_700_086_400,
        height=100,
        label="a coffee",
        note="table 4",
    )
    log: list[ev.Event] = [
        created,
        ev.ExpiryPassed(1_700_086_401.0),
        ev.Alarm(1_700_086_402.0, what="clock", detail="\x1b[2J[red]look[/red]"),
        ev.Closed(1_700_090_000.0, ev.Outcome.EXPIRED, None, 100_000, 0),
    ]
    records = tuple(
        Record(seq, event.at, session.event_name(event), session.encode(event)) for seq, event in enumerate(log)
    )
    row = replace(ROW, state="Closed", outcome="Expired", note="table 4", next_due=None)
    stored(database, Change(row, 0, records))
    return created


SECRET_FIELDS = ("receiver_key", "keys", "script", "genesis", "wallet")


def nothing_secret(text: str, created: ev.ReceiverCreated) -> None:
    for name in SECRET_FIELDS:
        value = getattr(created, name)
        assert (value.hex() if isinstance(value, bytes) else value) not in text, name
    for hidden in (created.address, session.payment_uri(session.evolve(None, created)), created.directory):  # type: ignore[arg-type]  # a receiver
        assert hidden not in text


def test_show_tells_what_is_public_about_one_session(pjv2: Call, database: Path) -> None:
    created = request(database)
    code, stdout, stderr = pjv2("show", "aa11")
    assert (code, stderr) == (0, "")
    told = {line[:18].strip(): line[18:].strip() for line in stdout.splitlines()}
    assert told["session"] == ONE
    assert told["status"] == "ended: Expired"
    assert told["expires"] == "2023-11-15T22:13:20.000Z"
    assert told["amount requested"] == "100_000"
    assert told["note"] == "table 4"
    nothing_secret(stdout, created)


def test_show_as_json_is_one_line_named_like_those_of_history(pjv2: Call, database: Path) -> None:
    created = request(database)
    code, stdout, stderr = pjv2("--json", "show", ONE)
    assert (code, stderr) == (0, "")
    (line,) = lines(stdout)
    assert (line["event"], line["session"], line["role"], line["outcome"]) == ("Session", ONE, "receiver", "Expired")
    (listed,) = lines(pjv2("--json", "history")[1])
    del listed["at"]
    assert listed.items() <= (line | {"order": "order-1"}).items()
    nothing_secret(stdout, created)


def test_explain_tells_the_log_as_prose_and_the_place_on_the_diagram(pjv2: Call, database: Path) -> None:
    created = request(database)
    code, stdout, stderr = pjv2("explain", "aa11")
    assert (code, stderr) == (0, "")
    told = stdout.splitlines()
    assert told[0] == "2023-11-14T22:13:20.000Z  The request was made."
    assert told[1].startswith("2023-11-15T22:13:21.000Z  The request expired")
    assert "[red]look[/red]" in told[2]
    assert told[3].startswith("2023-11-15T23:13:20.000Z  The session ended: Expired")
    assert "States: Initialized -> Closed" in told
    assert any(line.startswith("Now: Closed") for line in told)
    assert "\x1b" not in stdout
    nothing_secret(stdout, created)


def test_explain_as_json_holds_the_prose_and_the_states(pjv2: Call, database: Path) -> None:
    request(database)
    (line,) = lines(pjv2("explain", "aa", "--json")[1])
    assert (line["event"], line["session"]) == ("Session", ONE)
    assert line["states"] == ["Initialized", "Closed"]
    assert line["explanation"][0] == "The request was made."


@pytest.mark.parametrize("command", ["show", "explain"])
def test_a_log_that_this_version_does_not_understand_is_told_by_its_exit_code(
    pjv2: Call, database: Path, command: str
) -> None:
    rows_only(database)
    code, stdout, _ = pjv2(command, "bb")
    assert (code, stdout) == (6, "")


def test_a_database_that_others_can_read_is_refused(pjv2: Call, database: Path) -> None:
    rows_only(database)
    database.chmod(0o644)
    code, _, stderr = pjv2("history")
    assert code == 2
    assert "chmod 600" in stderr
