"""The configuration: every key, every source, and the sentence that each mistake gets."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from pjv2 import config as module
from pjv2 import opening
from pjv2.config import SECTIONS, Config, data_directory, default_path
from pjv2.errors import NotNow, WrongUsage
from pjv2.opening import open_chain, open_channels, open_mailroom, open_store, open_wallet
from pjv2.sections import read_secret
from pjv2.units import FeeRate, Network

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")

DEFAULTS: dict[str, dict[str, Any]] = {
    "payjoin": {"directories": (), "relays": (), "ohttp_keys_file": None, "ca_file": None},
    "wallet": {
        "backend": "bdk", "descriptor": None, "descriptor_file": None, "change_descriptor": None,
        "change_descriptor_file": None, "mnemonic_file": None, "cold_descriptor": None, "url": None, "user": None, "password": None,
        "password_file": None, "cookie_file": None,
    },
    "chain": {
        "backend": None, "url": None, "ca_file": None, "user": None, "password": None, "password_file": None,
        "cookie_file": None,
    },
    "lightning": {
        "backend": "none", "url": None, "tls_cert": None, "macaroon": None, "macaroon_file": None, "socket": None,
        "directory": None,
    },
    "store": {"url": "sqlite:///pjv2.sqlite", "encryption_key_file": None, "encryption_keyring": None},
    "policy": {
        "max_fee_rate": 50, "max_fee_share": 0.05, "min_fee_rate": 1, "min_amount": 10_000, "own_input": "require",
        "on_peer_failure": "deposit", "approve": "auto", "approve_within": 600, "expire_in": 86_400, "fallback_after": 600,
        "confirmations": 1, "give_up_blocks": 1_000, "watch_after_expiry": 2_592_000,
    },
    "poller": {"max_in_flight": 256},
    "hooks": {"command": None, "webhook": None, "webhook_secret": None, "webhook_secret_file": None},
    "metrics": {"listen": "127.0.0.1:0"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PJV2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(module, "default_path", lambda: tmp_path / "config" / "config.toml")
    monkeypatch.setattr(module, "data_directory", lambda: tmp_path / "data")
    return tmp_path


def written(home: Path, text: str, mode: int = 0o600) -> Path:
    file = home / "config.toml"
    file.write_text(text)
    file.chmod(mode)
    return file


def refused(mapping: dict[str, Any] | None = None, path: Path | None = None) -> str:
    with pytest.raises(WrongUsage) as caught:
        Config.load(path, mapping)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ---------------------------------------------------------------- keys and defaults


def test_every_section_and_key_has_the_default_that_the_documents_tell() -> None:
    config = Config.load()
    assert set(DEFAULTS) == set(SECTIONS)
    for section, keys in DEFAULTS.items():
        assert {key: getattr(getattr(config, section), key) for key in SECTIONS[section].model_fields} == keys
    assert config.network is Network.REGTEST
    assert config.proxy is None


EVERY_KEY = """
network = "signet"
proxy = "socks5h://127.0.0.1:9050"
[payjoin]
directories = ["https://directory.example", {url = "https://other.example", operator = "Other"}]
relays = ["https://relay.example"]
ohttp_keys_file = "keys.bin"
ca_file = "ca.pem"
[wallet]
backend = "bitcoind"
descriptor = "wpkh(xpub)"
change_descriptor = "wpkh(xpub/1/*)"
cold_descriptor = "wpkh(xpub/2/*)"
url = "http://127.0.0.1:8332/wallet/NAME"
user = "u"
password_file = "password"
[chain]
backend = "electrum"
url = "ssl://electrum.example:50002"
ca_file = "chain.pem"
user = "u"
cookie_file = "cookie"
[lightning]
backend = "lnd"
url = "https://127.0.0.1:8080"
tls_cert = "tls.cert"
macaroon = "admin.macaroon"
socket = "lightning-rpc"
directory = "node"
[store]
url = "postgresql+psycopg://127.0.0.1/pjv2"
encryption_key_file = "key"
[policy]
max_fee_rate = 20.5
max_fee_share = 0.1
min_fee_rate = 2
min_amount = 20_000
own_input = "prefer"
on_peer_failure = "drop"
approve = "ask"
approve_within = 90
expire_in = 518_400
fallback_after = 60
confirmations = 3
give_up_blocks = 900
watch_after_expiry = 86_400
[poller]
max_in_flight = 8
[hooks]
command = "notify"
webhook = "https://hooks.example/token"
webhook_secret_file = "hmac"
[metrics]
listen = "127.0.0.1:9100"
"""


def test_every_key_can_be_written_in_the_file(home: Path) -> None:
    config = Config.load(written(home, EVERY_KEY))
    unchanged = {"wallet.descriptor_file", "wallet.change_descriptor_file", "wallet.mnemonic_file", "wallet.password"}
    unchanged |= {"wallet.cookie_file", "chain.password", "chain.password_file", "lightning.macaroon"}
    unchanged |= {"hooks.webhook_secret", "store.encryption_keyring"}
    for section, keys in DEFAULTS.items():
        for key, default in keys.items():
            value = getattr(getattr(config, section), key)
            assert (value == default) is (f"{section}.{key}" in unchanged), f"{section}.{key}"
    assert config.payjoin.directories[1].operator == "Other"
    assert config.payjoin.relays[0].url == "https://relay.example"


def test_a_constructed_configuration_reads_neither_file_nor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJV2_NETWORK", "signet")
    assert Config().network is Network.REGTEST


def test_a_configuration_does_not_change() -> None:
    config = Config.load()
    with pytest.raises(ValueError, match="frozen"):
        config.network = Network.BITCOIN  # type: ignore[misc]  # that is the point
    with pytest.raises(ValueError, match="frozen"):
        config.policy.expire_in = 1  # type: ignore[misc]  # that is the point


# ---------------------------------------------------------------- sources


def test_the_environment_overrides_the_file_and_the_mapping_overrides_both(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(home, "[policy]\nexpire_in = 100\nmin_amount = 100\nconfirmations = 2\n")
    monkeypatch.setenv("PJV2_POLICY__MIN_AMOUNT", "200")
    monkeypatch.setenv("PJV2_POLICY__CONFIRMATIONS", "3")
    policy = Config.load(file, {"policy": {"confirmations": 4}}).policy
    assert (policy.expire_in, policy.min_amount, policy.confirmations) == (100, 200, 4)


def test_the_file_of_the_platform_is_read_when_none_is_named(home: Path) -> None:
    (home / "config").mkdir()
    (home / "config" / "config.toml").write_text("[poller]\nmax_in_flight = 3\n")
    assert Config.load().poller.max_in_flight == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the XDG directories are Linux's")
def test_the_platform_says_where_configuration_and_data_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "d"))
    assert default_path() == home / "c" / "pjv2" / "config.toml"
    assert data_directory() == home / "d" / "pjv2"


@pytest.mark.parametrize("text", ["https://a.example,https://b.example", '["https://a.example", "https://b.example"]'])
def test_a_list_in_the_environment_is_json_or_has_commas(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJV2_PAYJOIN__RELAYS", text)
    assert [one.url for one in Config.load().payjoin.relays] == ["https://a.example", "https://b.example"]


def test_a_secret_given_later_in_another_form_takes_the_place_of_the_earlier_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(home, '[wallet]\ncookie_file = "cookie"\n')
    monkeypatch.setenv("PJV2_WALLET__PASSWORD", "hunter2")
    wallet = Config.load(file).wallet
    assert wallet.cookie_file is None
    assert wallet.secret("password") == "hunter2"


def test_paths_in_the_file_are_relative_to_the_file_and_others_to_the_working_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PJV2_PAYJOIN__OHTTP_KEYS_FILE", "keys.bin")
    config = Config.load(written(home, '[payjoin]\nca_file = "ca.pem"\n'))
    assert config.payjoin.ca_file == home / "ca.pem"
    assert config.payjoin.ohttp_keys_file == elsewhere / "keys.bin"


def test_a_relative_database_is_in_the_data_directory_wherever_one_stands(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert Config.load().store_file == home / "data" / "pjv2.sqlite"
    assert Config.load().store_url == f"sqlite:///{(home / 'data' / 'pjv2.sqlite').as_posix()}"
    absolute = Config.load(None, {"store": {"url": "sqlite:////srv/pjv2.sqlite"}})
    assert absolute.store_file == Path("/srv/pjv2.sqlite")
    server = Config.load(None, {"store": {"url": "postgresql+psycopg://db/pjv2"}})
    assert server.store_file is None
    assert server.store_url == "postgresql+psycopg://db/pjv2"


def test_the_chain_source_follows_the_wallet_unless_it_is_named() -> None:
    assert Config.load().chain_backend == "esplora"
    assert Config.load(None, {"wallet": {"backend": "lnd"}}).chain_backend == "lnd"
    assert Config.load(None, {"wallet": {"backend": "bitcoind"}}).chain_backend == "bitcoind"
    assert Config.load(None, {"chain": {"backend": "electrum"}}).chain_backend == "electrum"


# ---------------------------------------------------------------- mistakes


def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_known_one(home: Path) -> None:
    file = written(home, "[policy]\nmax_fee_rte = 5\n")
    assert refused(path=file) == f"[policy] max_fee_rte in {file} is not a known key; did you mean max_fee_rate?"


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"netwrok": "signet"}, "did you mean network?"),
        ({"polcy": {}}, "did you mean policy?"),
        ({"expire_in": 5}, "did you mean [policy] expire_in?"),
        ({"wallet": {"ca_file": "x"}}, "did you mean [chain] ca_file?"),
        ({"policy": {"network": "x"}}, "did you mean network, above the first section?"),
        ({"poller": {"qqqqqqqq": 1}}, "[poller] qqqqqqqq in the configuration that the program gave is not a known key"),
        ({"payjoin": {"relays": [{"url": "https://r.example", "operater": "x"}]}}, "did you mean operator?"),
        ({"policy": {"expire_in": 518_401}}, "is 518401, and must be at most 518_400"),
        ({"policy": {"expire_in": 0}}, "at least 1"),
        ({"policy": {"expire_in": True}}, "must be a number"),
        ({"policy": {"expire_in": "soon"}}, "must be a whole number"),
        ({"policy": {"max_fee_share": 1.01}}, "at most 1"),
        ({"policy": {"max_fee_share": -0.1}}, "at least 0"),
        ({"policy": {"max_fee_rate": 0}}, "above 0"),
        ({"policy": {"max_fee_rate": float("nan")}}, "must be a finite number"),
        ({"policy": {"min_fee_rate": 51}}, "min_fee_rate above max_fee_rate"),
        ({"policy": {"confirmations": 7}}, "at most 6"),
        ({"policy": {"give_up_blocks": 2_016}}, "at most 2_000"),
        ({"policy": {"approve_within": 0}}, "above 0"),
        ({"policy": {"approve_within": 518_401}}, "at most 518_400"),
        ({"wallet": {"cold_descriptor": "wpkh(xprv/0/*)"}}, "holds a private key: give the public descriptor"),
        ({"wallet": {"cold_descriptor": ""}}, "must not be empty"),
        ({"policy": {"own_input": "maybe"}}, "must be one of 'require' or 'prefer'"),
        ({"policy": {"approve": "x", "expire_in": 0}}, "(and 1 more)"),
        ({"policy": 5}, "must be a table"),
        ({"network": "mainnet"}, "must be one of 'bitcoin', 'signet', 'testnet4' or 'regtest'"),
        ({"proxy": "socks5://127.0.0.1:9050"}, "write socks5h://"),
        ({"proxy": "socks5h://127.0.0.1"}, "must be socks5h://host:port"),
        ({"proxy": "socks5h://me:pw@127.0.0.1:1"}, "each session brings its own user name"),
        ({"payjoin": {"relays": ["ftp://relay.example"]}}, "[payjoin] relays[0].url"),
        ({"payjoin": {"relays": [{}]}}, "is missing"),
        ({"payjoin": {"relays": "https://[::1"}}, "is not a URL"),
        ({"wallet": {"user": ""}}, "must not be empty"),
        ({"wallet": {"password": 5}}, "must be text"),
        ({"wallet": {"password": "x", "password_file": "y"}}, "has both password and password_file"),
        ({"wallet": {"password": "x", "cookie_file": "y"}}, "has both password and cookie_file"),
        ({"wallet": {"descriptor": "x", "mnemonic_file": "y"}}, "has both descriptor and mnemonic_file"),
        ({"wallet": {"change_descriptor": "x", "mnemonic_file": "y"}}, "has both change_descriptor and mnemonic_file"),
        ({"lightning": {"backend": "rehearsal"}, "network": "signet"}, "it needs network = 'regtest'"),
        ({"store": {"url": "pjv2.sqlite"}}, "must be a URL"),
        ({"metrics": {"listen": "9100"}}, "must be host:port, or off"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence_that_says_what_to_write(mapping: dict[str, Any], words: str) -> None:
    assert words in refused(mapping)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PJV2_POLICY__EXPIRE_I", "1", "PJV2_POLICY__EXPIRE_I is not a known key; did you mean expire_in?"),
        ("PJV2_POLCY__EXPIRE_IN", "1", "PJV2_POLCY__EXPIRE_IN in the environment names no known key; did you mean section policy?"),
        ("PJV2_NETWROK", "signet", "did you mean network?"),
        ("PJV2_POLICY__EXPIRE_IN", "518401", "PJV2_POLICY__EXPIRE_IN is 518401, and must be at most 518_400"),
        ("PJV2_POLICY__EXPIRE_IN", "", "PJV2_POLICY__EXPIRE_IN must be a whole number"),
        ("PJV2_PAYJOIN__RELAYS", "[1", "PJV2_PAYJOIN__RELAYS is not a JSON list of URLs"),
        ("PJV2_STORE", "x", "names a section: write PJV2_STORE__KEY"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_environment_names_the_variable(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert words in refused()


def test_variables_that_are_not_configuration_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJV2_PEERS", "required")
    monkeypatch.setenv("PJV2_CONFIG", "/nowhere")
    assert Config.load() == Config()


def test_a_named_file_must_be_there_and_be_toml(home: Path) -> None:
    assert "there is no configuration file" in refused(path=home / "nowhere.toml")
    assert "is not TOML" in refused(path=written(home, "network = \n"))
    file = home / "latin.toml"
    file.write_bytes(b'network = "\xe9"')
    assert "is not UTF-8 text" in refused(path=file)


def test_a_file_that_cannot_be_read_now_is_not_our_mistake(home: Path) -> None:
    with pytest.raises(NotNow, match="cannot be read now"):
        Config.load(home)  # a directory


def test_a_mistaken_secret_is_not_repeated_in_the_error(home: Path) -> None:
    with pytest.raises(WrongUsage) as caught:
        Config.load(written(home, '[wallet]\npassword = ["hunter2"]\n[store]\nurl = "me:hunter2@db"\n'))
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in str(caught.value.__cause__)


# ---------------------------------------------------------------- secrets


SECRETS = {
    "wallet": ["descriptor", "change_descriptor", "mnemonic", "password", "cookie"],
    "chain": ["password", "cookie"],
    "lightning": ["macaroon"],
    "store": ["encryption_key"],
    "hooks": ["webhook_secret"],
}


def test_every_key_that_names_a_secret_file_is_known_as_one() -> None:
    known = {section: [name.removesuffix("_file") for name in kind.secret_files] for section, kind in SECTIONS.items()}
    assert {section: names for section, names in known.items() if names} == SECRETS


@posix
@pytest.mark.parametrize(("section", "name"), [(section, name) for section in SECRETS for name in SECRETS[section]])
def test_a_secret_file_that_others_can_read_is_refused_with_what_to_do(home: Path, section: str, name: str) -> None:
    file = home / "the secret"
    file.write_text("hunter2\n")
    file.chmod(0o644)
    sentence = refused({section: {f"{name}_file": str(file)}})
    assert sentence.startswith(f"[{section}] {name}_file: ")
    assert sentence.endswith(f"chmod o-rwx '{file}'")
    file.chmod(0o640)
    config = Config.load(None, {section: {f"{name}_file": str(file)}})
    assert getattr(config, section).secret(name) == "hunter2"
    assert getattr(config, section).secret_bytes(name) == b"hunter2\n"


@posix
def test_a_secret_file_that_was_opened_to_others_later_is_refused_when_it_is_read(home: Path) -> None:
    file = home / "password"
    file.write_text("hunter2")
    file.chmod(0o600)
    config = Config.load(None, {"wallet": {"password_file": str(file)}})
    file.chmod(stat.S_IMODE(file.stat().st_mode) | stat.S_IROTH)
    with pytest.raises(WrongUsage, match="chmod o-rwx"):
        config.wallet.secret("password")


def test_a_secret_file_that_is_not_there_is_told_when_it_is_needed(home: Path) -> None:
    config = Config.load(None, {"wallet": {"cookie_file": str(home / ".cookie")}})
    with pytest.raises(NotNow, match=r"\[wallet\] cookie_file: .* cannot be read now: No such file"):
        config.wallet.secret("cookie")
    with pytest.raises(NotNow):
        read_secret(home / ".cookie", "cookie")
    assert config.wallet.secret("password") is None


def test_a_secret_text_file_that_holds_no_text_is_refused(home: Path) -> None:
    file = home / "password"
    file.write_bytes(b"\xff\xfe")
    file.chmod(0o600)
    config = Config.load(None, {"wallet": {"password_file": str(file)}})
    with pytest.raises(WrongUsage, match="does not hold text"):
        config.wallet.secret("password")
    assert config.wallet.secret_bytes("password") == b"\xff\xfe"


@posix
@pytest.mark.parametrize(
    "text",
    [
        '[wallet]\npassword = "hunter2"',
        '[wallet]\ndescriptor = "wpkh(tprv8)"',
        '[hooks]\nwebhook_secret = "hunter2"',
        f'[lightning]\nmacaroon = "{"0a" * 40}"',
        '[store]\nurl = "postgresql+psycopg://me:hunter2@db/pjv2"',
        '[payjoin]\n[wallet]\nurl = "http://me:hunter2@127.0.0.1"',
    ],
)
def test_a_configuration_with_a_secret_in_it_is_a_secret_file(home: Path, text: str) -> None:
    assert "chmod o-rwx" in refused(path=written(home, text, 0o644))
    Config.load(written(home, text, 0o600))


@posix
def test_a_configuration_without_a_secret_may_be_read_by_all(home: Path) -> None:
    Config.load(written(home, '[wallet]\ndescriptor = "wpkh(xpub6)"\n[lightning]\nmacaroon = "a.macaroon"\n', 0o644))


def test_a_macaroon_is_hex_or_a_path(home: Path) -> None:
    inline = Config.load(None, {"lightning": {"macaroon": "0a" * 40}}).lightning
    assert inline.macaroon == SecretStr("0a" * 40)
    assert inline.macaroon_file is None
    named = Config.load(None, {"lightning": {"macaroon": str(home / "admin.macaroon")}}).lightning
    assert named.macaroon is None
    assert named.macaroon_file == home / "admin.macaroon"


def test_no_secret_is_in_a_repr() -> None:
    config = Config.load(
        None,
        {
            "wallet": {"descriptor": "hunter2", "password": "hunter2", "url": "http://u:hunter2@h"},
            "chain": {"url": "https://hunter2@h/x?token=hunter2"},
            "lightning": {"macaroon": "0a" * 40},
            "store": {"url": "postgresql+psycopg://u:hunter2@h/n?password=hunter2"},
            "hooks": {
                "webhook_secret": "hunter2",
                "webhook": "https://h/hunter2",
                "command": "tell --token hunter2",
            },
        },
    )
    for text in (repr(config), str(config), repr(config.wallet), str(config.store), f"{config.hooks}"):
        assert "hunter2" not in text
        assert "0a0a" not in text
    assert "postgresql+psycopg://…h/n" in repr(config.store)


# ---------------------------------------------------------------- the policy and the back ends


def test_the_policy_of_a_session_is_rounded_against_ourselves() -> None:
    policy = Config.load(
        None, {"policy": {"max_fee_rate": 1.2345, "min_fee_rate": 1.2301, "max_fee_share": 0.0123456}}
    ).session_policy()
    assert policy.max_fee_rate == FeeRate(308)
    assert policy.min_fee_rate == FeeRate(308)
    assert policy.max_fee_share_ppm == 12_345


def test_the_default_policy_is_the_sessions_own_default() -> None:
    from pjv2.session.events import Policy

    # A session of an older log has no time of its own to approve; a new one has what the configuration says.
    assert Config.load().session_policy() == replace(Policy(), approve_within=600)


def test_every_limit_of_the_configuration_reaches_the_policy() -> None:
    told = {
        "max_fee_rate": 7, "max_fee_share": 0.5, "min_fee_rate": 2, "min_amount": 3, "own_input": "prefer",
        "on_peer_failure": "abort", "approve": "ask", "fallback_after": 4, "confirmations": 5, "give_up_blocks": 6,
        "watch_after_expiry": 7, "approve_within": 8,
    }  # fmt: skip
    policy = Config.load(None, {"policy": told}).session_policy()
    assert policy.max_fee_rate == FeeRate(1_750)
    assert policy.min_fee_rate == FeeRate(500)
    assert policy.max_fee_share_ppm == 500_000
    for name in told.keys() - {"max_fee_rate", "max_fee_share", "min_fee_rate"}:
        assert getattr(policy, name) == told[name]


async def test_the_store_is_opened_where_the_configuration_says(home: Path) -> None:
    store = await open_store(Config.load())
    try:
        assert await store.rows() == ()
    finally:
        await store.close()
    assert (home / "data" / "pjv2.sqlite").exists()


async def test_a_store_whose_key_is_missing_is_refused_rather_than_left_in_the_clear(home: Path) -> None:
    config = Config.load(None, {"store": {"encryption_key_file": str(home / "key")}})
    with pytest.raises(WrongUsage, match="--make-key"):
        await open_store(config)


async def test_a_database_of_another_kind_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(WrongUsage, match="it has sqlite, postgresql"):
        await open_store(Config.load(None, {"store": {"url": "mysql://h/n"}}))


async def test_a_back_end_that_this_version_lacks_is_named_together_with_those_it_has() -> None:
    config = Config.load(None, {"lightning": {"backend": "cln"}})
    with pytest.raises(WrongUsage, match=r"\[lightning\] backend = 'cln' is not in this version .* none, rehearsal"):
        await open_channels(config)
    for opener, registry in ((open_wallet, opening.WALLETS), (open_chain, opening.CHAINS)):
        if not registry:
            with pytest.raises(WrongUsage, match="it has none that can be named"):
                await opener(config)


async def test_no_lightning_node_is_a_choice_and_a_rehearsal_keeps_itself_in_the_data_directory(home: Path) -> None:
    assert await open_channels(Config.load()) is None
    node = await open_channels(Config.load(None, {"lightning": {"backend": "rehearsal"}}))
    assert node is not None
    try:
        assert (home / "data" / "rehearsal").is_dir()
        assert len((await node.node()).pubkey) == 66
    finally:
        await node.close()


async def test_the_mailroom_has_the_configured_services() -> None:
    services = {"relays": ["http://127.0.0.1:1"], "directories": [{"url": "http://127.0.0.1:2", "operator": "X"}]}
    mailroom = await open_mailroom(Config.load(None, {"payjoin": services}))
    await mailroom.close()
    with pytest.raises(WrongUsage, match="must end after the host and port"):
        await open_mailroom(Config.load(None, {"payjoin": {"relays": ["http://127.0.0.1:1/path?x=1"]}}))
