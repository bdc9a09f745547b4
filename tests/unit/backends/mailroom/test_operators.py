"""A relay and a directory of the same operator are never paired; in doubt they are the same."""

from __future__ import annotations

import pytest

from pjv2.backends.mailroom.operators import Operators, Service, is_loopback
from pjv2.errors import WrongUsage


@pytest.mark.parametrize(
    ("url", "domain"),
    [
        ("https://payjo.in", "payjo.in"),
        ("https://lets.payjo.in", "payjo.in"),
        ("https://a.b.example.com:8443", "example.com"),
        ("https://www.example.co.uk", "example.co.uk"),
        ("https://example.com.au", "example.com.au"),
        ("https://EXAMPLE.org.", "example.org"),
        ("https://127.0.0.1:4000", "127.0.0.1:4000"),
        ("https://198.51.100.7", "198.51.100.7:443"),
        ("http://[::1]:80", "[::1]:80"),
        ("http://localhost", "localhost:80"),
        ("http://a.localhost:9", "a.localhost:9"),
        ("http://mailroom:8080", None),
        ("http://expyuzz4wqqyqhjn.onion", None),
        ("https://nas.local", None),
        ("https://relay.internal", None),
        ("https://co.uk", None),
    ],
)
def test_the_operator_of_an_unnamed_service_is_its_registrable_domain_or_undecidable(url, domain):
    assert Service(url).domain == domain


@pytest.mark.parametrize(
    ("relay", "directory", "may"),
    [
        ("https://relay.example", "https://payjo.in", True),
        ("https://relay.payjo.in", "https://payjo.in", False),
        ("https://relay.a.co.uk", "https://directory.b.co.uk", True),
        ("https://relay.a.co.uk", "https://directory.a.co.uk", False),
        # A registry suffix that is not known costs a pair, never the other way round.
        ("https://relay.a.gob.sv", "https://directory.b.gob.sv", False),
        ("http://127.0.0.1:1", "http://127.0.0.1:2", True),
        ("http://127.0.0.1:1", "http://127.0.0.1:1", False),
        ("http://relay.onion", "https://payjo.in", False),
        ("https://relay.example", "http://mailroom:8080", False),
        ("https://payjo.in:443", "https://payjo.in", False),
    ],
)
def test_unnamed_services_pair_only_when_they_are_certainly_different(relay, directory, may):
    operators = Operators()
    assert operators.may_pair(Service(relay), Service(directory)) is may
    assert operators.may_pair(Service(directory), Service(relay)) is may


def test_named_operators_decide_before_domains():
    operators = Operators()
    assert operators.may_pair(Service("https://a.fly.dev", "Alice"), Service("https://b.fly.dev", "Bob"))
    assert not operators.may_pair(Service("https://a.example", "Alice  Lee"), Service("https://b.example", "alice lee"))
    assert operators.may_pair(Service("http://relay.onion", "Alice"), Service("https://payjo.in", "Foundation"))


def test_one_server_is_one_operator_whatever_it_is_called():
    operators = Operators()
    assert not operators.may_pair(Service("https://a.example", "Alice"), Service("https://a.example:443", "Bob"))


def test_a_directory_from_a_uri_gets_the_operator_that_lists_know_for_its_domain():
    relay = Service("https://ohttp.bull.example", "Bull")
    operators = Operators([relay, Service("https://relay.other.example.org", "Bull")])
    assert not operators.may_pair(relay, operators.service("https://payjoin.bull.example"))
    # The same operator under a second domain that a list names:
    assert not operators.may_pair(
        Service("https://x.bull.example"), operators.service("https://relay.other.example.org")
    )
    assert operators.may_pair(relay, operators.service("https://payjo.in"))


def test_a_named_relay_is_not_paired_with_an_unnamed_directory_of_its_own_domain():
    relay = Service("https://ohttp.bull.example", "Bull")
    assert not Operators().may_pair(relay, Service("https://payjoin.bull.example"))


@pytest.mark.parametrize(
    "url", ["ftp://x.example", "https://x.example/path", "https://user@x.example", "x.example", ""]
)
def test_a_service_needs_a_plain_url(url):
    with pytest.raises(WrongUsage):
        Service(url)


def test_an_empty_operator_is_refused():
    with pytest.raises(WrongUsage, match="empty name"):
        Service("https://x.example", "  ")


def test_loopback_is_this_machine_only():
    assert is_loopback("http://localhost:1")
    assert is_loopback("http://127.9.9.9")
    assert is_loopback("http://[::1]")
    assert not is_loopback("http://10.0.0.1")
    assert not is_loopback("http://localhost.example.com")
