"""Payment URIs: every published one, each rule of BIP21, BIP321 and BIP77, and any text at all."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadUri, WrongUsage
from pjv2.units import MAX_MONEY
from pjv2.wire import _bech32, uri
from pjv2.wire.mailbox import short_id
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey
from pjv2.wire.uri import Fragment, PjUri, V1Endpoint, V2Endpoint, format_uri, parse_fragment, parse_uri
from tests.unit.wire.kit import UNHEX, Seeded, derived, named, vectors

ADDRESS = "12c6DSiU4Rq3P4ZxziKxzrL5LmMBrzjrJX"
EX, OH = "EX1C4UC6ES", "OH1QYPM5JXYNS754Y4R45QWE336QFX6ZR8DQGVQCULVZTV20TFVEYDMFQC"
RK = "RK1Q0DJS3VVDXWQQTLQ8022QGXSX7ML9PHZ6EDSF6AKEWQG758JPS2EV"
ID = "TXJCGKTKXLUUZ"
FRAGMENT = f"{EX}-{OH}-{RK}"
V2_URL = f"HTTPS://EXAMPLE.COM/{ID}%23{FRAGMENT}"


def with_pj(url: str, rest: str = "") -> str:
    return f"bitcoin:{ADDRESS}?pj={url}{rest}"


# Published URIs


@pytest.mark.parametrize("v", vectors("uri"), ids=lambda v: v["name"])
def test_published_uris_are_read(v):
    parsed = parse_uri(v["uri"])
    if "payjoin_supported" in v:
        assert parsed.endpoint is None
    elif v.get("version") == 1 or "output_substitution" in v:
        assert isinstance(parsed.endpoint, V1Endpoint)
    else:
        assert isinstance(parsed.endpoint, V2Endpoint)
        assert parsed.endpoint.short_id == ID
    if "output_substitution" in v:
        assert parsed.output_substitution is (v["output_substitution"] == "Enabled")
    if "canonical" in v or v.get("roundtrip"):
        assert format_uri(parsed) == v.get("canonical", v["uri"])


def test_the_example_of_bip77_is_read_to_the_last_byte():
    (v,) = named("bip77_example_uri")
    parsed = parse_uri(v["uri"])
    assert parsed.address == v["address"]
    assert parsed.amount == 666_666
    assert parsed.output_substitution is False
    endpoint = parsed.endpoint
    assert isinstance(endpoint, V2Endpoint)
    assert endpoint.directory == "https://payjo.in"
    assert endpoint.short_id == v["short_id"]
    assert endpoint.expires == v["ex_unix_time"]
    assert (endpoint.keys.key_id, endpoint.keys.public.compressed.hex()) == (v["oh_key_id"], v["oh_compressed_pk"])
    assert endpoint.receiver.compressed.hex() == v["rk_compressed_pk"]
    assert format_uri(parsed) == v["uri"]


def test_the_published_parameters_are_read():
    (v,) = named("uri_v2_valid_roundtrip")
    endpoint = parse_uri(v["uri"]).endpoint
    assert isinstance(endpoint, V2Endpoint)
    assert endpoint.expires == v["parsed"]["EX_unix"]
    assert endpoint.expires.to_bytes(4, "little").hex() == v["parsed"]["EX_hex"]
    assert endpoint.keys.fragment().hex() == v["parsed"]["OH_hex"]
    assert endpoint.receiver.compressed.hex() == v["parsed"]["RK_hex"]


@pytest.mark.parametrize("v", vectors("uri_error"), ids=lambda v: v["error"])
def test_published_errors_are_refused(v):
    with pytest.raises(BadUri):
        parse_uri(v["uri"])


@pytest.mark.parametrize("text", [u for v in vectors("uri_list") for u in v["uris"]])
def test_lists_of_published_uris_are_read_unless_a_rule_forbids(text):
    address, _, query = text.partition(":")[2].partition("?")
    keys = [piece.partition("=")[0].lower() for piece in query.split("&")]
    forbidden = (
        not address.isalnum()
        or any(key.startswith("req-") for key in keys)
        or any(keys.count(key) > 1 for key in ("amount", "label", "message", "pj", "pjos"))
        or ("pjos" in keys and "pj" not in keys)
    )
    if forbidden:
        with pytest.raises(BadUri):
            parse_uri(text)
    else:
        assert parse_uri(text).address == address


def test_what_bip21_says_is_read():
    (v,) = named("bip_0021_uris")
    parsed = parse_uri(v["uris"][3])
    assert (parsed.amount, parsed.label, parsed.message) == (50 * 10**8, "Luke-Jr", "Donation for project xyz")
    assert parse_uri(v["uris"][2]).amount == 2_030_000_000
    assert parse_uri(v["uris"][5]).other == (("somethingyoudontunderstand", "50"), ("somethingelseyoudontget", "999"))


@pytest.mark.parametrize("v", vectors("endpoint"), ids=lambda v: v["url"])
def test_a_v1_endpoint_is_encrypted_or_an_onion(v):
    if v["accepted"]:
        assert parse_uri(with_pj(v["url"])).endpoint == V1Endpoint(v["url"] + "/")
    else:
        with pytest.raises(BadUri):
            parse_uri(with_pj(v["url"]))


@pytest.mark.parametrize("address", vectors("address_list")[0]["addresses"])
def test_published_addresses_are_kept_as_they_are(address):
    (v,) = vectors("address_list")
    parsed = parse_uri(f"bitcoin:{address}?{v['default_query']}")
    assert (parsed.address, parsed.amount, parsed.output_substitution) == (address, 10**8, False)


# The fragment


@pytest.mark.parametrize("v", vectors("fragment"), ids=lambda v: v["name"])
def test_published_fragments_are_read_and_written_in_order(v):
    assert uri.format_fragment(parse_fragment(v["fragment"])) == v["normalised_on_set"]


@pytest.mark.parametrize("v", vectors("fragment_error"), ids=lambda v: v["error"] + v.get("fragment", "")[:12])
def test_published_fragment_errors_are_refused_or_leave_a_v1_endpoint(v):
    if "url" in v:
        parsed = parse_uri(with_pj(v["url"].replace("#", "%23")))
        assert parsed.endpoint == V1Endpoint(v["url"].partition("#")[0])
    else:
        with pytest.raises(BadUri):
            parse_fragment(v["fragment"])


def test_the_expiry_is_little_endian():
    (v,) = vectors("fragment_param")
    assert parse_fragment(v["encoded"]).expires == v["unix_time"]
    assert uri.format_fragment(Fragment(expires=v["unix_time"])) == v["encoded"]


def test_a_published_ohttp_key_reads_and_writes():
    (v,) = vectors("ohttp_keys")
    keys = parse_fragment(v["encoded"]).keys
    assert keys is not None
    assert keys.encode().hex() == v["full_key_config_hex"]
    assert uri.format_fragment(Fragment(keys=keys)) == v["encoded"]
    assert (
        uri.format_fragment(Fragment(keys=KeyConfig.parse(UNHEX(derived("ohttp_gateway")["key_config_hex"]))))
        == (derived("ohttp_gateway")["OH_fragment"])
    )
    assert parse_fragment(derived("keys")["RK_fragment"]).receiver == (
        SecretKey(UNHEX(derived("keys")["receiver_sk"])).public
    )


@pytest.mark.parametrize("order", [(EX, RK, OH), (OH, EX, RK), (RK, OH, EX), ("ZZ1QQ", RK, OH, EX, "X")])
@pytest.mark.parametrize("separator", ["-", "%2B", "+"])
def test_parameters_are_read_in_any_order_with_either_separator(order, separator):
    parsed = parse_uri(with_pj(f"HTTPS://EXAMPLE.COM/{ID}%23{separator.join(order)}"))
    assert parsed.endpoint == parse_uri(with_pj(V2_URL)).endpoint


def test_the_first_of_two_parameters_counts():
    later = uri.format_fragment(Fragment(expires=2_000_000_000))
    assert parse_fragment(f"{EX}-{later}").expires == 1720547781
    assert parse_fragment(f"{later}-{EX}").expires == 2_000_000_000


def bech(name: str, data: bytes) -> str:
    return _bech32.encode(name, data)


KEY = UNHEX("03db28458c699c002fe03bd4a020d037b7f286e2d65b04ebb6cb808f50f20c1596")


@pytest.mark.parametrize(
    "fragment",
    [
        FRAGMENT.replace("-", "+", 1),
        FRAGMENT.replace(EX, bech("EX", (499_999_999).to_bytes(4, "little"))),
        FRAGMENT.replace(EX, bech("EX", bytes(4))),
        FRAGMENT.replace(EX, bech("EX", bytes(3))),
        FRAGMENT.replace(EX, bech("EX", b"\xff" * 5)),
        FRAGMENT.replace(EX, EX + "Q"),
        FRAGMENT.replace(EX, EX[:-1]),
        FRAGMENT.replace(EX, EX[:-1] + "3"),
        FRAGMENT.replace(EX, EX[:-1] + "B"),
        FRAGMENT.replace(EX, "EX1010"),
        FRAGMENT.replace(RK, bech("RK", b"\x02" + b"\xff" * 32)),
        FRAGMENT.replace(RK, bech("RK", b"\x04" + KEY[1:])),
        FRAGMENT.replace(RK, bech("RK", KEY[:32])),
        FRAGMENT.replace(RK, bech("RK", KEY + b"\x00")),
        FRAGMENT.replace(RK, RK + "Q"),
        FRAGMENT.replace(RK, "RK1"),
        FRAGMENT.replace(OH, bech("OH", b"\x01" + bytes(33))),
        FRAGMENT.replace(OH, bech("OH", b"\x00\x01" + KEY)),
        FRAGMENT.replace(OH, bech("OH", KEY)),
        FRAGMENT.replace(OH, OH[:-1]),
        FRAGMENT.replace(OH, "XOH1QQ"),
        FRAGMENT.replace(RK, bech("RK", SecretKey.generate(Seeded(1)).public.compressed)),
        FRAGMENT.lower(),
        FRAGMENT[:-1] + "v",
        FRAGMENT + "-_",
        FRAGMENT + "-%25",
        FRAGMENT + "-%20",
        FRAGMENT + "-%C3%89",
        "",
    ],
)
def test_a_damaged_fragment_is_refused(fragment):
    with pytest.raises(BadUri):
        parse_uri(with_pj(f"HTTPS://EXAMPLE.COM/{ID}%23{fragment}"))


def test_an_expiry_up_to_2106_is_read():
    for expires in (500_000_000, 0xFFFFFFFF):
        assert parse_fragment(uri.format_fragment(Fragment(expires=expires))).expires == expires
    for expires in (499_999_999, 0, -1, 0x100000000):
        with pytest.raises(WrongUsage):
            uri.format_fragment(Fragment(expires=expires))


def test_a_mailbox_whose_fragment_was_cut_off_is_not_taken_for_a_server():
    for text in (
        with_pj(f"HTTPS://EXAMPLE.COM/{ID}"),
        with_pj(V2_URL.replace("%23", "#")),
        with_pj(f"https://a.b/{ID}?x=1"),
    ):
        with pytest.raises(BadUri, match="%23"):
            parse_uri(text)


def test_a_mailbox_of_another_key_is_refused():
    with pytest.raises(BadUri, match="belong together"):
        parse_uri(with_pj(V2_URL.replace(ID, "QQQQQQQQQQQQQ")))


@pytest.mark.parametrize(
    "path", ["", "/", f"/{ID.lower()}", f"/{ID}/", f"/dir/{ID}", f"/{ID}Q", f"/{ID[:-1]}", "/BTC/pj"]
)
def test_a_path_that_is_no_short_id_is_a_v1_server(path):
    parsed = parse_uri(with_pj(f"HTTPS://EXAMPLE.COM{path}%23{FRAGMENT}"))
    assert parsed.endpoint == V1Endpoint(f"https://example.com{path or '/'}")


def test_a_mailbox_may_be_served_over_http_and_a_v1_server_may_not():
    endpoint = parse_uri(with_pj(V2_URL.replace("HTTPS://EXAMPLE.COM", "http://localhost:1234"))).endpoint
    assert isinstance(endpoint, V2Endpoint)
    assert endpoint.directory == "http://localhost:1234"
    with pytest.raises(BadUri, match="not encrypted"):
        parse_uri(with_pj("http://localhost:1234/pj"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://ABC.ONION/pj", "http://abc.onion/pj"),
        ("HTTPS://Example.Com", "https://example.com/"),
        ("https://example.com:8443/A/b?Q=%2531%26x#frag", "https://example.com:8443/A/b?Q=%31"),
        ("https://example.com/?", "https://example.com/?"),
        ("https://example.com/a@b?c@d", "https://example.com/a@b?c@d"),
        ("https://[0:0::1]:443/x", "https://[::1]:443/x"),
    ],
)
def test_a_v1_url_keeps_path_and_query_and_loses_case_of_host_and_fragment(url, expected):
    escaped = url.replace("&", "%26").replace("#", "%23") if "%26" not in url else url.partition("%26")[0]
    assert parse_uri(with_pj(escaped)).endpoint == V1Endpoint(expected)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "/pj",
        "https:",
        "https://",
        "https:///pj",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "ftp://example.onion/",
        "ws://example.com/",
        "https://user@example.com/pj",
        "https://user:pw@example.com/pj",
        "http://x.onion:1@evil.com/pj",
        "http://x.onion%40evil.com/pj",
        "https://example.com:80@evil.com/pj",
        "https://[::1]@evil.com/",
        "http://evil.com%5C.onion/",
        "https://example.com%5C@evil.com/",
        "https://exa%20mple.com/",
        "https://example.com/%0A",
        "https://example.com/a%20b",
        "https://example.com%00/",
        "https://example.com:12ab/",
        "https://example.com:99999/",
        "https://exam_ple.com/",
    ],
)
def test_a_url_that_could_lead_elsewhere_is_refused(url):
    for tail in ("", "/", f"/{ID}%23{FRAGMENT}"):
        with pytest.raises(BadUri):
            parse_uri(with_pj(url + tail))


@pytest.mark.parametrize("url", ["http://x.onion.evil.com/", "http://xonion/", "http://onion/", "http://x.onion./"])
def test_what_only_looks_like_an_onion_service_is_refused_in_clear(url):
    with pytest.raises(BadUri, match="not encrypted"):
        parse_uri(with_pj(url))
    assert isinstance(parse_uri(with_pj(f"{url}{ID}%23{FRAGMENT}")).endpoint, V2Endpoint)


def test_user_names_in_mailbox_urls_are_refused():
    for authority in ("user@example.com", "example.com:80@evil.com", "a:b@example.com:443", "@example.com"):
        with pytest.raises(BadUri, match="user name"):
            parse_uri(with_pj(f"https://{authority}/{ID}%23{FRAGMENT}"))


# Parameters


@pytest.mark.parametrize(
    ("text", "sats"),
    [
        ("0", 0),
        ("1", 10**8),
        ("1.", 10**8),
        (".5", 50_000_000),
        ("0.00000001", 1),
        ("20.3", 2_030_000_000),
        ("0.10000000", 10_000_000),
        ("21000000", MAX_MONEY),
        ("20999999.99999999", MAX_MONEY - 1),
        ("0000000001", 10**8),
        ("%31", 10**8),
    ],
)
def test_amounts_are_exact_decimals_of_bitcoin(text, sats):
    assert parse_uri(f"bitcoin:{ADDRESS}?amount={text}").amount == sats


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-1",
        "+1",
        "1,5",
        "1e3",
        "1E3",
        "0x1",
        "inf",
        "nan",
        "1_000",
        "%201",
        "1%20",
        "1%0A",
        "1.2.3",
        "0.000000001",
        "0.100000000",
        "21000000.00000001",
        "21000001",
        "9" * 16,
        "9" * 5000,
        "١",
        "1BTC",
        "1X8",
    ],
)
def test_other_amounts_are_refused(text):
    with pytest.raises(BadUri):
        parse_uri(f"bitcoin:{ADDRESS}?amount={text}")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "&",
        "amount=1&",
        "&amount=1",
        "amount=1&&label=a",
        "amount",
        "=1",
        "amount=1&amount=1",
        "amount=1&AMOUNT=2",
        "label=a&label=b",
        "message=a&message=b",
        "pj=https://a.b&pj=https://a.b",
        "pj=https://a.b&req-pj=https://a.b",
        "pj=https://a.b&PJ=https://a.b",
        "pj=https://a.b&pjos=0&pjos=0",
        "pj=https://a.b&pjos=2",
        "pj=https://a.b&pjos=",
        "pj=https://a.b&pjos=true",
        "pjos=0",
        "pjos=1",
        "req-x=1",
        "REQ-x=1",
        "req-=1",
        "req-amount=1",
        "label=%",
        "label=%2",
        "label=%zz",
        "label=%ff",
        "label=%C3",
        "label=\ud800",
        "la%62el=x",
        "é=1",
        "a b=1",
    ],
)
def test_a_malformed_query_is_refused(query):
    with pytest.raises(BadUri):
        parse_uri(f"bitcoin:{ADDRESS}?{query}")


def test_a_required_pj_is_understood_and_never_written():
    parsed = parse_uri(f"bitcoin:{ADDRESS}?req-pj={V2_URL}&req-pjos=0")
    assert parsed == parse_uri(f"bitcoin:{ADDRESS}?pjos=0&pj={V2_URL}")
    assert "req-" not in format_uri(parsed)


def test_keys_are_read_without_regard_to_case():
    parsed = parse_uri(f"BITCOIN:{ADDRESS}?AMOUNT=1&PJOS=0&PJ={V2_URL}&LABEL=A")
    assert parsed == parse_uri(f"bitcoin:{ADDRESS}?label=A&amount=1&pjos=0&pj={V2_URL}")


def test_a_plus_is_a_plus_and_percent_encoding_is_undone_once():
    parsed = parse_uri(f"bitcoin:{ADDRESS}?label=a+b%20c%252B%26%3d&lightning=lnbc=1%C3%A9é")
    assert parsed.label == "a+b c%2B&="
    assert parsed.other == (("lightning", "lnbc=1éé"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bitcoin",
        "bitcoin:",
        "bitcoin:?",
        "bitcoin:?amount=1",
        "bitcoin://" + ADDRESS,
        f" bitcoin:{ADDRESS}",
        f"bitcoin:{ADDRESS} ",
        f"bitcoin:{ADDRESS}\n",
        f"bitcoin: {ADDRESS}",
        f"litecoin:{ADDRESS}",
        ADDRESS,
        f"bitcoin:{ADDRESS}/",
        f"bitcoin:{ADDRESS}&amount=1",
        "bitcoin:é",
        "bitcoin:" + "1" * 201,
        f"bitcoin:{ADDRESS}?label=" + "a" * 20000,
    ],
)
def test_what_is_no_payment_uri_is_refused(text):
    with pytest.raises(BadUri):
        parse_uri(text)


def test_a_raw_fragment_of_the_payment_uri_is_not_part_of_it():
    assert parse_uri(f"bitcoin:{ADDRESS}#x?amount=1") == PjUri(ADDRESS)
    assert parse_uri(f"bitcoin:{ADDRESS}?amount=1#&amount=2").amount == 10**8


# Writing


def v2(seed: int = 0, directory: str = "https://payjo.in") -> V2Endpoint:
    rng = Seeded(seed)
    receiver = SecretKey.generate(rng).public
    return V2Endpoint(
        directory, short_id(receiver), 1_700_000_000 + seed, KeyConfig(1, SecretKey.generate(rng).public), receiver
    )


def test_a_uri_is_written_as_deployed_wallets_write_it():
    endpoint = parse_uri(with_pj(V2_URL)).endpoint
    written = format_uri(
        PjUri(ADDRESS, 1_000_000, "Luke-Jr", "for #1 & more", endpoint, other=(("lightning", "lnbc1"),))
    )
    assert written == (
        f"bitcoin:{ADDRESS}?amount=0.01&label=Luke-Jr&message=for%20%231%20%26%20more&lightning=lnbc1&pjos=0&pj={V2_URL}"
    )
    assert format_uri(PjUri(ADDRESS)) == f"bitcoin:{ADDRESS}"


def test_pjos_is_always_0_for_a_mailbox_and_elided_when_1_for_a_server():
    for allowed in (True, False):
        assert "&pjos=0&pj=" in format_uri(PjUri(ADDRESS, 1, endpoint=v2(), output_substitution=allowed))
    server = V1Endpoint("https://example.com/pj?a=1&b=2")
    assert format_uri(PjUri(ADDRESS, endpoint=server)) == f"bitcoin:{ADDRESS}?pj=HTTPS://EXAMPLE.COM/pj?a%3D1%26b%3D2"
    assert format_uri(PjUri(ADDRESS, endpoint=server, output_substitution=False)) == (
        f"bitcoin:{ADDRESS}?pjos=0&pj=HTTPS://EXAMPLE.COM/pj?a%3D1%26b%3D2"
    )


texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
keys_ = st.from_regex(r"[a-z][a-z0-9-]{0,9}", fullmatch=True).filter(
    lambda key: key not in ("amount", "label", "message", "pj", "pjos") and not key.startswith("req-")
)
endpoints = st.one_of(
    st.none(),
    st.sampled_from(
        [V1Endpoint("https://example.com/"), V1Endpoint("http://a.onion:81/Pj?x=%25&y=1"), V1Endpoint("https://[::1]/")]
    ),
    st.builds(
        v2, st.integers(0, 10**8), st.sampled_from(["https://payjo.in", "http://localhost:8080", "https://[::1]:1"])
    ),
)


@settings(max_examples=80)
@given(
    address=st.from_regex(r"[A-Za-z0-9]{1,90}", fullmatch=True),
    amount=st.none() | st.integers(0, MAX_MONEY),
    label=texts,
    message=texts,
    endpoint=endpoints,
    substitution=st.booleans(),
    other=st.lists(st.tuples(keys_, st.text(st.characters(exclude_categories=["Cs"]), max_size=10)), max_size=3),
)
def test_what_is_written_reads_back(address, amount, label, message, endpoint, substitution, other):
    meant = PjUri(
        address,
        amount,
        label,
        message,
        endpoint,
        output_substitution=endpoint is None or (substitution and isinstance(endpoint, V1Endpoint)),
        other=tuple(other),
    )
    written = format_uri(meant)
    assert written.isascii()
    assert parse_uri(written) == meant
    assert format_uri(parse_uri(written)) == written


@pytest.mark.parametrize(
    "change",
    [
        {"address": ""},
        {"address": "a b"},
        {"address": "a?amount=1"},
        {"amount": -1},
        {"amount": MAX_MONEY + 1},
        {"label": "\ud800"},
        {"other": (("pj", "x"),)},
        {"other": (("AMOUNT", "x"),)},
        {"other": (("req-x", "x"),)},
        {"other": (("a=b", "x"),)},
        {"other": (("a&b", "x"),)},
        {"other": (("", "x"),)},
        {"endpoint": V1Endpoint("example.com")},
        {"endpoint": V1Endpoint("https://a@b/")},
        {"endpoint": replace(v2(), short_id="QQQQQQQQQQQQQ")},
        {"endpoint": replace(v2(), expires=1)},
        {"endpoint": replace(v2(), directory="https://payjo.in/dir")},
    ],
)
def test_what_could_not_be_read_back_is_not_written(change):
    with pytest.raises(WrongUsage):
        format_uri(replace(PjUri(ADDRESS), **change))


# Anything


@settings(max_examples=300)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_a_uri_or_refused(text, more):
    for candidate in (
        text,
        f"bitcoin:{text}",
        f"bitcoin:{ADDRESS}?{text}={more}",
        f"bitcoin:{ADDRESS}?{text}&{more}",
        with_pj(text),
        with_pj(f"https://{text}/{more}"),
        with_pj(f"HTTPS://EXAMPLE.COM/{ID}%23{text}"),
        with_pj(f"HTTPS://EXAMPLE.COM/{ID}%23{EX}{text}-{OH}{more}-{RK}"),
    ):
        with contextlib.suppress(BadUri):
            parse_uri(candidate)
        with contextlib.suppress(BadUri):
            parse_fragment(candidate)


def test_a_uri_cut_anywhere_never_becomes_another_payment():
    text = f"bitcoin:{ADDRESS}?amount=0.01&pjos=0&pj={V2_URL}"
    whole = parse_uri(text)
    for end in range(len(text)):
        try:
            parsed = parse_uri(text[:end])
        except BadUri:
            continue
        assert not isinstance(parsed.endpoint, V2Endpoint)
        assert parsed != whole


def test_a_fragment_damaged_in_any_character_is_refused_or_changes_only_expiry_or_gateway():
    whole = parse_uri(with_pj(V2_URL)).endpoint
    assert isinstance(whole, V2Endpoint)
    start = V2_URL.index("%23") + 3
    for at in range(start, len(V2_URL)):
        for character in "QPZ3-+_q":
            if V2_URL[at] == character:
                continue
            damaged = V2_URL[:at] + character + V2_URL[at + 1 :]
            try:
                endpoint = parse_uri(with_pj(damaged)).endpoint
            except BadUri:
                continue
            if isinstance(endpoint, V2Endpoint):
                assert (endpoint.receiver, endpoint.short_id) == (whole.receiver, whole.short_id)


def test_an_endpoint_does_not_show_its_mailbox():
    endpoint = v2()
    assert endpoint.short_id not in repr(endpoint)
    assert endpoint.receiver.compressed.hex() not in repr(endpoint)
