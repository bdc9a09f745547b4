"""Whatever bytes arrive (mailbox, reply mailbox, URI, relay): the session stays legal, its log can be read, and errors are typed.

`PJV2_FUZZ=long` tries more.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjv2 import session as model
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.errors import BadUri, NotNow
from pjv2.lab.httpd import HttpRequest, HttpResponse, HttpServer
from pjv2.psbt.verify import original_body
from pjv2.testing import SeededEntropy
from pjv2.units import Network
from pjv2.wire.mailbox import MailboxRequest
from pjv2.wire.message import seal_message_a, seal_message_b
from pjv2.wire.secp import SecretKey
from pjv2.wire.uri import parse_uri
from tests.fuzz.model import BASE, PAYS, Worker, World, kit, original, own_coin, payer
from tests.fuzz.test_state_machine import created, key_config, proposal

LONG = os.environ.get("PJV2_FUZZ") == "long"
PROFILE = settings(
    max_examples=3_000 if LONG else 60,
    derandomize=not LONG,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
REPLY = SecretKey(b"\x33" * 32)
KEY = SecretKey(b"\x44" * 32)


@st.composite
def mangled(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes that were something once: changed, cut, repeated, or not changed at all."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "cut", "insert", "double", "number"])):
            case "flip":
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=40))
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                data[at : at + 8] = draw(
                    st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xfe\xff\xff\xff\x7f\x00\x00\x00"])
                )
    return bytes(data)


def bodies(whole: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=300), mangled(whole))


def remangled_psbt(whole: bytes) -> st.SearchStrategy[bytes]:
    """A PSBT that is mangled inside its base64."""
    text, _, query = whole.partition(b"\n")
    return mangled(base64.b64decode(text)).map(lambda psbt: base64.b64encode(psbt) + b"\n" + query)


def drive(world: World, session: str, steps: int = 12) -> model.State:
    """Let the session do what it wants for a while, and read its log again."""

    worker = Worker(world, session)
    for _ in range(steps):
        worker.round()
    log = world.store.now.logs[session]
    state = world.store.state(session)
    records = [(n, model.event_name(e.event), model.encode(e.event)) for n, e in enumerate(log)]
    assert model.replay(records) == state
    model.public_session(state)
    return state


# ---------------------------------------------------------------- the receiver's mailbox


def receiver(put: Callable[[World, model.Receiver], bytes]) -> tuple[World, model.Receiver]:
    world = World([own_coin(0)])
    state = world.store.create(created(world, 0, None))
    assert isinstance(state, model.Receiver)
    world.put(state.mailbox.short_id, put(world, state))
    after = drive(world, state.session)
    assert isinstance(after, model.Receiver)
    return world, after


def no_coin_without_a_proposal(world: World, state: model.Receiver) -> None:
    if state.accepted is None:
        assert not world.store.now.coins
        assert not world.locks
        assert state.spoiled is not None or state.refused is not None or state.stage == "Initialized"


@PROFILE
@given(st.one_of(st.binary(max_size=400), st.binary(min_size=7_168, max_size=7_168)))
def test_any_bytes_in_the_mailbox_leave_a_legal_session(junk: bytes) -> None:
    world, state = receiver(lambda world, state: junk)
    no_coin_without_a_proposal(world, state)
    assert state.stage != "Monitor"


@PROFILE
@given(st.data())
def test_a_damaged_message_spoils_the_mailbox_and_nothing_else(data: st.DataObject) -> None:
    def put(world: World, state: model.Receiver) -> bytes:
        key = SecretKey(state.created.receiver_key).public
        return data.draw(mangled(seal_message_a(key, REPLY.public, original_body(original(0)), world.rng)))

    world, state = receiver(put)
    no_coin_without_a_proposal(world, state)


@PROFILE
@given(st.one_of(bodies(original_body(original(0))), remangled_psbt(original_body(original(0)))))
def test_any_body_in_a_sealed_message_is_accepted_or_refused_with_a_code(body: bytes) -> None:
    def put(world: World, state: model.Receiver) -> bytes:
        key = SecretKey(state.created.receiver_key).public
        return seal_message_a(key, REPLY.public, body, world.rng)

    world, state = receiver(put)
    no_coin_without_a_proposal(world, state)
    if state.refused is not None:
        assert state.refusal is not None
        assert state.refusal_posted


@PROFILE
@given(st.one_of(bodies(original_body(original(0))), remangled_psbt(original_body(original(0)))))
def test_any_text_of_a_bip78_payer_leaves_a_legal_session(body: bytes) -> None:
    world, state = receiver(lambda world, state: body)
    no_coin_without_a_proposal(world, state)


# ---------------------------------------------------------------- the sender's reply mailbox


def sender(reply: Callable[[World, model.Sender], bytes]) -> tuple[World, model.Sender]:
    world = World([payer(0)])

    made = model.evolve(None, replace(created(world, 0, None), receiver_key=KEY.reveal()))
    assert isinstance(made, model.Receiver)
    first = model.create_sender(
        world.now,
        world.rng,
        network=Network.REGTEST,
        genesis=Network.REGTEST.genesis_hash,
        wallet="wallet-2",
        uri=parse_uri(model.payment_uri(made)),
        sent=original(0),
        amount=PAYS,
        lock_id=b"\x55" * 32,
        height=BASE,
    )
    state = world.store.create(first)
    assert isinstance(state, model.Sender)
    world.put(state.reply_mailbox.short_id, reply(world, state))
    after = drive(world, state.session)
    assert isinstance(after, model.Sender)
    return world, after


def never_worse_off(world: World, state: model.Sender) -> None:
    """What was signed takes no more from the payer than the amount, the fee and the offered contribution."""
    assert payer(0).outpoint in world.store.now.coins
    if state.signed is None:
        assert state.refused is not None
        assert state.stage == "PendingFallback"
        return
    tx = state.payjoin.tx if state.payjoin is not None else None
    assert tx is not None
    back = sum(out.value for out in tx.outputs if out.script == kit.CHANGE)
    most = state.sent.params.max_fee_contribution or 0
    assert payer(0).value - back <= PAYS + state.created.fee + most


@PROFILE
@given(st.one_of(st.binary(max_size=300), st.binary(min_size=7_168, max_size=7_168)))
def test_any_bytes_in_the_reply_mailbox_mean_that_the_original_pays(junk: bytes) -> None:
    world, state = sender(lambda world, state: junk)
    never_worse_off(world, state)
    assert state.signed is None


@PROFILE
@given(bodies(proposal()))
def test_any_sealed_payload_is_safe_to_sign_or_refused(payload: bytes) -> None:
    world, state = sender(lambda world, state: seal_message_b(state_reply(state), KEY, payload, world.rng))
    never_worse_off(world, state)


def state_reply(state: model.Sender) -> Any:
    return SecretKey(state.created.reply_key).public


# ---------------------------------------------------------------- URIs and relays


@lru_cache(maxsize=1)
def uri() -> str:
    made = model.evolve(None, created(World([own_coin(0)]), 0, None))
    assert isinstance(made, model.Receiver)
    return model.payment_uri(made)


@settings(PROFILE, max_examples=3_000 if LONG else 300)
@given(st.one_of(st.text(max_size=200), mangled(uri().encode()).map(lambda raw: raw.decode("latin-1"))))
def test_any_text_is_a_uri_or_a_bad_one(text: str) -> None:
    try:
        told = parse_uri(text).address
    except BadUri as exc:
        told = str(exc)
    assert told


class Liar(HttpServer):
    """A relay that answers what it is told to."""

    status = 200
    media_type = "message/ohttp-res"
    body = b""

    async def respond(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(self.status, self.body, (("Content-Type", self.media_type),))


def test_whatever_a_relay_answers_is_not_now() -> None:
    """One relay, one mailroom, many answers; the mailroom stays usable and no foreign exception comes out."""

    async def story() -> None:
        async with Liar() as relay, asyncio.timeout(120):
            ahead = [0.0]

            class Clock:
                def now(self) -> float:
                    return 1_800_000_000.0 + ahead[0]

                async def sleep(self, seconds: float) -> None:
                    await asyncio.sleep(0)

            mailroom = HttpMailroom(
                [Service(relay.url, "a liar")],
                [Service("https://directory.example", "nobody")],
                clock=Clock(),
                rng=SeededEntropy(5),
            )
            rng = SeededEntropy(6)
            request = MailboxRequest("GET", "A" * 13)
            types = ("message/ohttp-res", "application/problem+json", "text/html", "")
            try:
                for number in range(400 if LONG else 60):
                    relay.status = (200, 200, 200, 202, 400, 404, 422, 429, 500, 502)[rng.below(10)]
                    relay.media_type = types[rng.below(4)]
                    relay.body = rng.token((0, 1, 31, 48, 8_192, 8_191, 9_000)[number % 7])
                    ahead[0] += 100_000
                    try:
                        await mailroom.exchange(
                            "https://directory.example", key_config(), request, session=f"{number:032x}"
                        )
                    except NotNow as exc:
                        why = str(exc)
                    else:
                        raise AssertionError("junk was taken for an answer")
                    assert why
            finally:
                await mailroom.close()

    asyncio.run(story())
