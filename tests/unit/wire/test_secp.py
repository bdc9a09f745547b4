"""Keys, x-only ECDH and ElligatorSwift against BIP324's and draft-wahby's vectors, and against every malformed form."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadCiphertext, OurMistake, WrongUsage
from pjv2.wire import secp
from pjv2.wire.secp import PublicKey, SecretKey
from tests.unit.wire.kit import UNHEX, Fixed, Seeded, vectors

P = 2**256 - 2**32 - 977
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
scalars = st.integers(1, N - 1).map(lambda k: SecretKey(k.to_bytes(32, "big")))


def test_the_x_only_shared_secret_is_that_of_draft_wahby():
    (v,) = vectors("dh")
    sk0, sk1 = SecretKey(UNHEX(v["sk0"])), SecretKey(UNHEX(v["sk1"]))
    assert (sk0.public.uncompressed.hex(), sk1.public.uncompressed.hex()) == (v["pk0"], v["pk1"])
    assert secp.ecdh_x(sk0, sk1.public) == secp.ecdh_x(sk1, sk0.public) == UNHEX(v["dh_x"])


@pytest.mark.parametrize("v", vectors("ellswift_decode"), ids=lambda v: v["ellswift"][:16])
def test_every_bip324_encoding_decodes_to_its_full_point(v):
    point = secp.ellswift_decode(UNHEX(v["ellswift"]))
    assert point.uncompressed.hex() == v["full_point_uncompressed_derived"]
    assert point.uncompressed[1:33].hex() == v["x"]


def test_every_inverse_of_bip324_decodes_to_its_x_with_the_parity_of_t():
    checked = 0
    for v in vectors("xswiftec_inv"):
        for t in filter(None, v["t"]):
            point = secp.ellswift_decode(UNHEX(v["u"] + t)).uncompressed
            assert point[1:33].hex() == v["x"]
            assert point[64] % 2 == int(t, 16) % P % 2
            checked += 1
    assert checked == 98


@pytest.mark.parametrize("v", vectors("ellswift_pair"), ids=lambda v: v["ellswift_ours"][:16])
def test_bip324_peers_agree_on_the_shared_x(v):
    ours, theirs = secp.ellswift_decode(UNHEX(v["ellswift_ours"])), secp.ellswift_decode(UNHEX(v["ellswift_theirs"]))
    secret = SecretKey(UNHEX(v["priv_ours"]))
    assert ours.uncompressed[1:33].hex() == v["x_ours"] == secret.public.uncompressed[1:33].hex()
    assert theirs.uncompressed[1:33].hex() == v["x_theirs"]
    assert secp.ecdh_x(secret, theirs).hex() == v["x_shared"]


@settings(max_examples=60)
@given(scalars, st.integers(0, 1000))
def test_what_is_encoded_decodes_to_the_same_point_y_included(secret, seed):
    negated = SecretKey((N - int.from_bytes(secret.reveal(), "big")).to_bytes(32, "big"))
    for key in (secret, negated):
        encoded = secp.ellswift_encode(key.public, Seeded(seed))
        assert len(encoded) == 64
        assert secp.ellswift_decode(encoded) == key.public
    assert secret.public != negated.public


def test_no_two_encodings_of_a_point_are_equal():
    public, rng = SecretKey.generate(Seeded(1)).public, Seeded(2)
    assert len({secp.ellswift_encode(public, rng) for _ in range(128)}) == 128


def test_no_bit_of_the_encodings_of_fresh_keys_is_constant():
    rng = Seeded(2)
    ones = zeros = 0
    for _ in range(128):
        number = int.from_bytes(secp.ellswift_encode(SecretKey.generate(rng).public, rng), "big")
        ones |= number
        zeros |= ~number
    every_bit = (1 << 512) - 1
    assert ones == every_bit
    assert zeros & every_bit == every_bit


@pytest.mark.parametrize("size", [*range(64), 65, 128])
def test_an_elligatorswift_key_of_another_length_is_refused(size):
    with pytest.raises(BadCiphertext):
        secp.ellswift_decode(bytes(size))


@settings(max_examples=60)
@given(st.binary(min_size=64, max_size=64))
def test_every_64_bytes_decode_to_some_point(data):
    public = secp.ellswift_decode(data)
    assert PublicKey.parse(public.uncompressed) == public


@settings(max_examples=50)
@given(scalars)
def test_a_public_key_reads_back_from_both_its_forms(secret):
    public = secret.public
    assert PublicKey.parse(public.compressed) == PublicKey.parse(public.uncompressed) == public
    assert PublicKey.parse(public.compressed).uncompressed == public.uncompressed
    assert PublicKey.parse(bytearray(public.uncompressed)).compressed == public.compressed
    assert (len(public.compressed), len(public.uncompressed)) == (33, 65)
    assert hash(PublicKey.parse(public.compressed)) == hash(public)


@settings(max_examples=200)
@given(st.binary(max_size=70))
def test_any_bytes_are_a_public_key_or_refused(data):
    try:
        public = PublicKey.parse(data)
    except BadCiphertext:
        return
    assert data in (public.compressed, public.uncompressed)


def test_malformed_public_keys_are_refused():
    good = SecretKey.generate(Seeded(3)).public
    x, y = good.uncompressed[1:33], good.uncompressed[33:]
    hybrid = bytes([6 + y[31] % 2])
    bad = [
        b"",
        b"\x00",
        hybrid + x + y,
        b"\x05" + x,
        b"\x04" + x,
        b"\x02" + x + y,
        b"\x04" + y + x,
        b"\x04" + x + bytes(32),
        b"\x02" + bytes(32),
        b"\x02" + P.to_bytes(32, "big"),
        b"\x03" + b"\xff" * 32,
        bytes(33),
        bytes(65),
        good.compressed + b"\x00",
        good.compressed[:-1],
        good.uncompressed + b"\x00",
    ]
    for data in bad:
        with pytest.raises(BadCiphertext):
            PublicKey.parse(data)


def test_a_public_key_is_a_value():
    public = SecretKey.generate(Seeded(4)).public
    assert pickle.loads(pickle.dumps(public)) == public
    assert copy.deepcopy(public) is copy.copy(public) is public
    assert public != public.compressed
    assert len(repr(public)) < 30


@pytest.mark.parametrize("number", [0, N, N + 1, 2**256 - 1])
def test_a_scalar_out_of_range_is_refused(number):
    with pytest.raises(WrongUsage):
        SecretKey(number.to_bytes(32, "big"))


@pytest.mark.parametrize("secret", [b"", b"\x01" * 31, b"\x01" * 33, bytearray(b"\x01" * 32), "01" * 32, None])
def test_what_is_not_32_bytes_is_no_secret_key(secret):
    with pytest.raises(WrongUsage):
        SecretKey(secret)


def test_the_ends_of_the_scalar_range_are_keys_of_opposite_y():
    one, last = SecretKey((1).to_bytes(32, "big")), SecretKey((N - 1).to_bytes(32, "big"))
    assert one.public.compressed[1:] == last.public.compressed[1:]
    assert one.public.compressed[0] != last.public.compressed[0]


def test_a_secret_key_has_no_face():
    key = SecretKey.generate(Seeded(5))
    for text in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert key.reveal().hex() not in text
        assert str(key.reveal()) not in text
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(WrongUsage):
            pickle.dumps(key, protocol)
    assert copy.copy(key) is copy.deepcopy(key) is key
    assert not hasattr(key, "__dict__")


def test_secret_keys_compare_by_their_scalar():
    key = SecretKey.generate(Seeded(6))
    same, other = SecretKey(key.reveal()), SecretKey.generate(Seeded(7))
    assert key == same
    assert hash(key) == hash(same)
    assert key != other
    assert key != key.reveal()


def test_generating_draws_32_bytes_and_draws_again_when_they_are_no_scalar():
    good = (5).to_bytes(32, "big")
    rng = Fixed(bytes(32), b"\xff" * 32, N.to_bytes(32, "big"), good, b"unused")
    key = SecretKey.generate(rng)
    assert key == SecretKey(good)
    assert key.public == SecretKey(good).public
    assert rng.draws == [b"unused"]


class Short:
    def token(self, size: int) -> bytes:
        return bytes(size - 1)

    def below(self, limit: int) -> int:
        return 0


def test_randomness_of_the_wrong_size_is_noticed():
    public = SecretKey.generate(Seeded(8)).public
    with pytest.raises(OurMistake):
        SecretKey.generate(Short())
    with pytest.raises(OurMistake):
        secp.ellswift_encode(public, Short())
