"""payjoin-cli pays payjoin-cli: the baseline, which proves that node, mailrooms and fixtures are what the reference expects."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.peers.desk import Post
from tests.peers.programs import Bitcoind, NodeWallet, PayjoinCli

pytestmark = pytest.mark.xdist_group("peers")

Person = Callable[[str, NodeWallet, Post], PayjoinCli]


def spent_by(node: Bitcoind, txid: str) -> set[tuple[str, int]]:
    return {(txin["txid"], txin["vout"]) for txin in node.call("getrawtransaction", txid, 1)["vin"]}


@pytest.mark.parametrize("over", ["plain", "secure"])
def test_the_reference_pays_the_reference(
    over: str, node: Bitcoind, person: Person, request: pytest.FixtureRequest
) -> None:
    post: Post = request.getfixturevalue(over)
    payer, payee = node.wallet("payer", 300_000), node.wallet("payee", 200_000)
    coins = payer.coins() | payee.coins()
    with person("bob", payee, post).receiving(50_000) as (uri, receiver):
        txid = person("alice", payer, post).send(uri)
        receiver.line("Payjoin transaction detected in the mempool")
        assert receiver.ended() == 0
    assert spent_by(node, txid) == coins
    node.mine()
    assert payee.balance() == 250_000


def test_a_payer_who_speaks_only_bip78_pays_through_the_mailbox(node: Bitcoind, person: Person, secure: Post) -> None:
    payer, payee = node.wallet("payer", 300_000), node.wallet("payee", 200_000)
    coins = payer.coins() | payee.coins()
    with person("bob", payee, secure).receiving(50_000) as (uri, receiver):
        txid = person("alice", payer, secure).send(uri, v1=True)
        assert receiver.ended() == 0
    assert spent_by(node, txid) == coins
