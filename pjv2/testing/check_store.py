"""The contract of a store, as named checks that run over every implementation of `pjv2.ports.Store`.

A check gets a fresh, empty store and a second handle on the same data (another process's view; the same object where an
implementation has only one handle). It says what is wrong by raising `AssertionError`. Run all with `check_store(make)`, or one test
per check over `STORE_CHECKS`.

Law: a check uses only what the protocol promises; it waits for nothing but the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeAlias

from pjv2.errors import OurMistake, PayjoinError, WrongUsage
from pjv2.ports import (
    Appended,
    Change,
    CoinTakenBy,
    InputsSeenBy,
    LostRace,
    PeerTakenBy,
    Record,
    SessionRow,
    Store,
    Stored,
)
from pjv2.units import Outpoint, SessionId

StoreCheck: TypeAlias = Callable[[Store, Store], Awaitable[None]]
"""A check: a fresh store, and a second handle on the same data."""

MakeStore: TypeAlias = Callable[[], AbstractAsyncContextManager[tuple[Store, Store]]]
"""Makes a fresh store with a second handle, and closes both."""

_A = "a" * 32
_B = "b" * 32
_C = "c" * 32
_COIN = Outpoint("11" * 32, 0)
_COIN_2 = Outpoint("11" * 32, 1)
_COIN_3 = Outpoint("22" * 32, 0)
_PEER = "02" + "33" * 32
_PEER_2 = "03" + "44" * 32


async def check_store(make: MakeStore) -> None:
    """Run the whole contract, each check over a fresh store. Raises AssertionError naming the check that failed."""
    for check in STORE_CHECKS:
        async with make() as (store, other):
            try:
                await check(store, other)
            except AssertionError as exc:
                raise AssertionError(f"{check.__name__.replace('_', ' ')}: {exc}") from exc


def example_row(session: SessionId = _A, **changes: object) -> SessionRow:
    """A session's row for tests, with `changes` to its fields."""
    row = SessionRow(
        session=session,
        role="receiver",
        state="Initialized",
        outcome=None,
        created=1_700_000_000.25,
        expires=1_700_086_400.5,
        next_due=1_700_000_005.125,
    )
    return replace(row, **changes)  # type: ignore[arg-type]  # tests name fields; dataclasses refuse unknown ones


def example_change(
    session: SessionId = _A, seq: int = 0, events: int = 1, *, row: SessionRow | None = None, **changes: object
) -> Change:
    """A change for tests with `events` events from `seq` on."""
    records = tuple(
        Record(number, 1_700_000_000.0 + number, f"Event{number}", f'{{"number": {number}}}')
        for number in range(seq, seq + events)
    )
    change = Change(row=row or example_row(session), seq=seq, records=records)
    return replace(change, **changes)  # type: ignore[arg-type]  # tests name fields; dataclasses refuse unknown ones


# ---------------------------------------------------------------- events and rows


async def what_is_stored_is_read_back_equal(store: Store, other: Store) -> None:
    full = example_row(
        state="Monitor",
        outcome="Paid",
        next_due=None,
        label="café ☕",
        note="a 'quoted' \"note\"; -- DROP",
        order="2024/17",
        amount=2_100_000_000_000_000,
        uri_id="ab" * 32,
        created=1_700_000_000.123456,
    )
    change = replace(example_change(events=3, row=full), records=(Record(0, 0.1, "Created", '{"k": "é\\u0000\\n"}'),))
    _same(await store.create(change), Stored())
    for handle in (store, other):
        _same(await handle.load(_A), change.records)
        _same(await handle.row(_A), full)
        _same(await handle.rows(), (full,))


async def events_are_appended_in_order_and_the_row_follows(store: Store, other: Store) -> None:
    first, second = (
        example_change(events=2),
        example_change(seq=2, events=3, row=example_row(state="Monitor", next_due=None)),
    )
    _same(await store.create(first), Stored())
    _same(await other.append(second), Stored())
    _same(await store.load(_A), first.records + second.records)
    _same((await store.row(_A)).state, "Monitor")


async def an_append_may_change_the_row_alone(store: Store, other: Store) -> None:
    await store.create(example_change())
    later = example_row(next_due=1_800_000_000.0)
    _same(await store.append(example_change(seq=1, events=0, row=later)), Stored())
    _same(await other.row(_A), later)
    _same(len(await other.load(_A)), 1)


async def an_append_at_the_wrong_seq_lost_the_race_and_stores_nothing(store: Store, other: Store) -> None:
    await store.create(example_change(events=2))
    for seq in (0, 1, 3, 9):
        change = example_change(
            seq=seq,
            row=example_row(state="Monitor"),
            take_coins=(_COIN,),
            see_inputs=(_COIN_2,),
            take_peers=(_PEER,),
            block_peers=((_PEER, 5),),
        )
        _same(await other.append(change), LostRace())
    _same(len(await store.load(_A)), 2)
    _same(await store.row(_A), example_row())
    await _holds_nothing(store)
    await _inputs_are_unseen(store, (_COIN_2,))


async def a_session_is_created_once(store: Store, other: Store) -> None:
    change = example_change(row=example_row(order="one", uri_id="aa"))
    _same(await store.create(change), Stored())
    _same(await other.create(change), LostRace())
    _same(await other.create(example_change(events=2)), LostRace())
    _same(await store.load(_A), change.records)


async def an_unknown_session_is_wrong_usage(store: Store, other: Store) -> None:
    await store.create(example_change(_B))
    for call in (
        store.load(_A),
        store.row(_A),
        store.append(example_change(seq=0)),
        store.append(example_change(seq=1)),
    ):
        await _raises(WrongUsage, call)
    _same(len(await other.rows()), 1)


async def a_change_that_breaks_the_contract_is_refused_whole(store: Store, other: Store) -> None:
    await store.create(example_change())
    good = example_change(seq=1, events=2)
    for bad in (
        replace(good, records=good.records[::-1]),
        replace(good, records=(good.records[0], good.records[0])),
        replace(good, row=example_row(next_due=float("nan"))),
        replace(good, row=example_row(expires=float("inf"))),
        replace(good, row=example_row(label="nul \0")),
        replace(good, row=example_row(note="half a surrogate \ud800")),
        replace(good, row=example_row(amount=2**63)),
        replace(good, records=(replace(good.records[0], data="nul \0"),)),
        replace(good, block_peers=((_PEER, -1),)),
    ):
        await _raises(OurMistake, store.append(bad))
    await _raises(OurMistake, store.create(example_change(_B, seq=1)))
    await _raises(OurMistake, store.create(example_change(_B, events=0)))
    _same(await other.row(_A), example_row())
    _same(len(await other.load(_A)), 1)
    _same(len(await other.rows()), 1)


async def rows_come_newest_first_and_open_ones_alone_on_request(store: Store, other: Store) -> None:
    await store.create(example_change(_A, row=example_row(_A, created=20.0)))
    await store.create(example_change(_B, row=example_row(_B, created=30.0, outcome="Paid")))
    await store.create(example_change(_C, row=example_row(_C, created=20.0)))
    _same([row.session for row in await other.rows()], [_B, _C, _A])
    _same([row.session for row in await other.rows(open_only=True)], [_C, _A])
    await store.append(example_change(_A, 1, row=example_row(_A, outcome="Expired", next_due=None)))
    _same([row.session for row in await other.rows(open_only=True)], [_C])


# ---------------------------------------------------------------- orders and receiver keys


async def an_order_belongs_to_one_session(store: Store, other: Store) -> None:
    await store.create(example_change(_A, row=example_row(_A, order="2024/17", outcome="Expired")))
    await _raises(WrongUsage, other.create(example_change(_B, row=example_row(_B, order="2024/17"))), naming=_A)
    _same(await store.find(order="2024/17"), example_row(_A, order="2024/17", outcome="Expired"))
    _same(await store.find(order="2024/18"), None)
    _same(len(await store.rows()), 1)
    _same(await store.create(example_change(_B, row=example_row(_B))), Stored())
    await _raises(WrongUsage, other.append(example_change(_B, 1, row=example_row(_B, order="2024/17"))), naming=_A)
    _same(len(await store.load(_B)), 1)


async def a_receiver_key_is_paid_once(store: Store, other: Store) -> None:
    await store.create(example_change(_A, row=example_row(_A, uri_id="ab" * 32)))
    await _raises(WrongUsage, other.create(example_change(_B, row=example_row(_B, uri_id="ab" * 32))), naming=_A)
    _same(len(await store.rows()), 1)
    found = await other.find(uri_id="ab" * 32)
    _same(None if found is None else found.session, _A)
    _same(await other.find(uri_id="cd" * 32), None)
    _same(await other.find(order="none", uri_id="ab" * 32), None)
    await _raises(OurMistake, other.find())


async def a_reopened_session_gives_its_receiver_key_away(store: Store, other: Store) -> None:
    await store.create(example_change(_A, row=example_row(_A, uri_id="ab" * 32)))
    await store.append(example_change(_A, 1, row=example_row(_A, uri_id=None)))
    _same(await other.create(example_change(_B, row=example_row(_B, uri_id="ab" * 32))), Stored())


async def of_two_sessions_racing_for_one_order_one_is_stored(store: Store, other: Store) -> None:
    for number in range(5):
        first = example_change(f"{2 * number:032x}", row=example_row(f"{2 * number:032x}", order=f"o{number}"))
        second = example_change(f"{2 * number + 1:032x}", row=example_row(f"{2 * number + 1:032x}", order=f"o{number}"))
        answers = await asyncio.gather(store.create(first), other.create(second), return_exceptions=True)
        _same(sum(answer == Stored() for answer in answers), 1)
        _same(sum(isinstance(answer, WrongUsage) for answer in answers), 1)
        _same(len(await store.rows()), number + 1)


# ---------------------------------------------------------------- inputs, coins, peers


async def an_input_is_seen_by_one_session_for_ever(store: Store, other: Store) -> None:
    await store.create(example_change(_A, see_inputs=(_COIN, _COIN_2)))
    _same(await other.create(example_change(_B, see_inputs=(_COIN_3, _COIN_2))), InputsSeenBy(_A, _COIN_2))
    _same([row.session for row in await store.rows()], [_A])
    closed = example_row(_A, outcome="Expired", next_due=None)
    await store.append(example_change(_A, 1, row=closed, free_coins=True, free_peers=True))
    _same(await other.create(example_change(_B, see_inputs=(_COIN,))), InputsSeenBy(_A, _COIN))
    _same(await other.create(example_change(_B, see_inputs=(_COIN_3,))), Stored())


async def a_session_may_see_its_inputs_again(store: Store, other: Store) -> None:
    await store.create(example_change(_A, see_inputs=(_COIN,)))
    _same(await other.append(example_change(_A, 1, see_inputs=(_COIN, _COIN_2, _COIN))), Stored())
    _same(await store.create(example_change(_B, see_inputs=(_COIN_2,))), InputsSeenBy(_A, _COIN_2))


async def a_coin_is_in_use_by_one_session_until_it_frees_it(store: Store, other: Store) -> None:
    await store.create(example_change(_A, take_coins=(_COIN, _COIN_2)))
    _same(await other.append(example_change(_A, 1, take_coins=(_COIN,))), Stored())
    _same(await other.create(example_change(_B, take_coins=(_COIN_3, _COIN))), CoinTakenBy(_A, _COIN))
    _same(dict(await other.coins_in_use()), {_COIN: _A, _COIN_2: _A})
    _same(await other.create(example_change(_B, take_coins=(_COIN_3,))), Stored())
    await store.append(example_change(_A, 2, free_coins=True))
    _same(dict(await other.coins_in_use()), {_COIN_3: _B})
    _same(await other.append(example_change(_B, 1, take_coins=(_COIN,))), Stored())


async def a_peer_is_in_use_by_one_session_until_it_frees_it(store: Store, other: Store) -> None:
    await store.create(example_change(_A, take_peers=(_PEER,)))
    _same(await other.append(example_change(_A, 1, take_peers=(_PEER, _PEER_2))), Stored())
    _same(await other.create(example_change(_B, take_peers=(_PEER_2,))), PeerTakenBy(_A, _PEER_2))
    _same(dict(await other.peers_in_use()), {_PEER: _A, _PEER_2: _A})
    await store.append(example_change(_A, 2, free_peers=True))
    _same(dict(await other.peers_in_use()), {})
    _same(await other.create(example_change(_B, take_peers=(_PEER_2,))), Stored())


async def one_change_frees_the_old_before_it_takes_the_new(store: Store, other: Store) -> None:
    await store.create(example_change(_A, take_coins=(_COIN, _COIN_2), take_peers=(_PEER,)))
    change = example_change(
        _A, 1, free_coins=True, take_coins=(_COIN_2, _COIN_3), free_peers=True, take_peers=(_PEER_2, _PEER)
    )
    _same(await store.append(change), Stored())
    _same(dict(await other.coins_in_use()), {_COIN_2: _A, _COIN_3: _A})
    _same(dict(await other.peers_in_use()), {_PEER: _A, _PEER_2: _A})


async def a_refused_change_leaves_nothing(store: Store, other: Store) -> None:
    held = example_change(_A, see_inputs=(_COIN,), take_coins=(_COIN,), take_peers=(_PEER,))
    await store.create(held)
    await store.create(example_change(_B, take_coins=(_COIN_3,), take_peers=(_PEER_2,)))
    wish = example_change(
        _B,
        1,
        row=example_row(_B, state="Monitor", order="o"),
        free_coins=True,
        free_peers=True,
        block_peers=((_PEER, 9),),
    )
    for change, answer in (
        (replace(wish, see_inputs=(_COIN_2, _COIN), take_coins=(_COIN_2,)), InputsSeenBy(_A, _COIN)),
        (replace(wish, see_inputs=(_COIN_2,), take_coins=(_COIN_2, _COIN)), CoinTakenBy(_A, _COIN)),
        (
            replace(wish, see_inputs=(_COIN_2,), take_coins=(_COIN_2,), take_peers=("02" + "55" * 32, _PEER)),
            PeerTakenBy(_A, _PEER),
        ),
    ):
        _same(await other.append(change), answer)
        _same(len(await store.load(_B)), 1)
        _same(await store.row(_B), example_row(_B))
        _same(dict(await store.coins_in_use()), {_COIN: _A, _COIN_3: _B})
        _same(dict(await store.peers_in_use()), {_PEER: _A, _PEER_2: _B})
        _same(dict(await store.blocked_peers()), {})
        _same(len(await store.since(0, 10)), 2)
    await _inputs_are_unseen(store, (_COIN_2,))


async def a_blocked_peer_stays_blocked_until_the_highest_height(store: Store, other: Store) -> None:
    await store.create(example_change(_A, block_peers=((_PEER, 100), (_PEER_2, 50))))
    await store.append(example_change(_A, 1, block_peers=((_PEER, 90), (_PEER_2, 60), (_PEER_2, 55)), free_peers=True))
    _same(dict(await other.blocked_peers()), {_PEER: 100, _PEER_2: 60})


# ---------------------------------------------------------------- races and cancellation


async def of_two_workers_racing_one_append_is_stored(store: Store, other: Store) -> None:
    await store.create(example_change())
    for seq in range(1, 11):
        one, two = example_change(seq=seq), example_change(seq=seq, row=example_row(state="Other"))
        answers = await asyncio.gather(store.append(one), other.append(two))
        _same(sorted(map(repr, answers)), ["LostRace()", "Stored()"])
    _same([record.seq for record in await store.load(_A)], list(range(11)))


async def of_two_sessions_racing_for_a_coin_or_input_one_is_stored(store: Store, other: Store) -> None:
    await store.create(example_change(_A))
    await store.create(example_change(_B))
    seqs = {_A: 1, _B: 1}
    for number in range(10):
        outpoint = Outpoint("77" * 32, number)
        taken = {"see_inputs": (outpoint,)} if number % 2 else {"take_coins": (outpoint,)}
        answers: list[Appended] = list(
            await asyncio.gather(
                store.append(example_change(_A, seqs[_A], **taken)),  # type: ignore[arg-type]  # one of two fields
                other.append(example_change(_B, seqs[_B], **taken)),  # type: ignore[arg-type]  # one of two fields
            )
        )
        winner, loser = (_A, 1) if answers[0] == Stored() else (_B, 0)
        refusal = InputsSeenBy(winner, outpoint) if number % 2 else CoinTakenBy(winner, outpoint)
        _same(answers[loser], refusal)
        _same(answers[1 - loser], Stored())
        seqs[winner] += 1
    for session, count in seqs.items():
        _same(len(await store.load(session)), count)


async def many_sessions_written_at_once_are_all_stored(store: Store, other: Store) -> None:
    sessions = [f"{number:032x}" for number in range(20)]
    handles = [store, other] * 10
    answers = await asyncio.gather(
        *(handle.create(example_change(session)) for handle, session in zip(handles, sessions, strict=True))
    )
    _same(set(answers), {Stored()})
    answers = await asyncio.gather(
        *(handle.append(example_change(session, 1)) for handle, session in zip(handles[::-1], sessions, strict=True))
    )
    _same(set(answers), {Stored()})
    _same(len(await other.since(0, 100)), 40)


async def a_cancelled_append_is_stored_whole_or_not_at_all(store: Store, other: Store) -> None:
    await store.create(example_change())
    seq = 1
    for yields in (0, 0, 1, 1, 2, 2, 3, 5, 8):
        change = example_change(
            seq=seq, events=2, row=example_row(state=f"at {seq}"), take_coins=(Outpoint("88" * 32, seq),)
        )
        before = await store.row(_A)
        task = asyncio.create_task(_appended(store, change))
        for _ in range(yields):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        # Whoever loads first, on whichever handle, sees the final answer.
        loaded = await other.load(_A)
        coins = await other.coins_in_use()
        if len(loaded) == seq:
            _same(await store.row(_A), before)
            _same(change.take_coins[0] in coins, False)
            _same(task.cancelled(), True)
        else:
            _same(loaded[seq:], change.records)
            _same(await store.row(_A), change.row)
            _same(coins[change.take_coins[0]], _A)
            seq += 2
    _same(await other.append(example_change(seq=seq)), Stored())
    _same(await store.append(example_change(seq=seq + 1)), Stored())


# ---------------------------------------------------------------- cursor, claims, values


async def a_cursor_reads_every_event_once_in_the_order_of_storing(store: Store, other: Store) -> None:
    await store.create(example_change(_A, events=2))
    await store.create(example_change(_B))
    await store.append(example_change(_A, 2))
    await store.append(example_change(_B, 9))
    read: list[tuple[SessionId, int]] = []
    cursor = 0
    while page := await other.since(cursor, 3):
        _same(len(page) <= 3, True)
        _same([place for place, _, _ in page], sorted(place for place, _, _ in page))
        _same(page[0][0] > cursor, True)
        read += [(session, record.seq) for _, session, record in page]
        cursor = page[-1][0]
    _same(read, [(_A, 0), (_A, 1), (_B, 0), (_A, 2)])
    await store.append(example_change(_B, 1))
    [(_, session, record)] = await other.since(cursor, 3)
    _same((session, record), (_B, example_change(_B, 1).records[0]))
    await _raises(OurMistake, other.since(0, 0))
    await _raises(OurMistake, other.since(-1, 1))


async def a_claim_has_one_holder_who_can_renew_and_release_it(store: Store, other: Store) -> None:
    await store.create(example_change())
    _same(await store.claim(_A, "one", 60), True)
    _same(await other.claim(_A, "two", 60), False)
    _same(await other.claim(_A, "one", 60), True)
    _same(await other.claim(_B, "two", 60), True)
    await other.release(_A, "two")
    _same(await other.claim(_A, "two", 60), False)
    await store.release(_A, "one")
    _same(await other.claim(_A, "two", 60), True)
    _same(await store.claim(_A, "one", 60), False)
    await store.release(_C, "one")


async def a_lapsed_claim_is_free(store: Store, other: Store) -> None:
    _same(await store.claim(_A, "one", 0), True)
    _same(await other.claim(_A, "two", 60), True)
    _same(await store.claim(_A, "one", 60), False)
    await _raises(OurMistake, store.claim(_A, "one", -1))
    await _raises(OurMistake, store.claim(_A, "one", float("nan")))
    await _raises(OurMistake, store.claim(_A, "", 1))


async def of_many_workers_racing_for_a_claim_one_holds_it(store: Store, other: Store) -> None:
    for session in (_A, _B, _C):
        answers = await asyncio.gather(
            *((other if number % 2 else store).claim(session, f"worker {number}", 60) for number in range(8))
        )
        _same(sum(answers), 1)


async def a_value_is_kept_replaced_and_forgotten(store: Store, other: Store) -> None:
    _same(await store.get("relay health"), None)
    await store.put("relay health", "1")
    await store.put("other", '{"é": "\\n"}')
    await other.put("relay health", "2")
    _same(await store.get("relay health"), "2")
    _same(await other.get("other"), '{"é": "\\n"}')
    await store.put("relay health", None)
    await store.put("relay health", None)
    _same(await other.get("relay health"), None)
    await _raises(OurMistake, store.put("nul", "\0"))
    await asyncio.gather(*((other if number % 2 else store).put("raced", str(number)) for number in range(8)))
    _same(await store.get("raced") in set("01234567"), True)


async def closing_twice_is_fine_and_a_closed_store_says_so(store: Store, other: Store) -> None:
    await store.create(example_change())
    await store.close()
    await store.close()
    await _raises(OurMistake, store.load(_A))
    if other is not store:
        _same(len(await other.load(_A)), 1)


STORE_CHECKS: tuple[StoreCheck, ...] = (
    what_is_stored_is_read_back_equal,
    events_are_appended_in_order_and_the_row_follows,
    an_append_may_change_the_row_alone,
    an_append_at_the_wrong_seq_lost_the_race_and_stores_nothing,
    a_session_is_created_once,
    an_unknown_session_is_wrong_usage,
    a_change_that_breaks_the_contract_is_refused_whole,
    rows_come_newest_first_and_open_ones_alone_on_request,
    an_order_belongs_to_one_session,
    a_receiver_key_is_paid_once,
    a_reopened_session_gives_its_receiver_key_away,
    of_two_sessions_racing_for_one_order_one_is_stored,
    an_input_is_seen_by_one_session_for_ever,
    a_session_may_see_its_inputs_again,
    a_coin_is_in_use_by_one_session_until_it_frees_it,
    a_peer_is_in_use_by_one_session_until_it_frees_it,
    one_change_frees_the_old_before_it_takes_the_new,
    a_refused_change_leaves_nothing,
    a_blocked_peer_stays_blocked_until_the_highest_height,
    of_two_workers_racing_one_append_is_stored,
    of_two_sessions_racing_for_a_coin_or_input_one_is_stored,
    many_sessions_written_at_once_are_all_stored,
    a_cancelled_append_is_stored_whole_or_not_at_all,
    a_cursor_reads_every_event_once_in_the_order_of_storing,
    a_claim_has_one_holder_who_can_renew_and_release_it,
    a_lapsed_claim_is_free,
    of_many_workers_racing_for_a_claim_one_holds_it,
    a_value_is_kept_replaced_and_forgotten,
    closing_twice_is_fine_and_a_closed_store_says_so,
)
"""The contract, one named check after another."""


# ---------------------------------------------------------------- what the checks are written with


async def _appended(store: Store, change: Change) -> Appended:
    return await store.append(change)


def _same(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"expected {expected!r}, found {found!r}")


async def _raises(kind: type[PayjoinError], call: Awaitable[object], *, naming: str = "") -> None:
    try:
        answer = await call
    except kind as exc:
        if naming not in str(exc):
            raise AssertionError(f"{exc} does not name {naming}") from exc
        return
    raise AssertionError(f"expected {kind.__name__}, found {answer!r}")


async def _holds_nothing(store: Store) -> None:
    _same(dict(await store.coins_in_use()), {})
    _same(dict(await store.peers_in_use()), {})
    _same(dict(await store.blocked_peers()), {})


async def _inputs_are_unseen(store: Store, outpoints: tuple[Outpoint, ...]) -> None:
    _same(await store.create(example_change(_C, see_inputs=outpoints)), Stored())
