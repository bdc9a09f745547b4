"""Mailbox names, addresses of directories and relays, and whole envelopes as they leave."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadCiphertext, PeerMistake, WrongUsage
from pjv2.wire import _bech32, bhttp, mailbox
from pjv2.wire.mailbox import (
    MailboxReply,
    MailboxRequest,
    check_short_id,
    decode_request,
    encapsulate_request,
    encode_reply,
    normalise_directory,
    parse_gateway_path,
    relay_target,
    short_id,
)
from pjv2.wire.ohttp import Gateway, WrongSize
from pjv2.wire.secp import PublicKey, SecretKey
from tests.unit.wire.kit import UNHEX, Fixed, Seeded, derived, named, vectors

GATEWAY = Gateway(SecretKey(UNHEX(derived("ohttp_gateway")["sk"])))
KEYS = derived("keys")


@pytest.mark.parametrize("v", vectors("short_id"), ids=lambda v: v["encoded"])
def test_short_ids_are_written_as_published(v):
    assert _bech32.encode_data(UNHEX(v["bytes"])) == v["encoded"] == check_short_id(v["encoded"])
    assert _bech32.decode_data(v["encoded"]).hex() == v["bytes"]


def test_a_mailbox_is_named_by_the_hash_of_its_key():
    (example,) = named("bip77_example_uri")
    assert short_id(PublicKey.parse(UNHEX(example["rk_compressed_pk"]))) == example["short_id"]
    for role in ("receiver", "reply"):
        assert short_id(PublicKey.parse(UNHEX(KEYS[f"{role}_pk_compressed"]))) == KEYS[f"{role}_short_id"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "QQQQQQQQQQQQ",
        "QQQQQQQQQQQQQQ",
        "qqqqqqqqqqqqq",
        "QQQQQQQQQQQQq",
        "QQQQQQQQQQQQ1",
        "QQQQQQQQQQQQB",
        "QQQQQQQQQQQQI",
        "QQQQQQQQQQQQO",
        "QQQQQQQQQQQQ/",
        "QQQQQQQQQQQQ\n",
        "QQQQQQQQQQQQQ\n",
        "QQQQQQ%51QQQQQ",
        "ＱQQQQQQQQQQQQ",
    ],
)
def test_what_is_not_13_upper_case_characters_is_no_short_id(text):
    with pytest.raises(PeerMistake):
        check_short_id(text)


def test_the_alphabet_of_short_ids_is_that_of_bech32():
    for character in map(chr, range(128)):
        if character in _bech32._ALPHABET:
            assert check_short_id(character * 13)
        else:
            with pytest.raises(PeerMistake):
                check_short_id(character * 13)


# Bech32 without a checksum


def test_bech32_is_written_as_published_and_longer_data_still_reads():
    (v,) = vectors("bech32")
    assert _bech32.encode(v["hrp"], UNHEX(v["bytes"])) == v["expected_encoded"]
    assert _bech32.decode(v["expected_encoded"]) == (v["hrp"], UNHEX(v["bytes"]))
    longer = _bech32.decode(v["expected_encoded"] + "QQPP")
    assert longer[0] == v["hrp"]
    assert longer[1].startswith(UNHEX(v["bytes"]))


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_bech32_data_reads_back(data):
    text = _bech32.encode_data(data)
    assert _bech32.decode_data(text) == data
    assert len(text) == -(-8 * len(data) // 5)
    assert _bech32.decode(_bech32.encode("RK", data)) == ("RK", data)


def test_the_last_1_ends_the_prefix():
    assert _bech32.decode("EX10QQ1QQ") == ("EX10QQ", b"\x00")


@pytest.mark.parametrize("text", ["", "1", "Q", "1Q", "EX1b", "EX1I", "EX1 ", "EX1q"])
def test_what_is_not_bech32_is_refused(text):
    with pytest.raises(ValueError, match=r"1|bech32"):
        _bech32.decode(text)


# Addresses

DIRECTORIES = {
    "https://payjo.in": "https://payjo.in",
    "HTTPS://PAYJO.IN/": "https://payjo.in",
    "https://payjo.in:": "https://payjo.in",
    "https://payjo.in:8443/": "https://payjo.in:8443",
    "http://localhost:1234": "http://localhost:1234",
    "http://127.0.0.1:80": "http://127.0.0.1:80",
    "http://[::1]:8080/": "http://[::1]:8080",
    "http://[0:0:0:0:0:0:0:1]": "http://[::1]",
    "https://Some-Dir.Example.": "https://some-dir.example.",
}
NOT_DIRECTORIES = [
    "",
    "payjo.in",
    "//payjo.in",
    "https:payjo.in",
    "https:/payjo.in",
    "https://",
    "https:///",
    "https://:443",
    "ftp://payjo.in",
    "file:///etc/passwd",
    "https://payjo.in/dir",
    "https://payjo.in//",
    "https://payjo.in/?x",
    "https://payjo.in?",
    "https://payjo.in/#",
    "https://user@payjo.in",
    "https://user:pw@payjo.in",
    "https://a.onion:1@evil.com",
    "https://payjo.in:80@evil.com",
    "https://[::1]@evil.com",
    "https://payjo.in\\@evil.com",
    "https://payjo.in\\",
    "https://pay jo.in",
    " https://payjo.in",
    "https://payjo.in\n",
    "https://payjo.in\t",
    "https://payjo.in\x00",
    "https://payjo.in:12ab",
    "https://payjo.in:99999",
    "https://payjo.in:65536",
    "https://payjo.in:-1",
    "https://payjo.in:٣",
    "https://pay_jo.in",
    "https://payjo%2ein",
    "https://payjö.in",
    "https://-payjo.in",
    "https://payjo-.in",
    "https://payjo..in",
    "https://.",
    "https://" + "a" * 64 + ".in",
    "https://" + "a." * 127 + "in",
    "https://[::1",
    "https://::1",
    "https://[1:2:3:4:5:6:7:8:9]",
    "https://[fe80::1%25eth0]",
    "https://1.2.3",
    "https://1.2.3.256",
    "https://2130706433",
    "https://0x7f.1",
    "https://0x7f000001",
]


@pytest.mark.parametrize(("url", "normal"), DIRECTORIES.items())
def test_a_directory_has_one_spelling(url, normal):
    assert normalise_directory(url) == normal == normalise_directory(normal)


@pytest.mark.parametrize("url", NOT_DIRECTORIES)
def test_what_cannot_be_a_directory_is_refused(url):
    with pytest.raises(WrongUsage):
        normalise_directory(url)
    with pytest.raises(WrongUsage):
        relay_target("https://relay.example", url)


def test_the_relay_is_told_the_directorys_origin_and_nothing_else():
    (v,) = vectors("relay_url")
    assert relay_target(v["relay"], v["directory_endpoint"]) == v["expected"]
    assert (
        relay_target("https://relay.example/some/path?q", "HTTPS://PAYJO.IN/")
        == "https://relay.example/https://payjo.in/"
    )
    with pytest.raises(WrongUsage):
        relay_target("https://user@relay.example", "https://payjo.in")


@pytest.mark.parametrize("v", vectors("gateway_uri"), ids=lambda v: v["input"])
def test_a_relay_reads_the_gateway_as_published(v):
    for path in (f"/{v['input']}", f"/{v['input']}/"):
        if v.get("error"):
            with pytest.raises(PeerMistake):
                parse_gateway_path(path)
        else:
            assert parse_gateway_path(path) == v["normalised"]


@pytest.mark.parametrize(
    "path", ["", "/", "https://payjo.in", "/https://payjo.in/?x", "/https://a@b/", "/payjo.in:443"]
)
def test_a_path_that_names_no_gateway_is_refused(path):
    with pytest.raises(PeerMistake):
        parse_gateway_path(path)


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text):
    for candidate in (text, f"https://{text}", f"/https://{text}"):
        with contextlib.suppress(WrongUsage):
            assert normalise_directory(candidate).startswith("http")
        with contextlib.suppress(PeerMistake):
            assert parse_gateway_path(candidate).startswith("http")


# Envelopes


@pytest.mark.parametrize(
    ("name", "method", "which"), [("ohttp_post_original", "POST", "message_a_1"), ("ohttp_get_receiver", "GET", None)]
)
def test_a_whole_mailbox_request_is_made_byte_for_byte(name, method, which):
    v = derived(name)["request"]
    body = UNHEX(derived(which)["message_hex"]) if which else b""
    request = MailboxRequest(method, KEYS["receiver_short_id"], body)
    rng = Fixed(v["padding_byte"], UNHEX(v["ephemeral_sk"]))
    envelope, pending = encapsulate_request("HTTPS://PAYJO.IN", GATEWAY.keys, request, rng)
    assert envelope.hex() == v["encapsulated_hex"]
    assert decode_request(GATEWAY.open(envelope)[0]) == request
    for response, answer in derived(name).items():
        if response != "request":
            status = int(response.split("_")[1])
            assert pending.open(UNHEX(answer["encapsulated_hex"])) == MailboxReply(
                status, UNHEX(derived("message_a_1")["message_hex"]) if "message_a" in response else b""
            )


@settings(max_examples=25)
@given(
    st.sampled_from(["GET", "POST", "PUT"]),
    st.binary(min_size=8, max_size=8).map(_bech32.encode_data),
    st.binary(max_size=500),
    st.integers(200, 599),
    st.binary(max_size=500),
)
def test_a_request_and_its_answer_go_there_and_back(method, name, body, status, answer):
    rng = Seeded(1)
    request = MailboxRequest(method, name, body)
    envelope, pending = encapsulate_request("https://payjo.in", GATEWAY.keys, request, rng)
    assert len(envelope) == 8192
    opened, sealer = GATEWAY.open(envelope)
    assert decode_request(opened) == request
    reply = MailboxReply(status, answer)
    assert pending.open(sealer.seal(encode_reply(reply), rng)) == reply


def test_no_request_is_made_twice():
    rng = Seeded(2)
    request = MailboxRequest("GET", KEYS["receiver_short_id"])
    made = [encapsulate_request("https://payjo.in", GATEWAY.keys, request, rng)[0] for _ in range(10)]
    assert len(set(made)) == 10
    assert len({GATEWAY.open(envelope)[0] for envelope in made}) == 10


def test_the_envelope_does_not_show_method_mailbox_or_body():
    request = MailboxRequest("PUT", KEYS["receiver_short_id"], b"cHNidP8BAA")
    envelope, pending = encapsulate_request("https://payjo.in", GATEWAY.keys, request, Seeded(3))
    for part in (b"PUT", KEYS["receiver_short_id"].encode(), b"cHNidP8BAA", b"payjo.in"):
        assert part not in envelope
    assert "cHNidP8BAA" not in repr(request)
    assert "hidden" in repr(pending)


def test_a_body_that_does_not_fit_is_refused_with_both_sizes():
    fits = 8104 - 39
    request = MailboxRequest("PUT", KEYS["receiver_short_id"], bytes(fits))
    assert len(encapsulate_request("https://payjo.in", GATEWAY.keys, request, Seeded())[0]) == 8192
    with pytest.raises(WrongUsage, match=r"8105.*8104"):
        encapsulate_request(
            "https://payjo.in",
            GATEWAY.keys,
            MailboxRequest("PUT", KEYS["receiver_short_id"], bytes(fits + 1)),
            Seeded(),
        )
    with pytest.raises(WrongUsage):
        encode_reply(MailboxReply(200, bytes(8138)))
    assert len(encode_reply(MailboxReply(200, bytes(8137)))) == 8144


def test_an_answer_that_is_no_bhttp_is_refused():
    rng = Seeded(4)
    envelope, pending = encapsulate_request(
        "https://payjo.in", GATEWAY.keys, MailboxRequest("GET", KEYS["receiver_short_id"]), rng
    )
    _, sealer = GATEWAY.open(envelope)
    for junk in (bytes(8144), b"\xff" * 8144, b"\x01\x40\x20".ljust(8144, b"\x00")):
        with pytest.raises(BadCiphertext):
            pending.open(sealer.seal(junk, rng))
    with pytest.raises(WrongSize):
        pending.open(b"")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/QQQQQQQQQQQQQ"),
        ("get", "/QQQQQQQQQQQQQ"),
        ("", "/QQQQQQQQQQQQQ"),
        ("GET", "QQQQQQQQQQQQQ"),
        ("GET", "/"),
        ("GET", ""),
        ("GET", "/QQQQQQQQQQQQQ/"),
        ("GET", "/QQQQQQQQQQQQQ?x"),
        ("GET", "//QQQQQQQQQQQQ"),
    ],
)
def test_a_directory_refuses_what_is_no_mailbox_request(method, path):
    data = bhttp.encode_request(method, "https", "payjo.in", path, b"", 200, Seeded())
    with pytest.raises(PeerMistake):
        decode_request(data)


@settings(max_examples=100)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_mailbox_request_or_refused(data):
    try:
        request = decode_request(data)
    except PeerMistake:
        return
    assert request.method in ("GET", "POST", "PUT")


def test_the_gateways_path_is_well_known():
    assert mailbox.GATEWAY_PATH == "/.well-known/ohttp-gateway"
