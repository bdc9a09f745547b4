"""Messages A and B against byte-exact worked examples, both parities of y, and damage to every byte."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadCiphertext, OurMistake, WrongUsage
from pjv2.wire import hpke, message
from pjv2.wire.message import (
    MESSAGE_BYTES,
    PLAINTEXT_A_BODY_BYTES,
    PLAINTEXT_B_BYTES,
    open_message_a,
    open_message_b,
    seal_message_a,
    seal_message_b,
)
from pjv2.wire.secp import SecretKey, ellswift_decode, ellswift_encode
from tests.unit.wire.kit import UNHEX, Fixed, Seeded, corrupted, derived, truncated

KEYS = derived("keys")
RECEIVER, REPLY = SecretKey(UNHEX(KEYS["receiver_sk"])), SecretKey(UNHEX(KEYS["reply_sk"]))
STRANGER = SecretKey.generate(Seeded(99))
MESSAGES_A = ["message_a_1", "message_a_2_same_x_other_parity", "message_a_empty_body"]
MESSAGES_B = ["message_b_proposal", "message_b_error"]


@pytest.fixture
def encoded_as(monkeypatch):
    """Any encoding of the ephemeral point is allowed; this makes the sealing side use the published one."""

    def use(v):
        def encode(public, rng):
            assert ellswift_decode(UNHEX(v["ellswift"])) == public
            return UNHEX(v["ellswift"])

        monkeypatch.setattr(message, "ellswift_encode", encode)

    return use


@pytest.mark.parametrize("name", MESSAGES_A)
def test_message_a_is_sealed_and_opened_byte_for_byte(name, encoded_as):
    v = derived(name)
    body = v["body_ascii"].encode()
    plain = seal_message_a(RECEIVER.public, REPLY.public, body, Fixed(UNHEX(v["ephemeral_sk"]), bytes(32)))
    assert ellswift_decode(plain[:64]).uncompressed.hex() == v["enc_uncompressed"]
    encoded_as(v)
    sealed = seal_message_a(RECEIVER.public, REPLY.public, body, Fixed(UNHEX(v["ephemeral_sk"])))
    assert hashlib.sha256(sealed).hexdigest() == v["message_sha256"]
    assert sealed.hex() == v.get("message_hex", sealed.hex())
    assert plain[64:] == sealed[64:]
    for message_a in (plain, sealed):
        opened = open_message_a(RECEIVER, message_a)
        assert (opened.reply, opened.body) == (REPLY.public, body)


@pytest.mark.parametrize("name", MESSAGES_B)
def test_message_b_is_sealed_and_opened_byte_for_byte(name, encoded_as):
    v = derived(name)
    payload = UNHEX(v["plaintext_unpadded_hex"])
    encoded_as(v)
    sealed = seal_message_b(REPLY.public, RECEIVER, payload, Fixed(UNHEX(v["ephemeral_sk"])))
    assert sealed.hex() == v["message_hex"]
    assert hashlib.sha256(sealed).hexdigest() == v["message_sha256"]
    assert open_message_b(REPLY, RECEIVER.public, sealed) == payload.ljust(PLAINTEXT_B_BYTES, b"\x00")


def test_the_two_parities_of_one_x_are_two_different_keys():
    one, other = derived("message_a_1"), derived("message_a_2_same_x_other_parity")
    first, second = ellswift_decode(UNHEX(one["ellswift"])), ellswift_decode(UNHEX(other["ellswift"]))
    assert first.compressed[1:] == second.compressed[1:]
    assert first != second
    swapped = UNHEX(other["ellswift"]) + UNHEX(one["message_hex"])[64:]
    with pytest.raises(BadCiphertext):
        open_message_a(RECEIVER, swapped)


def test_the_sizes_add_up():
    assert MESSAGE_BYTES == 64 + 33 + PLAINTEXT_A_BODY_BYTES + 16 == 64 + PLAINTEXT_B_BYTES + 16 == 7168


bodies = st.binary(max_size=400).map(lambda b: b.rstrip(b"\x00"))


@settings(max_examples=20)
@given(bodies, st.integers(0, 10**6))
def test_message_a_reads_back(body, seed):
    sealed = seal_message_a(RECEIVER.public, REPLY.public, body, Seeded(seed))
    opened = open_message_a(RECEIVER, sealed)
    assert (len(sealed), opened.reply, opened.body) == (MESSAGE_BYTES, REPLY.public, body)


@settings(max_examples=20)
@given(st.binary(max_size=400), st.integers(0, 10**6))
def test_message_b_reads_back_with_its_padding(payload, seed):
    sealed = seal_message_b(REPLY.public, RECEIVER, payload, Seeded(seed))
    assert len(sealed) == MESSAGE_BYTES
    assert open_message_b(REPLY, RECEIVER.public, sealed) == payload.ljust(PLAINTEXT_B_BYTES, b"\x00")


def test_the_largest_payloads_fit_and_one_byte_more_names_both_sizes():
    body, payload = b"a" * PLAINTEXT_A_BODY_BYTES, b"b" * PLAINTEXT_B_BYTES
    assert open_message_a(RECEIVER, seal_message_a(RECEIVER.public, REPLY.public, body, Seeded())).body == body
    assert open_message_b(REPLY, RECEIVER.public, seal_message_b(REPLY.public, RECEIVER, payload, Seeded())) == payload
    with pytest.raises(WrongUsage, match=r"7056 .*7055") as caught:
        seal_message_a(RECEIVER.public, REPLY.public, body + b"a", Seeded())
    assert isinstance(caught.value, OurMistake)
    assert (caught.value.actual, caught.value.limit) == (7056, 7055)
    with pytest.raises(WrongUsage, match=r"7089 .*7088"):
        seal_message_b(REPLY.public, RECEIVER, payload + b"b", Seeded())


def test_another_key_opens_nothing():
    message_a = seal_message_a(RECEIVER.public, REPLY.public, b"x", Seeded())
    message_b = seal_message_b(REPLY.public, RECEIVER, b"x", Seeded())
    for attempt in (
        lambda: open_message_a(STRANGER, message_a),
        lambda: open_message_a(REPLY, message_a),
        lambda: open_message_a(RECEIVER, message_b),
        lambda: open_message_b(STRANGER, RECEIVER.public, message_b),
        lambda: open_message_b(REPLY, STRANGER.public, message_b),
        lambda: open_message_b(REPLY, REPLY.public, message_b),
        lambda: open_message_b(RECEIVER, REPLY.public, message_a),
    ):
        with pytest.raises(BadCiphertext):
            attempt()


def test_message_b_by_anybody_but_the_receiver_is_refused():
    forged = seal_message_b(REPLY.public, STRANGER, b"x", Seeded())
    with pytest.raises(BadCiphertext):
        open_message_b(REPLY, RECEIVER.public, forged)


def test_message_a_damaged_in_any_byte_is_refused():
    for damaged in corrupted(seal_message_a(RECEIVER.public, REPLY.public, b"body", Seeded())):
        with pytest.raises(BadCiphertext):
            open_message_a(RECEIVER, damaged)


def test_message_b_damaged_in_any_byte_is_refused():
    for damaged in corrupted(seal_message_b(REPLY.public, RECEIVER, b"body", Seeded())):
        with pytest.raises(BadCiphertext):
            open_message_b(REPLY, RECEIVER.public, damaged)


def test_a_message_cut_anywhere_or_lengthened_is_refused():
    message_a = seal_message_a(RECEIVER.public, REPLY.public, b"body", Seeded())
    message_b = seal_message_b(REPLY.public, RECEIVER, b"body", Seeded())
    for damaged in [*truncated(message_a), message_a + b"\x00"]:
        with pytest.raises(BadCiphertext):
            open_message_a(RECEIVER, damaged)
    for damaged in [*truncated(message_b), message_b + b"\x00"]:
        with pytest.raises(BadCiphertext):
            open_message_b(REPLY, RECEIVER.public, damaged)


def sealed_by_hand(plaintext: bytes) -> bytes:
    rng = Seeded(5)
    context = hpke.setup_s(RECEIVER.public, b"PjV2MsgA", rng)
    return ellswift_encode(context.ephemeral, rng) + context.seal(plaintext)


@pytest.mark.parametrize("size", [0, 1, 32])
def test_a_message_a_that_opens_but_is_too_short_for_a_reply_key_is_refused(size):
    with pytest.raises(BadCiphertext, match="reply key"):
        open_message_a(RECEIVER, sealed_by_hand(REPLY.public.compressed[:size]))


def test_a_message_a_with_a_reply_key_off_the_curve_is_refused():
    for key in (bytes(33), b"\x02" + b"\xff" * 32, b"\x04" + bytes(32)):
        with pytest.raises(BadCiphertext):
            open_message_a(RECEIVER, sealed_by_hand(key + bytes(PLAINTEXT_A_BODY_BYTES)))


def test_only_the_zeros_after_the_text_are_padding():
    for body in (b"\x00x", b"x\x00y"):
        assert open_message_a(RECEIVER, seal_message_a(RECEIVER.public, REPLY.public, body, Seeded())).body == body


@pytest.mark.parametrize("size", [0, 63, 64, 79])
def test_what_is_too_short_for_any_message_is_refused_by_its_size(size):
    with pytest.raises(BadCiphertext, match=f"at least 80 bytes, this one {size}"):
        open_message_a(RECEIVER, bytes(size))


def test_a_message_a_of_another_size_is_read():
    opened = open_message_a(RECEIVER, sealed_by_hand(REPLY.public.compressed + b"short"))
    assert (opened.reply, opened.body) == (REPLY.public, b"short")
    assert open_message_a(RECEIVER, sealed_by_hand(REPLY.public.compressed)).body == b""


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_message(data):
    with pytest.raises(BadCiphertext):
        open_message_a(RECEIVER, data)
    with pytest.raises(BadCiphertext):
        open_message_b(REPLY, RECEIVER.public, data)


@pytest.mark.parametrize("kind", ["a", "b"])
def test_no_two_messages_are_equal_and_no_bit_of_them_is_constant(kind):
    rng = Seeded(6)
    ones = zeros = 0
    for _ in range(64):
        sealed = (
            seal_message_a(RECEIVER.public, REPLY.public, b"same", rng)
            if kind == "a"
            else seal_message_b(REPLY.public, RECEIVER, b"same", rng)
        )
        number = int.from_bytes(sealed, "big")
        ones |= number
        zeros |= ~number
    every_bit = (1 << 8 * MESSAGE_BYTES) - 1
    assert ones == every_bit
    assert zeros & every_bit == every_bit


def test_only_valid_utf_8_is_a_v1_text():
    assert message.is_v1_text(b"cHNidP8=\nv=1")
    assert message.is_v1_text("é".encode())
    assert message.is_v1_text(b"")
    assert not message.is_v1_text(b"\xff")
    assert not message.is_v1_text("é".encode()[:1])
    assert not message.is_v1_text(seal_message_a(RECEIVER.public, REPLY.public, b"", Seeded()))


def test_a_message_does_not_show_its_body():
    opened = open_message_a(RECEIVER, seal_message_a(RECEIVER.public, REPLY.public, b"cHNidP8=", Seeded()))
    assert "cHNidP8" not in repr(opened)
