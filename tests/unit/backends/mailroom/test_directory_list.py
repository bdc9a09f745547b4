"""Every packaged list can be read, names operators and sources, and lets a payment be carried."""

from __future__ import annotations

import pytest

from pjv2.backends.mailroom import HttpMailroom, Operators, load_services
from pjv2.backends.mailroom.directory_list import parse_services
from pjv2.errors import CannotRead, WrongUsage
from pjv2.units import Network


@pytest.mark.parametrize("network", [Network.BITCOIN, Network.SIGNET, Network.TESTNET4])
def test_public_networks_have_directories_and_relays_of_other_operators(network):
    services = load_services(network)
    assert services.network is network
    operators = Operators((*services.relays, *services.directories))
    for directory in services.directories:
        free = [relay for relay in services.relays if operators.may_pair(relay, directory)]
        assert any(operators.may_pair(one, other) for one in free for other in free), directory.url


@pytest.mark.parametrize("network", list(Network))
def test_every_entry_names_its_operator_and_source(network):
    services = load_services(network)
    assert all(service.operator for service in (*services.directories, *services.relays))
    assert all(entry.source and entry.last_checked for entry in services.provenance)
    assert len({service.url for service in services.relays}) == len(services.relays)


def test_unverified_services_are_not_shipped():
    urls = {service.url for service in load_services(Network.BITCOIN).relays}
    assert "https://relay.payjoin.org" not in urls


def test_regtest_has_no_public_services_and_says_so_when_used():
    services = load_services(Network.REGTEST)
    assert services.directories == services.relays == ()
    with pytest.raises(WrongUsage, match="no relay is configured"):
        HttpMailroom.for_network(Network.REGTEST)


async def test_a_mailroom_for_a_network_uses_the_packaged_services_and_knows_their_operators():
    mailroom = HttpMailroom.for_network(
        Network.SIGNET, relays=["https://ohttp.bullbitcoin.com", "https://r.example.com"]
    )
    assert [directory.url for directory in mailroom.directories] == ["https://payjo.in", "https://lets.payjo.in"]
    assert [relay.url for relay in mailroom.relays_for("https://payjoin.bullbitcoin.com")] == ["https://r.example.com"]
    await mailroom.close()


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        'network = "signet"',
        'network = "bitcoin"\nsurprise = 1',
        'network = "bitcoin"\nsame_as = "bitcoin"',
        'network = "bitcoin"\nsame_as = "litecoin"',
        'network = "bitcoin"\n[[relays]]\nurl = "https://r.example"',
        'network = "bitcoin"\n[[relays]]\nurl = "https://r.example"\noperator = "x"\nsource = "y"\nlast_checked = 2026-08-21',
        'network = "bitcoin"\n[[relays]]\nurl = "https://r.example"\noperator = "x"\nsource = "y"\nlast_checked = "soon"',
        'network = "bitcoin"\n[[relays]]\nurl="https://r.example"\noperator="x"\nsource="y"\nlast_checked="2026-08-21"\nz="1"',
    ],
)
def test_a_list_that_is_not_understood_is_refused_as_a_whole(text):
    with pytest.raises(CannotRead):
        parse_services(text, Network.BITCOIN)
