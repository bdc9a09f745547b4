"""Binary HTTP against RFC 9292's examples and a second implementation's tests; padding, truncation and any bytes at all."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadCiphertext, WrongUsage
from pjv2.wire import bhttp
from pjv2.wire.bhttp import Request, Response
from tests.unit.wire.kit import UNHEX, Fixed, Seeded, named, truncated, vectors

CONTROL = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=70)


def decode(data: bytes):
    return (bhttp.decode_request if data[0] in (0, 2) else bhttp.decode_response)(data)


def expectation(v):
    expected = v["expected"]
    return named("rfc9292_known_length_request")[0]["expected"] if "same_as" in expected else expected


@pytest.mark.parametrize("v", vectors("bhttp"), ids=lambda v: v["name"])
def test_published_messages_are_read(v):
    message = decode(UNHEX(v["hex"]))
    for name, value in expectation(v).items():
        if name == "content":
            assert message.body == value.encode()
        elif name in ("headers", "trailers"):
            assert getattr(message, name) == tuple(tuple(line) for line in value)
        elif name == "informational":
            assert message.informational == tuple(value)
        else:
            assert getattr(message, name) == value


@pytest.mark.parametrize("v", vectors("bhttp_error"), ids=lambda v: v["name"])
def test_published_errors_are_refused_without_reserving_memory(v):
    for read in (bhttp.decode_request, bhttp.decode_response):
        with pytest.raises(BadCiphertext):
            read(UNHEX(v["hex"]))


def test_a_request_is_written_as_bip77_writes_it():
    data = bhttp.encode_request("POST", "https", "payjo.in", "/E2EHG2QK00772", b"\xaa" * 7168, 8104, Fixed(0x5A))
    head = UNHEX("0004504f5354056874747073087061796a6f2e696e0e2f453245484732514b3030373732005c00")
    assert data == head + b"\xaa" * 7168 + b"\x00" + b"\x5a" * (8104 - 7208)
    assert len(head) + 7168 + 1 == 7208


@settings(max_examples=60)
@given(CONTROL, CONTROL, CONTROL, CONTROL, st.binary(max_size=300), st.integers(0, 90), st.integers(0, 99))
def test_a_request_reads_back_whatever_the_padding(method, scheme, authority, path, body, spare, seed):
    exact = 1 + sum(len(bhttp.encode_varint(len(x))) + len(x) for x in (method, scheme, authority, path, body)) + 2
    data = bhttp.encode_request(method, scheme, authority, path, body, exact + spare, Seeded(seed))
    assert len(data) == exact + spare
    assert bhttp.decode_request(data) == Request(method, scheme, authority, path, body)
    if exact:
        with pytest.raises(WrongUsage):
            bhttp.encode_request(method, scheme, authority, path, body, exact - 1, Seeded(seed))


@settings(max_examples=60)
@given(st.integers(200, 599), st.binary(max_size=300), st.integers(0, 90), st.binary(max_size=50))
def test_a_response_reads_back_whatever_the_padding(status, body, spare, padding):
    exact = 1 + 2 + 1 + len(bhttp.encode_varint(len(body))) + len(body) + 1
    data = bhttp.encode_response(status, body, exact + spare)
    assert data[exact:] == bytes(spare)
    assert bhttp.decode_response(data[:exact] + padding) == bhttp.decode_response(data) == Response(status, body)
    with pytest.raises(WrongUsage):
        bhttp.encode_response(status, body, exact - 1)


@pytest.mark.parametrize("v", vectors("bhttp"), ids=lambda v: v["name"])
def test_a_message_cut_anywhere_is_read_with_empty_ends_or_refused(v):
    for cut in truncated(UNHEX(v["hex"])):
        for read in (bhttp.decode_request, bhttp.decode_response):
            try:
                message = read(cut)
            except BadCiphertext:
                continue
            assert message.trailers == () or v["name"].startswith("rfc9292_known_length_response")


@settings(max_examples=300)
@given(st.integers(0, 4), st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(framing, data):
    for read in (bhttp.decode_request, bhttp.decode_response):
        for given_ in (data, bytes([framing]) + data):
            with contextlib.suppress(BadCiphertext):
                read(given_)


@pytest.mark.parametrize("number", [0, 1, 63, 64, 16383, 16384, 2**30 - 1, 2**30, 2**62 - 1])
def test_variable_length_integers_read_back_in_their_shortest_form(number):
    data = bhttp.encode_varint(number)
    assert bhttp._Reader(data).varint() == number
    assert len(data) == next(s for s in (1, 2, 4, 8) if number < 1 << (8 * s - 2))


def test_variable_length_integers_are_those_of_rfc_9000():
    for text, number in (
        ("c2197c5eff14e88c", 151288809941952652),
        ("9d7f3e7d", 494878333),
        ("7bbd", 15293),
        ("25", 37),
        ("4025", 37),
    ):
        assert bhttp._Reader(UNHEX(text)).varint() == number


@pytest.mark.parametrize("number", [-1, 2**62])
def test_numbers_outside_the_variable_length_range_are_refused(number):
    with pytest.raises(WrongUsage):
        bhttp.encode_varint(number)


@pytest.mark.parametrize("status", [0, 99, 100, 199, 600, 2**20])
def test_only_final_statuses_are_written(status):
    with pytest.raises(WrongUsage):
        bhttp.encode_response(status, b"", 100)


@pytest.mark.parametrize("status", [0, 20, 99, 600, 16384])
def test_a_status_that_http_does_not_have_is_refused(status):
    with pytest.raises(BadCiphertext):
        bhttp.decode_response(b"\x01" + bhttp.encode_varint(status) + bytes(3))


@pytest.mark.parametrize("text", ["\u00e9", "\ud800"])
def test_a_request_line_that_is_not_ascii_is_refused_both_ways(text):
    with pytest.raises(WrongUsage):
        bhttp.encode_request("GET", "https", text, "/", b"", 100, Seeded())
    with pytest.raises(BadCiphertext):
        bhttp.decode_request(b"\x00\x03GET\x05https\x01\xe9\x01/\x00\x00\x00")


@pytest.mark.parametrize("fields", [b"\x00\x01x", b"\x02:a\x01x", b"\x01a", b"\x01a\x05x", b"\x05a"])
def test_malformed_fields_are_refused(fields):
    with pytest.raises(BadCiphertext):
        bhttp.decode_response(b"\x01\x40\xc8" + bytes([len(fields)]) + fields + b"\x00\x00")


def test_an_indeterminate_message_without_its_terminators_is_refused():
    whole = UNHEX("0340c8" + "0161" + "0162" + "00" + "0178" + "00" + "00")
    assert bhttp.decode_response(whole) == Response(200, b"x", (("a", "b"),))
    for end in (len(whole) - 2, len(whole) - 3, len(whole) - 5):
        with pytest.raises(BadCiphertext):
            bhttp.decode_response(whole[:end])
