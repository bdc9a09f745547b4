"""OHTTP against byte-exact worked examples, key configurations in every form, and damage to every byte."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadCiphertext, OurMistake, PeerMistake, WrongUsage
from pjv2.wire import bhttp, ohttp
from pjv2.wire.ohttp import Gateway, KeyConfig, WrongSize, decode_allowed_purposes
from pjv2.wire.secp import PublicKey, SecretKey
from tests.unit.wire.kit import UNHEX, Fixed, Seeded, corrupted, derived, named, truncated, vectors

(FRAGMENT_VECTOR,) = vectors("ohttp_keys")
CONFIG = UNHEX(FRAGMENT_VECTOR["full_key_config_hex"])
POINT = CONFIG[3:68]
GATEWAY = Gateway(SecretKey(UNHEX(derived("ohttp_gateway")["sk"])))
REQUESTS = [(name, derived(name)["request"]) for name in ("ohttp_post_original", "ohttp_get_receiver")]
RESPONSES = [
    (name, which, derived(name)[which])
    for name in ("ohttp_post_original", "ohttp_get_receiver")
    for which in derived(name)
    if which != "request"
]


def padded(request) -> bytes:
    return UNHEX(request["bhttp_unpadded_hex"]).ljust(8104, bytes([request["padding_byte"]]))


def envelope(seed: int = 0):
    return ohttp.encapsulate(GATEWAY.keys, Seeded(seed).token(8104), Seeded(seed))


@pytest.mark.parametrize(("name", "v"), REQUESTS)
def test_a_request_is_encapsulated_byte_for_byte(name, v):
    data, _ = ohttp.encapsulate(GATEWAY.keys, padded(v), Fixed(UNHEX(v["ephemeral_sk"])))
    assert data[:7].hex() == v["hdr"]
    assert data[7:72].hex() == v["enc"]
    assert data.hex() == v["encapsulated_hex"]
    assert hashlib.sha256(data).hexdigest() == v["encapsulated_sha256"]
    assert GATEWAY.open(data)[0] == padded(v)


@pytest.mark.parametrize(("name", "which", "v"), RESPONSES)
def test_a_response_is_encapsulated_and_opened_byte_for_byte(name, which, v):
    request = derived(name)["request"]
    data, opener = ohttp.encapsulate(GATEWAY.keys, padded(request), Fixed(UNHEX(request["ephemeral_sk"])))
    _, sealer = GATEWAY.open(data)
    bhttp_response = UNHEX(v["bhttp_unpadded_hex"]).ljust(8144, b"\x00")
    sealed = sealer.seal(bhttp_response, Fixed(UNHEX(v["response_nonce"])))
    assert sealed.hex() == v["encapsulated_hex"]
    assert hashlib.sha256(sealed).hexdigest() == v["encapsulated_sha256"]
    assert opener.open(sealed) == bhttp_response
    assert bhttp.decode_response(opener.open(sealed)).status == int(which.split("_")[1])


def test_the_sizes_add_up():
    assert ohttp.ENCAPSULATED_BYTES == 7 + 65 + ohttp.PADDED_BHTTP_REQUEST_BYTES + 16 == 8192
    assert ohttp.ENCAPSULATED_BYTES == 32 + ohttp.PADDED_BHTTP_RESPONSE_BYTES + 16


def test_a_conversation_goes_there_and_back():
    data, opener = envelope()
    request, sealer = GATEWAY.open(data)
    answer = sealer.seal(bytes(8144), Seeded(3))
    assert (len(data), len(answer)) == (8192, 8192)
    assert request == Seeded(0).token(8104)
    assert opener.open(answer) == bytes(8144)


def test_no_envelope_is_made_twice():
    request, rng = bytes(8104), Seeded(4)
    made = [ohttp.encapsulate(GATEWAY.keys, request, rng)[0] for _ in range(20)]
    assert len({data[7:72] for data in made}) == len({data[72:] for data in made}) == 20
    _, sealer = GATEWAY.open(made[0])
    assert sealer.seal(bytes(8144), rng) != sealer.seal(bytes(8144), rng)


def test_a_request_damaged_in_any_byte_is_refused():
    data, _ = envelope()
    for damaged in corrupted(data):
        with pytest.raises(BadCiphertext):
            GATEWAY.open(damaged)


def test_an_answer_damaged_in_any_byte_is_refused():
    data, opener = envelope()
    answer = GATEWAY.open(data)[1].seal(bytes(8144), Seeded(5))
    for damaged in corrupted(answer):
        with pytest.raises(BadCiphertext):
            opener.open(damaged)
    assert opener.open(answer) == bytes(8144)


def test_anything_but_8192_bytes_is_told_apart_from_a_damaged_answer():
    data, opener = envelope()
    for size in (*range(8192), 8193, 65536):
        with pytest.raises(WrongSize):
            opener.open(data[:size].ljust(size, b"\x00"))
        with pytest.raises(WrongSize):
            GATEWAY.open(data[:size].ljust(size, b"\x00"))


def test_the_answer_to_another_request_does_not_open():
    (first, opener), (second, _) = envelope(1), envelope(2)
    with pytest.raises(BadCiphertext):
        opener.open(GATEWAY.open(second)[1].seal(bytes(8144), Seeded(6)))
    assert opener.open(GATEWAY.open(first)[1].seal(bytes(8144), Seeded(6))) == bytes(8144)


def test_another_gateway_or_key_id_cannot_open_a_request():
    data, _ = envelope()
    for gateway in (Gateway(SecretKey.generate(Seeded(7))), Gateway(GATEWAY._secret, key_id=2)):
        with pytest.raises(BadCiphertext):
            gateway.open(data)
    rebadged = bytes([2]) + data[1:]
    with pytest.raises(BadCiphertext):
        Gateway(GATEWAY._secret, key_id=2).open(rebadged)


@pytest.mark.parametrize("size", [0, 1, 8103, 8105, 8192])
def test_requests_and_answers_of_another_size_are_our_mistake(size):
    with pytest.raises(WrongUsage):
        ohttp.encapsulate(GATEWAY.keys, bytes(size), Seeded())
    with pytest.raises(WrongUsage):
        GATEWAY.open(envelope()[0])[1].seal(bytes(size), Seeded())


def test_an_answer_needs_all_its_randomness():
    class Short(Seeded):
        def token(self, size: int) -> bytes:
            return bytes(size - 1)

    with pytest.raises(OurMistake):
        GATEWAY.open(envelope()[0])[1].seal(bytes(8144), Short())


def test_what_opens_an_answer_hides_its_keys_and_is_not_stored():
    data, opener = envelope()
    _, sealer = GATEWAY.open(data)
    for secretive in (opener, sealer, GATEWAY):
        assert GATEWAY._secret.reveal().hex() not in repr(secretive)
        with pytest.raises(WrongUsage):
            pickle.dumps(secretive)
    with pytest.raises(WrongUsage):
        copy.copy(opener)


# Key configurations


def test_a_key_reads_from_its_full_form_and_from_a_fragment():
    keys = KeyConfig.parse(CONFIG)
    assert keys == KeyConfig.from_fragment(UNHEX(FRAGMENT_VECTOR["bytes"])) == KeyConfig(1, PublicKey.parse(POINT))
    assert keys.encode() == CONFIG
    assert keys.fragment().hex() == FRAGMENT_VECTOR["bytes"]
    assert (len(keys.encode()), len(keys.fragment())) == (74, 34)
    assert KeyConfig.parse(bytearray(CONFIG)) == keys


def test_the_test_gateway_has_the_published_key():
    assert GATEWAY.keys.encode().hex() == derived("ohttp_gateway")["key_config_hex"]


@settings(max_examples=30)
@given(st.integers(0, 255), st.integers(0, 10**6))
def test_any_key_reads_back(key_id, seed):
    keys = KeyConfig(key_id, SecretKey.generate(Seeded(seed)).public)
    assert KeyConfig.parse(keys.encode()) == KeyConfig.from_fragment(keys.fragment()) == keys
    assert KeyConfig.parse(b"\x00\x4a" + keys.encode()) == keys
    assert hash(KeyConfig.parse(keys.encode())) == hash(keys)


def config(suites: str, key_id: str = "01", kem: str = "0016", point: bytes = POINT) -> bytes:
    listed = UNHEX(suites)
    return UNHEX(key_id + kem) + point + len(listed).to_bytes(2, "big") + listed


def listed(*configs: bytes) -> bytes:
    return b"".join(len(c).to_bytes(2, "big") + c for c in configs)


X25519 = UNHEX(named("rfc9458_appendix_a")[0]["key_config"])


@pytest.mark.parametrize(
    "data",
    [
        config("00010003"),
        config("0001000100010003"),
        config("0001000300020001"),
        config("00ff00ff0001000300010002"),
        listed(config("00010003")),
        listed(X25519, config("00010003")),
        listed(config("00010001"), config("00010003")),
        listed(config("00010003"), X25519),
        listed(config("00010003"), config("00010003", key_id="02")),
        listed(config("00010003", point=b"\x04" + bytes(64)), config("00010003")),
    ],
)
def test_the_usable_suite_is_found_wherever_it_stands(data):
    assert KeyConfig.parse(data) == KeyConfig.parse(CONFIG)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x00\x00",
        X25519,
        listed(X25519),
        UNHEX(named("ohttp_derive_key_pair_x25519")[0]["expected_key_config"]),
        config(""),
        config("000100"),
        config("0001000300"),
        config("00010001"),
        config("00030001"),
        config("00000100030000"),
        config("00010003", kem="0010"),
        config("00010003", point=b"\x04" + bytes(64)),
        config("00010003", point=b"\x06" + POINT[1:]),
        config("00010003", point=b"\x07" + POINT[1:]),
        config("00010003", point=b"\x02" + POINT[1:]),
        CONFIG + b"\x00",
        listed(config("00010003")) + b"\x00",
        listed(config("00010003")) + b"\x00\x01",
        listed(config("00010001")),
        b"<html>not keys</html>",
        bytes(65603),
    ],
)
def test_a_configuration_without_a_usable_key_is_refused(data):
    with pytest.raises(PeerMistake):
        KeyConfig.parse(data)


def test_the_longest_configuration_is_read_and_one_byte_more_is_not():
    longest = config("00ff00ff" * 16382 + "00010003")
    assert len(longest) == 65602 == ohttp.MAX_KEY_CONFIG_BYTES
    assert KeyConfig.parse(longest) == KeyConfig.parse(CONFIG)
    with pytest.raises(PeerMistake, match="65603"):
        KeyConfig.parse(longest + b"\x00")


def test_a_configuration_cut_anywhere_or_damaged_is_a_key_or_refused():
    for form in (CONFIG, listed(CONFIG)):
        for cut in truncated(form):
            with pytest.raises(PeerMistake):
                KeyConfig.parse(cut)
        accepted = 0
        for damaged in corrupted(form):
            try:
                accepted += KeyConfig.parse(damaged) != KeyConfig.parse(CONFIG)
            except PeerMistake:
                continue
        assert accepted <= 1  # the key id can be any byte


@settings(max_examples=200)
@given(st.binary(max_size=120))
def test_any_bytes_are_a_key_configuration_or_refused(data):
    for candidate in (data, CONFIG[:3] + data, CONFIG[:68] + data, b"\x00\x4a" + data):
        try:
            keys = KeyConfig.parse(candidate)
        except PeerMistake:
            continue
        assert keys.encode()[1:68] in candidate


@pytest.mark.parametrize("size", [0, 1, 33, 35, 74])
def test_a_fragment_key_of_another_length_is_refused(size):
    with pytest.raises(PeerMistake):
        KeyConfig.from_fragment(UNHEX(FRAGMENT_VECTOR["bytes"]).ljust(size, b"\x00")[:size])


@pytest.mark.parametrize("key_id", [-1, 256])
def test_a_key_id_is_one_byte(key_id):
    with pytest.raises(WrongUsage):
        KeyConfig(key_id, GATEWAY.keys.public)


# Allowed purposes and fixed texts


@pytest.mark.parametrize("v", vectors("allowed_purposes"), ids=lambda v: v["hex"][:10] or "empty")
def test_allowed_purposes_are_read_as_published(v):
    if v["error"]:
        with pytest.raises(PeerMistake):
            decode_allowed_purposes(UNHEX(v["hex"]))
    else:
        assert [p.hex() for p in decode_allowed_purposes(UNHEX(v["hex"]))] == v["expected_elements_hex"]


def test_our_allowed_purposes_are_those_of_deployed_directories():
    (v,) = named("directory_allowed_purposes")
    assert ohttp.ALLOWED_PURPOSES.hex() == v["body_hex"]
    assert len(ohttp.ALLOWED_PURPOSES) == 45
    assert [p.decode() for p in decode_allowed_purposes(ohttp.ALLOWED_PURPOSES)] == v["strings"]
    assert v["content_type"] == ohttp.ALLOWED_PURPOSES_MEDIA_TYPE


def test_allowed_purposes_with_a_length_in_bytes_are_understood():
    assert decode_allowed_purposes(b"\x00\x2b" + ohttp.ALLOWED_PURPOSES[2:]) == (ohttp.BIP77_PURPOSE,)


@settings(max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_are_allowed_purposes_or_refused(data):
    try:
        purposes = decode_allowed_purposes(data)
    except PeerMistake:
        return
    assert b"".join(bytes([len(p)]) + p for p in purposes) == data[2:]


def test_allowed_purposes_cut_or_lengthened_are_refused():
    for damaged in [*truncated(ohttp.ALLOWED_PURPOSES), ohttp.ALLOWED_PURPOSES + b"\x00"]:
        with pytest.raises(PeerMistake):
            decode_allowed_purposes(damaged)


def test_the_problem_type_is_the_one_gateways_send():
    (v,) = named("directory_literal_bodies")
    assert ohttp.KEY_PROBLEM_TYPE in v["ohttp_key_rejected"]["body"]
