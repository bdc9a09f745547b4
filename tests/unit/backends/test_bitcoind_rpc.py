"""The JSON-RPC client over a server that misbehaves as asked: batches, logins, warm-up, cuts, nonsense."""

from __future__ import annotations

import asyncio
import logging
import traceback
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjv2.backends.bitcoind_rpc import (
    BitcoindRpc,
    Call,
    Refused,
    cookie_login,
    hash_of,
    in_btc,
    outpoint_of,
    password_login,
    rate_of,
    raw_of,
    sats_of,
    whole,
)
from pjv2.errors import CannotRead, NotNow, PayjoinError, WrongUsage
from pjv2.units import MAX_MONEY, FeeRate, Network
from tests.unit.backends.fake_node import CUT, GENESIS, SILENCE, Error, Http, fake_node

HASH = "ab" * 32


@asynccontextmanager
async def node_and_rpc(results=None, wallet=None, **more):
    async with fake_node(results=results or {}) as node:
        rpc = node.rpc(wallet, **more)
        try:
            yield node, rpc
        finally:
            await rpc.close()


async def refused_with(kind, work, match=""):
    with pytest.raises(kind, match=match) as caught:
        await work
    return caught.value


# ---------------------------------------------------------------- batches


async def test_what_is_asked_in_the_same_moment_is_one_request_and_each_question_is_in_it_once():
    async with node_and_rpc({"a": 1, "b": lambda params: params[0]}) as (node, rpc):
        found = await asyncio.gather(
            rpc.ask(Call("a"), Call("b", (1,))), rpc.ask(Call("a")), rpc.ask(Call("b", (2,)), Call("a", fresh=True))
        )
        assert found == [[1, 1], [1], [2, 1]]
        assert node.methods == [["a", "b", "b", "a"]]
        assert await rpc.ask() == []


async def test_what_changes_something_travels_alone():
    async with node_and_rpc({"a": 1, "send": "done"}) as (node, rpc):
        assert await asyncio.gather(rpc.ask(Call("a")), rpc.do(Call("send")), rpc.ask(Call("a"))) == [[1], "done", [1]]
        assert sorted(node.methods) == [["a"], ["send"]]


async def test_answers_are_told_apart_by_their_numbers_whatever_their_order():
    async with node_and_rpc() as (node, rpc):
        node.next = [[{"id": 1, "result": "second"}, {"id": 0, "result": None}]]
        assert await rpc.ask(Call("a"), Call("b")) == [None, "second"]


async def test_one_connection_serves_many_requests():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        for _ in range(5):
            await rpc.ask(Call("a"))
        assert node.connections == 1


async def test_who_goes_away_does_not_take_the_others_answers_along():
    async with node_and_rpc({"a": 1}) as (_, rpc):
        leaving, staying = (asyncio.create_task(rpc.ask(Call("a"))) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == [1]
        with pytest.raises(asyncio.CancelledError):
            await leaving


# ---------------------------------------------------------------- refusals


async def test_what_bitcoind_refuses_is_an_answer_and_becomes_an_error_where_it_is_not_expected():
    async with node_and_rpc({"a": Error(-5, "No  such\nthing")}, wallet="w") as (_, rpc):
        (answer,) = await rpc.ask(Call("a"))
        assert answer == Refused(-5, "No such thing")
        await refused_with(NotNow, _told(rpc, "a", answer), "refuses a: No such thing")
        await refused_with(NotNow, _told(rpc, "a", Refused(-13, "")), "-rpcwallet=w walletpassphrase")
        await refused_with(WrongUsage, _told(rpc, "a", Refused(-32601, "")), "does not know a")
        await refused_with(NotNow, _told(rpc, "a", Refused(-18, "")), "not loaded")
        await refused_with(WrongUsage, _told(rpc, "a", Refused(-19, "")), "/wallet/NAME")


async def _told(rpc, method, answer):
    return rpc.told(method, answer)


async def test_a_node_that_is_starting_is_asked_again_for_a_while():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        node.next = [Error(-28, "Loading block index…"), Error(-28, "Verifying blocks…")]
        assert await rpc.ask(Call("a")) == [1]
        assert (len(node.requests), rpc.epoch) == (3, 2)


async def test_a_node_that_starts_for_too_long_is_not_now():
    async with node_and_rpc({"a": Error(-28, "Loading block index…")}, warm_up=0.05) as (_, rpc):
        found = await refused_with(NotNow, rpc.ask(Call("a")), "is starting: Loading block index…")
        assert found.after == 5.0


async def test_an_error_about_the_whole_request_answers_every_call():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        node.next = [Http(500, b'{"result": null, "error": {"code": -28, "message": "Loading"}, "id": null}')]
        assert await rpc.ask(Call("a"), Call("a", fresh=True)) == [1, 1]


# ---------------------------------------------------------------- logins


async def test_a_refused_cookie_is_read_again_because_a_restart_writes_a_new_one():
    cookies = [b"__cookie__:old\n", b"__cookie__:new\n"]
    async with node_and_rpc({"a": 1}, login=cookie_login(lambda: cookies.pop(0))) as (node, rpc):
        node.accepts = lambda login: login == "__cookie__:new"
        assert await rpc.ask(Call("a")) == [1]
        assert await rpc.ask(Call("a")) == [1]
        assert node.logins == ["__cookie__:old", "__cookie__:new", "__cookie__:new"]
        assert rpc.epoch == 1


async def test_a_login_that_is_refused_twice_is_not_now_and_read_anew_the_next_time():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        node.accepts = lambda login: False
        await refused_with(NotNow, rpc.ask(Call("a")), "does not accept the login")
        assert len(node.requests) == 2
        node.accepts = lambda login: True
        assert await rpc.ask(Call("a")) == [1]


async def test_a_cookie_that_is_no_cookie_is_said():
    for content, kind in ((b"", NotNow), (b"half", NotNow), (b"\xff\xfe", WrongUsage)):
        async with node_and_rpc(login=cookie_login(lambda content=content: content)) as (node, rpc):
            await refused_with(kind, rpc.ask(Call("a")), "cookie")
            assert node.requests == []


async def test_no_secret_is_in_a_repr_an_error_or_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    secret = "psbt-" * 2
    async with node_and_rpc({"a": Error(-1, "no")}) as (node, rpc):
        await rpc.ask(Call("a", (secret,)))
        said = [repr(rpc), repr(Call("a", (secret,)))]
        for trouble in (CUT, CUT), (Http(401), Http(401)), (Http(403),), (Http(500, b"?"),), (Http(200, b"?"),):
            node.next = list(trouble)
            try:
                await rpc.ask(Call("a", (secret,)))
            except PayjoinError as exc:
                said.append("".join(traceback.format_exception(exc)))
            else:
                raise AssertionError("it was answered")
    said += [record.getMessage() for record in caplog.records]
    for text in said:
        for hidden in ("hush" + "-hush", secret, "aHVz" + "aC"):
            assert hidden not in text


# ---------------------------------------------------------------- bad weather


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        ([CUT, CUT], NotNow, "cut the connection"),
        ([Http(403)], WrongUsage, "rpcallowip"),
        ([Http(503, b"Work queue depth exceeded")], NotNow, "rpcworkqueue"),
        ([Http(404)], WrongUsage, "no JSON-RPC at this URL"),
        ([Http(302, b"", "Location: http://elsewhere.example/\r\n")], NotNow, "answers 302"),
        ([Http(500, b"<html>")], NotNow, "answers 500"),
        ([Http(200, b"<html>")], CannotRead, "is the URL that of a bitcoind"),
        ([Http(200, b"[]")], CannotRead, "JSON-RPC"),
        ([{"hello": "world"}], CannotRead, "JSON-RPC"),
        ([[{"id": 7, "result": 1}]], CannotRead, "JSON-RPC"),
        ([[{"id": 0}]], CannotRead, "JSON-RPC"),
        ([[{"id": 0, "result": 1}, {"id": 0, "result": 2}]], CannotRead, "JSON-RPC"),
        ([[{"id": 0, "error": "no"}]], CannotRead, "JSON-RPC"),
        ([{"error": {"code": "x"}}], CannotRead, "JSON-RPC"),
        (["nonsense"], CannotRead, "JSON-RPC"),
    ],
)
async def test_a_bad_answer_is_an_error_of_ours_and_the_next_question_is_answered(trouble, kind, words):
    async with node_and_rpc({"a": 1}) as (node, rpc):
        node.next = list(trouble)
        await refused_with(kind, rpc.ask(Call("a")), words)
        assert await rpc.ask(Call("a")) == [1]


async def test_a_connection_that_is_cut_once_is_made_again():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        node.next = [CUT]
        assert await rpc.ask(Call("a")) == [1]
        assert (node.connections, rpc.epoch) == (2, 1)


async def test_a_node_that_says_nothing_is_not_now():
    async with node_and_rpc({"a": 1}, timeout=0.05) as (node, rpc):
        node.next = [SILENCE]
        await refused_with(NotNow, rpc.ask(Call("a")), "does not answer")
        assert await rpc.ask(Call("a")) == [1]


async def test_a_node_that_is_not_there_is_not_now():
    async with fake_node() as node:
        port = node.port
    rpc = BitcoindRpc(f"http://127.0.0.1:{port}", password_login("u", lambda: "p"), network=Network.REGTEST)
    await refused_with(NotNow, rpc.ask(Call("a")), "is it running")
    await rpc.close()


async def test_what_is_under_way_when_it_is_closed_is_not_now_and_nothing_is_asked_afterwards():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        node.next = [SILENCE]
        asking = asyncio.create_task(rpc.ask(Call("a")))
        await node.asked.wait()
        await rpc.close()
        await refused_with(NotNow, asking, "closed")
        await refused_with(NotNow, rpc.ask(Call("a")), "closed")
        await refused_with(NotNow, rpc.do(Call("a")), "closed")
        await rpc.close()


# ---------------------------------------------------------------- who is it?


async def test_a_node_is_greeted_once_and_again_after_what_may_have_been_a_restart():
    async with node_and_rpc({"a": 1}) as (node, rpc):
        for _ in range(2):
            await rpc.greet()
        assert len(node.requests) == 1
        node.next = [CUT]
        await rpc.ask(Call("a"))
        await rpc.greet()
        assert node.methods[-1] == ["getblockhash", "getnetworkinfo"]


@pytest.mark.parametrize("network", [Network.BITCOIN, Network.SIGNET, Network.TESTNET4])
async def test_a_node_of_another_network_is_refused(network):
    async with node_and_rpc(network=network) as (_, rpc):
        await refused_with(WrongUsage, rpc.greet(), f"another network than {network}")


async def test_an_old_node_is_refused_with_its_version():
    async with node_and_rpc({"getnetworkinfo": {"version": 280100}}) as (_, rpc):
        await refused_with(WrongUsage, rpc.greet(), "version 28: pjv2 needs Bitcoin Core 29")


async def test_a_node_that_greets_with_nonsense_cannot_be_read():
    for told in ({}, [], None, {"version": "29"}, {"version": True}):
        async with node_and_rpc({"getnetworkinfo": told}) as (_, rpc):
            await refused_with(CannotRead, rpc.greet(), "getnetworkinfo")


# ---------------------------------------------------------------- URLs


def make(url, **more):
    return BitcoindRpc(url, password_login("u", lambda: "p"), network=Network.REGTEST, **more)


@pytest.mark.parametrize(
    ("url", "host", "wallet"),
    [
        ("http://127.0.0.1:8332", "127.0.0.1:8332", None),
        ("http://127.0.0.1:8332/", "127.0.0.1:8332", None),
        ("http://node.example/wallet/till", "node.example", "till"),
        ("https://[::1]:8332/wallet/my%20coins%2Fcold/", "::1:8332", "my coins/cold"),
    ],
)
async def test_a_url_names_a_host_and_a_wallet(url, host, wallet):
    rpc = make(url)
    assert (rpc.host, rpc.wallet) == (host, wallet)
    await rpc.close()


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1", "127.0.0.1:8332", "http://", "http://h:99999", "http://h/other", "http://h/wallet/", "http://h/?x=1",
        "http://h/#x", "http://u:hush@h:8332",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused_without_telling_what_it_holds(url):
    with pytest.raises(WrongUsage, match="URL of bitcoind") as caught:
        make(url)
    assert "hush" not in str(caught.value)


async def test_behind_a_proxy_only_machines_of_ones_own_are_asked_directly():
    for url in ("http://localhost:1", "http://127.0.0.1:1", "http://10.0.0.7:1", "http://[fd00::1]:1"):
        await make(url, proxied=True).close()
    for url in ("http://node.example:1", "http://8.8.8.8:1"):
        with pytest.raises(WrongUsage, match="not through the proxy"):
            make(url, proxied=True)


# ---------------------------------------------------------------- amounts


@given(st.integers(0, MAX_MONEY))
def test_amounts_go_there_and_back_without_an_error(sats):
    assert sats_of(Decimal(in_btc(sats))) == sats


@given(st.integers(0, 10**8))
def test_a_fee_rate_is_rounded_up_to_what_a_weight_is_charged_by(sat_per_kvb):
    rate = rate_of(Decimal(sat_per_kvb) / 10**8)
    assert (rate.sat_per_kwu - 1) * 4 < sat_per_kvb <= rate.sat_per_kwu * 4


def test_shapes_that_are_none_are_refused():
    assert rate_of(Decimal("0.00001000")) == FeeRate(250)
    assert outpoint_of({"txid": HASH, "vout": 1}) == (HASH, 1)
    for reading, values in {
        sats_of: ["1", True, Decimal("-1"), Decimal("0.000000001"), Decimal("NaN"), Decimal("21000001"), None],
        rate_of: ["1", True, Decimal("-1"), Decimal("Infinity"), Decimal("1.1"), None],
        whole: [-1, True, "1", 1 << 53, Decimal(1), None],
        hash_of: ["ab", HASH.upper(), HASH[:-1] + "g", 7, None],
        raw_of: ["abc", "zz", 7, None],
        outpoint_of: [{}, {"txid": HASH}, {"txid": "x", "vout": 0}, None],
    }.items():
        for value in values:
            with pytest.raises((ValueError, TypeError, KeyError)):
                reading(value)
    assert len(GENESIS) == 64
