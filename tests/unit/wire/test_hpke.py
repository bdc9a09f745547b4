"""HPKE against the k256 vectors (modes 0 to 3), and the menu: wrong key, wrong info, truncated, corrupted, empty."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadCiphertext, OurMistake, WrongUsage
from pjv2.wire import _aead, hpke
from pjv2.wire.hpke import Aead
from pjv2.wire.secp import PublicKey, SecretKey, ecdh_x
from tests.unit.wire.kit import UNHEX, Fixed, Seeded, corrupted, truncated, vectors

ALL = vectors("hpke")
OURS = [v for v in ALL if v["aead_id"] == 3]
EXPORT_ONLY = [v for v in ALL if v["aead_id"] == 0xFFFF]


def by_name(v):
    return v["name"]


def both_ends(v):
    """The sender's and the receiver's context of a vector, with the vector's ephemeral key."""
    receiver = SecretKey(UNHEX(v["skRm"]))
    sender = SecretKey(UNHEX(v["skSm"])) if "skSm" in v else None
    common = {"psk": UNHEX(v.get("psk", "")), "psk_id": UNHEX(v.get("psk_id", "")), "aead": Aead(v["aead_id"])}
    info = UNHEX(v["info"])
    sealing = hpke.setup_s(receiver.public, info, Fixed(UNHEX(v["skEm"])), sender=sender, **common)
    opening = hpke.setup_r(
        PublicKey.parse(UNHEX(v["enc"])), receiver, info, sender=None if sender is None else sender.public, **common
    )
    return sealing, opening


@pytest.mark.parametrize("v", ALL, ids=by_name)
def test_key_pairs_are_derived_as_published(v):
    for ikm, secret, public in (("ikmR", "skRm", "pkRm"), ("ikmE", "skEm", "pkEm"), ("ikmS", "skSm", "pkSm")):
        if ikm in v:
            key = hpke.derive_key_pair(UNHEX(v[ikm]))
            assert (key.reveal().hex(), key.public.uncompressed.hex()) == (v[secret], v[public])


@pytest.mark.parametrize("v", ALL, ids=by_name)
def test_the_kem_shares_the_published_secret_whatever_the_aead(v):
    ephemeral, receiver = SecretKey(UNHEX(v["skEm"])), SecretKey(UNHEX(v["skRm"]))
    dh = ecdh_x(ephemeral, receiver.public)
    kem_context = ephemeral.public.uncompressed + receiver.public.uncompressed
    if "skSm" in v:
        sender = SecretKey(UNHEX(v["skSm"]))
        dh += ecdh_x(sender, receiver.public)
        kem_context += sender.public.uncompressed
    assert hpke._shared_secret(dh, kem_context).hex() == v["shared_secret"]


@pytest.mark.parametrize("v", OURS + EXPORT_ONLY, ids=by_name)
def test_the_key_schedule_and_the_exports_are_as_published(v):
    sealing, opening = both_ends(v)
    context = hpke.key_schedule_context(Aead(v["aead_id"]), v["mode"], UNHEX(v.get("psk_id", "")), UNHEX(v["info"]))
    assert context.hex() == v["key_schedule_context"]
    assert sealing.enc.hex() == v["enc"]
    assert sealing._secret.hex() == opening._secret.hex() == v["secret"]
    if v["aead_id"] == 3:
        assert (sealing._key.hex(), sealing._base_nonce.hex()) == (v["key"], v["base_nonce"])
    for export in v["exports"]:
        for end in (sealing, opening):
            assert end.export(UNHEX(export["exporter_context"]), export["L"]).hex() == export["exported_value"]


@pytest.mark.parametrize("v", OURS, ids=by_name)
def test_every_published_ciphertext_is_reproduced_and_opened_in_sequence(v):
    published = {e["seq"]: e for e in v["encryptions"]}
    assert {0, 1, 2, 4, 255, 256} <= set(published)
    sealing, opening = both_ends(v)
    for sequence in range(257):
        if (e := published.get(sequence)) is None:
            opening.open(sealing.seal(b""))
            continue
        plaintext, aad = UNHEX(e["pt"]), UNHEX(e["aad"])
        sealed = sealing.seal(plaintext, aad)
        assert sealed.hex() == e["ct"]
        assert opening.open(sealed, aad) == plaintext


@pytest.mark.parametrize("v", EXPORT_ONLY, ids=by_name)
def test_an_export_only_context_neither_seals_nor_opens(v):
    sealing, opening = both_ends(v)
    with pytest.raises(WrongUsage):
        sealing.seal(b"")
    with pytest.raises(WrongUsage):
        opening.open(bytes(16))


def ends(mode: str, *, info: bytes = b"info", other_info: bytes = b"info", seed: int = 0):
    rng = Seeded(seed)
    receiver, sender = SecretKey.generate(rng), SecretKey.generate(rng)
    auth = mode == "auth"
    sealing = hpke.setup_s(receiver.public, info, rng, sender=sender if auth else None)
    opening = hpke.setup_r(PublicKey.parse(sealing.enc), receiver, other_info, sender=sender.public if auth else None)
    return sealing, opening


@settings(max_examples=25)
@given(st.sampled_from(["base", "auth"]), st.binary(max_size=64), st.binary(max_size=300), st.binary(max_size=40))
def test_what_one_end_seals_the_other_opens(mode, info, plaintext, aad):
    sealing, opening = ends(mode, info=info, other_info=info)
    sealed = sealing.seal(plaintext, aad)
    assert len(sealed) == len(plaintext) + 16
    assert opening.open(sealed, aad) == plaintext


@pytest.mark.parametrize("mode", ["base", "auth"])
def test_damaged_bytes_never_open_and_the_context_waits_for_the_good_ones(mode):
    sealing, opening = ends(mode)
    sealed = sealing.seal(b"twenty byte of plain")
    for damaged in [*corrupted(sealed), *truncated(sealed), sealed + b"\x00", sealed * 2]:
        with pytest.raises(BadCiphertext):
            opening.open(damaged)
    with pytest.raises(BadCiphertext):
        opening.open(sealed, b"other aad")
    assert opening.open(sealed) == b"twenty byte of plain"
    with pytest.raises(BadCiphertext):
        opening.open(sealed)


@pytest.mark.parametrize("mode", ["base", "auth"])
def test_another_info_does_not_open(mode):
    sealing, opening = ends(mode, other_info=b"Info")
    with pytest.raises(BadCiphertext):
        opening.open(sealing.seal(b"x"))
    assert sealing.export(b"", 32) != opening.export(b"", 32)


def test_another_key_sender_or_mode_does_not_open():
    rng = Seeded(9)
    receiver, sender, stranger = (SecretKey.generate(rng) for _ in range(3))
    sealing = hpke.setup_s(receiver.public, b"", rng, sender=sender)
    sealed = sealing.seal(b"x")
    enc = PublicKey.parse(sealing.enc)
    for key, by in ((stranger, sender.public), (receiver, stranger.public), (receiver, None), (receiver, enc)):
        with pytest.raises(BadCiphertext):
            hpke.setup_r(enc, key, b"", sender=by).open(sealed)
    with pytest.raises(BadCiphertext):
        hpke.setup_r(stranger.public, receiver, b"", sender=sender.public).open(sealed)
    assert hpke.setup_r(enc, receiver, b"", sender=sender.public).open(sealed) == b"x"


def test_a_nonce_is_never_used_twice():
    sealing, opening = ends("base")
    assert len({sealing.seal(b"same") for _ in range(100)}) == 100
    for end in (sealing, opening):
        end._sequence = 1 << 96
    with pytest.raises(WrongUsage):
        sealing.seal(b"")
    with pytest.raises(WrongUsage):
        opening.open(bytes(16))


def test_half_a_pre_shared_key_is_refused():
    receiver = SecretKey.generate(Seeded(1))
    for half in ({"psk": b"k"}, {"psk_id": b"i"}):
        with pytest.raises(WrongUsage):
            hpke.setup_s(receiver.public, b"", Seeded(2), **half)
        with pytest.raises(WrongUsage):
            hpke.setup_r(receiver.public, receiver, b"", **half)


def test_hkdf_is_that_of_rfc_5869():
    prk = hpke.hkdf_extract(bytes(range(13)), b"\x0b" * 22)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    okm = hpke.hkdf_expand(prk, bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert len(hpke.hkdf_expand(prk, b"", 255 * 32)) == 255 * 32
    with pytest.raises(WrongUsage):
        hpke.hkdf_expand(prk, b"", 255 * 32 + 1)


def test_contexts_hide_their_keys():
    for end in ends("auth"):
        assert "hidden" in repr(end)
        with pytest.raises(WrongUsage):
            pickle.dumps(end)


def test_the_cipher_refuses_keys_and_nonces_of_another_size():
    for key, nonce in ((bytes(31), bytes(12)), (bytes(32), bytes(11)), (bytes(33), bytes(12)), (bytes(32), bytes(24))):
        with pytest.raises(OurMistake):
            _aead.seal(key, nonce, b"")
        with pytest.raises(OurMistake):
            _aead.open_(key, nonce, bytes(16))


def test_the_cipher_is_that_of_rfc_8439():
    key, nonce = bytes(range(0x80, 0xA0)), UNHEX("070000004041424344454647")
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    sealed = _aead.seal(key, nonce, text, UNHEX("50515253c0c1c2c3c4c5c6c7"))
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
    assert _aead.open_(key, nonce, sealed, UNHEX("50515253c0c1c2c3c4c5c6c7")) == text
