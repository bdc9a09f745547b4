"""The commands of docs/howto/bitcoin-core.md, in their order, on a node and a wallet of the tests' own."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from pjv2.backends.bitcoind_rpc import Call, Refused
from pjv2.cli.app import run
from pjv2.cli.command import Cli
from pjv2.cli.init import _cookie
from pjv2.config import Config
from pjv2.errors import WrongUsage
from pjv2.opening import open_chain, open_wallet
from pjv2.units import Network
from tests.contract.bitcoind_rig import Bitcoind, miner_of, needs_bitcoind, rpc_of, running

pytestmark = needs_bitcoind

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "bitcoin-core.md"


@pytest.fixture(scope="module")
def node():
    with running() as made:
        yield made


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    monkeypatch.setattr("pjv2.config.default_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr("pjv2.config.data_directory", lambda: tmp_path / "data")


def commands():
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line[2:]) for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def bitcoin_cli(node: Bitcoind, words):
    """What bitcoin-cli does with these words."""
    wallet = None
    while words[0].startswith("-"):
        option, _, value = words.pop(0).partition("=")
        assert option == "-rpcwallet"
        wallet = value
    method, *params = words

    async def ask():
        async with rpc_of(node, wallet) as rpc:
            return await rpc.do(Call(method, [int(one) if one.isdigit() else one for one in params]))

    answer = asyncio.run(ask())
    assert not isinstance(answer, Refused), (method, answer)
    return answer


def pjv2(words, node: Bitcoind):
    """The program; answers its code and what it said, line by line."""
    here = {
        "signet": "regtest",
        "http://127.0.0.1:38332/wallet/pjv2": node.url("pjv2"),
    }
    out, err = io.StringIO(), io.StringIO()
    code = run(["--json", *(here.get(word, word) for word in words)], cli=Cli(stdout=out, stderr=err))
    return code, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


def test_every_command_of_the_page_does_what_it_says(node, monkeypatch, tmp_path):
    monkeypatch.setattr("pjv2.cli.init.Path.home", lambda: tmp_path)
    usual = _cookie(Network.REGTEST)
    usual.parent.mkdir(parents=True)
    usual.symlink_to(node.cookie)
    verdicts = []
    for program, *words in commands():
        if program == "bitcoin-cli":
            answer = bitcoin_cli(node, words)
            if words[0] == "createwallet":
                bitcoin_cli(node, ["-rpcwallet=pjv2", "encryptwallet", "PASSPHRASE"])
            if words[-1] == "listlockunspent":
                assert answer == []
            continue
        code, lines, said = pjv2(words, node)
        if words[0] == "init":
            assert code == 0, said
        else:
            verdicts.append({line["name"]: line for line in lines if "name" in line})
    locked, unlocked = verdicts
    assert locked["wallet"]["status"] == "failed"
    assert "walletpassphrase" in locked["wallet"]["todo"]
    assert unlocked["wallet"]["status"] == "ok"
    for each in verdicts:
        assert {each[name]["status"] for name in ("chain", "original", "fees")} == {"ok"}
        assert each["coins"]["status"] == "warning"


def table(node, **more):
    return {"backend": "bitcoind", "url": node.url("miner"), "cookie_file": str(node.cookie)} | more


async def test_the_configuration_of_the_page_opens_wallet_and_chain(node):
    config = Config.load(None, {"network": "regtest", "wallet": table(node)})
    wallet, chain = await open_wallet(config), await open_chain(config)
    assert await wallet.balance() > 0
    assert (await chain.tip()).height >= 101
    await wallet.close()
    await chain.close()


async def test_a_chain_of_its_own_takes_its_own_url_and_either_login(node):
    logins = ({}, {"cookie_file": str(node.cookie)})
    for login in logins:
        mapping = {
            "network": "regtest",
            "wallet": table(node),
            "chain": {"backend": "bitcoind", "url": node.url()} | login,
        }
        chain = await open_chain(Config.load(None, mapping))
        assert (await chain.tip()).height >= 101
        await chain.close()


async def test_a_login_that_is_not_told_is_asked_for(node):
    for told, words in (
        ({"cookie_file": None, "user": "u"}, "no login"),
        ({"cookie_file": None, "password": "p"}, "no login"),
        ({"url": None}, "url is missing"),
    ):
        mapping = {key: value for key, value in table(node, **told).items() if value is not None}
        with pytest.raises(WrongUsage, match=words):
            await open_wallet(Config.load(None, {"network": "regtest", "wallet": mapping}))
    with pytest.raises(WrongUsage, match=r"\[chain\] url is missing"):
        await open_chain(Config.load(None, {"chain": {"backend": "bitcoind"}}))


async def test_a_user_and_a_password_file_log_in(node, tmp_path):
    user, _, password = node.cookie.read_text().partition(":")
    secret = tmp_path / "rpc.password"
    secret.touch(mode=0o600)
    secret.write_text(password + "\n")
    told = {"backend": "bitcoind", "url": node.url("miner"), "user": user, "password_file": str(secret)}
    async with miner_of(node):
        wallet = await open_wallet(Config.load(None, {"network": "regtest", "wallet": told}))
        assert await wallet.can_sign()
        await wallet.close()
