"""`pjv2 init`: a commented configuration, out of questions or flags.

It refuses to write over a configuration without `--force`, and over words never. What it writes is read back by `Config.load` before
it takes the file's name, so that a configuration that stands there is one that works.

Law: no secret is asked for aloud, printed, or put into a file that others can read; words are shown only to a person who asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pjv2.cli.command import Cli, YesOption
from pjv2.errors import NotNow, WrongUsage
from pjv2.units import Network


class WalletKind(StrEnum):
    """Whose coins."""

    BDK = "bdk"
    BITCOIND = "bitcoind"
    LND = "lnd"


class ChainKind(StrEnum):
    """Who tells about blocks."""

    ESPLORA = "esplora"
    ELECTRUM = "electrum"
    BITCOIND = "bitcoind"
    LND = "lnd"


class LightningKind(StrEnum):
    """Which node opens channels."""

    NONE = "none"
    LND = "lnd"
    CLN = "cln"
    REHEARSAL = "rehearsal"


PUBLIC_SERVERS = {
    (Network.BITCOIN, ChainKind.ESPLORA): "https://mempool.space/api",
    (Network.SIGNET, ChainKind.ESPLORA): "https://mempool.space/signet/api",
    (Network.TESTNET4, ChainKind.ESPLORA): "https://mempool.space/testnet4/api",
}
"""What is suggested where a person names no server. Such a server sees every address of the wallet."""

_BITCOIND_PORTS = {Network.BITCOIN: 8332, Network.SIGNET: 38332, Network.TESTNET4: 48332, Network.REGTEST: 18443}
_WORDS_FILE = "wallet.words"


@dataclass(frozen=True, slots=True)
class Answers:
    """What the file will say; None leaves a key as a comment."""

    network: Network
    wallet: Mapping[str, str | None] = field(repr=False)
    """May hold a descriptor with a private key."""
    chain: Mapping[str, str | None]
    lightning: Mapping[str, str | None]
    directories: Sequence[str] = ()
    relays: Sequence[str] = ()
    proxy: str | None = None
    key_file: str | None = None


def run(
    cli: Cli,
    network: Annotated[Network | None, typer.Option("--network", help="The Bitcoin network.")] = None,
    wallet: Annotated[WalletKind | None, typer.Option("--wallet", help="Whose coins: embedded, or a node's.")] = None,
    mnemonic_file: Annotated[
        Path | None, typer.Option("--mnemonic-file", help="bdk: a file with your words; new ones if it is not there.")
    ] = None,
    descriptor: Annotated[str | None, typer.Option("--descriptor", help="bdk: a descriptor instead of words.")] = None,
    change_descriptor: Annotated[
        str | None, typer.Option("--change-descriptor", help="bdk: the one for change.")
    ] = None,
    wallet_url: Annotated[
        str | None, typer.Option("--wallet-url", help="bitcoind: http://host:port/wallet/NAME")
    ] = None,
    cookie_file: Annotated[Path | None, typer.Option("--cookie-file", help="bitcoind: its .cookie")] = None,
    user: Annotated[str | None, typer.Option("--user", help="bitcoind: the RPC user.")] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="bitcoind: a file with the RPC password.")
    ] = None,
    chain: Annotated[ChainKind | None, typer.Option("--chain", help="Who tells about blocks.")] = None,
    chain_url: Annotated[str | None, typer.Option("--chain-url", help="Its URL.")] = None,
    lightning: Annotated[LightningKind | None, typer.Option("--lightning", help="Which node opens channels.")] = None,
    lightning_url: Annotated[str | None, typer.Option("--lightning-url", help="lnd: https://host:8080")] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="lnd: its tls.cert")] = None,
    macaroon_file: Annotated[Path | None, typer.Option("--macaroon-file", help="lnd: its macaroon.")] = None,
    socket: Annotated[Path | None, typer.Option("--socket", help="cln: its lightning-rpc socket.")] = None,
    directory: Annotated[list[str] | None, typer.Option("--directory", help="A directory's URL; repeatable.")] = None,
    relay: Annotated[list[str] | None, typer.Option("--relay", help="A relay's URL; repeatable.")] = None,
    proxy: Annotated[
        str | None, typer.Option("--proxy", help="socks5h://host:port for everything, such as Tor.")
    ] = None,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt stored events with a new key file.")] = False,
    show_words: Annotated[bool, typer.Option("--show-words", help="Show new words once, to write them down.")] = False,
    yes: YesOption = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a configuration that is there.")] = False,
) -> None:
    """Write a commented configuration, after asking on a terminal or from these flags."""
    from pjv2.config import default_path

    if show_words and cli.json:
        raise WrongUsage("--show-words shows your words to a person: leave out --json")
    path = (cli.config_path or default_path()).expanduser().absolute()
    if path.exists() and not force:
        raise WrongUsage(f"there is a configuration {path}: --force writes over it, --config names another file")
    ask = Questions(cli, path.parent, quiet=yes)
    if network is None and not ask.asks and not yes:
        raise WrongUsage("there is nobody to ask: give at least --network, or --yes for what is suggested")
    net = Network(ask.choice("Which Bitcoin network", network, Network, Network.REGTEST if yes else Network.BITCOIN))
    login = Login(cookie_file, user, password_file)
    whose = _wallet(ask, net, wallet, login, mnemonic_file, descriptor, change_descriptor, wallet_url)
    blocks = _chain(ask, net, whose, chain, chain_url, login)
    opens = _lightning(ask, net, lightning, lightning_url, tls_cert, macaroon_file, socket)
    if "lnd" in {whose["backend"], blocks["backend"]} and "url" not in opens:
        opens |= _lnd(ask, lightning_url, tls_cert, macaroon_file)
    directories, relays = list(directory or ()), list(relay or ())
    if net is Network.REGTEST:
        directories = directories or ask.many("URL of your directory (nothing for none)")
        relays = relays or ask.many("URLs of your relays, with blanks between (nothing for none)")
    key_file = path.parent / "store.key" if encrypt else None
    answers = Answers(
        net, whose, blocks, opens, directories, relays, proxy, None if key_file is None else str(key_file)
    )
    named = whose.get("mnemonic_file")
    words_file = None if named is None or Path(named).exists() else Path(named)
    words = _write(path, answers, force=force, words_file=words_file, key_file=key_file)
    if any("prv" in (whose.get(key) or "") for key in ("descriptor", "change_descriptor")):
        cli.out.say("The descriptor holds a private key: it stands in the configuration, and in your shell's history.")
    if words_file is not None:
        cli.out.say(
            f"New words were written to {words_file}. Whoever has them has the coins: write them down, and keep that safe.",
            *([words] if show_words and words is not None else []),
        )
    cli.out.result(
        "ConfigWritten",
        f"{path} was written. Next: {cli.words('doctor')}",
        path=str(path),
        network=net.value,
        wallet=whose["backend"],
        chain=blocks["backend"],
        lightning=opens["backend"],
        new_words=None if words_file is None else str(words_file),
    )


# ---------------------------------------------------------------- what is asked about each part

Table = dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Login:
    """How to log in to bitcoind: a cookie, or a user and a file with his password."""

    cookie_file: Path | None
    user: str | None
    password_file: Path | None

    def table(self, ask: Questions, network: Network) -> Table:
        if self.user is None and self.password_file is None:
            return {"cookie_file": str(ask.path("bitcoind's cookie", self.cookie_file, _cookie(network)))}
        if self.user is None or self.password_file is None:
            raise WrongUsage("--user and --password-file go together")
        return {"user": self.user, "password_file": str(_absolute(self.password_file))}


def _wallet(
    ask: Questions,
    network: Network,
    wallet: WalletKind | None,
    login: Login,
    mnemonic_file: Path | None,
    descriptor: str | None,
    change_descriptor: str | None,
    url: str | None,
) -> Table:
    if descriptor is None and change_descriptor is not None:
        raise WrongUsage("--change-descriptor goes with --descriptor")
    if descriptor is not None and mnemonic_file is not None:
        raise WrongUsage("give --descriptor or --mnemonic-file, not both")
    kind = WalletKind(ask.choice("Whose wallet", wallet, WalletKind, WalletKind.BDK))
    table: Table = {"backend": kind.value}
    if kind is WalletKind.BITCOIND:
        suggested = f"http://127.0.0.1:{_BITCOIND_PORTS[network]}/wallet/pjv2"
        table |= {"url": ask.text("URL of the node's wallet", url, suggested), **login.table(ask, network)}
    elif kind is WalletKind.BDK and descriptor is not None:
        table |= {"descriptor": descriptor, "change_descriptor": change_descriptor}
    elif kind is WalletKind.BDK:
        words = ask.path(
            "File with the wallet's words (made if it is not there)", mnemonic_file, ask.home / _WORDS_FILE
        )
        table["mnemonic_file"] = str(words)
    return table


def _chain(
    ask: Questions, network: Network, wallet: Table, chain: ChainKind | None, url: str | None, login: Login
) -> Table:
    # LND alone could not test a payer's transaction.
    follows = ChainKind.BITCOIND if wallet["backend"] == "bitcoind" else ChainKind.ESPLORA
    kind = ChainKind(ask.choice("Who tells about blocks", chain, ChainKind, follows))
    table: Table = {"backend": kind.value}
    if kind in {ChainKind.ESPLORA, ChainKind.ELECTRUM}:
        suggested = PUBLIC_SERVERS.get((network, kind), "")
        question = "Its URL (a public server sees all your addresses)" if suggested else "The chain source's URL"
        table["url"] = ask.text(question, url, suggested, "--chain-url")
    elif kind is ChainKind.BITCOIND and wallet["backend"] != "bitcoind":
        table |= {"url": ask.text("URL of the node", url, f"http://127.0.0.1:{_BITCOIND_PORTS[network]}")}
        table |= login.table(ask, network)
    elif url is not None:
        table["url"] = url
    return table


def _lightning(
    ask: Questions,
    network: Network,
    lightning: LightningKind | None,
    url: str | None,
    tls_cert: Path | None,
    macaroon_file: Path | None,
    socket: Path | None,
) -> Table:
    kind = LightningKind(
        ask.choice("Which Lightning node opens channels", lightning, LightningKind, LightningKind.NONE)
    )
    table: Table = {"backend": kind.value}
    if kind is LightningKind.LND:
        table |= _lnd(ask, url, tls_cert, macaroon_file)
    elif kind is LightningKind.CLN:
        there = _home(".lightning") / network.value / "lightning-rpc"
        table["socket"] = str(ask.path("Its lightning-rpc socket", socket, there))
    return table


def _lnd(ask: Questions, url: str | None, tls_cert: Path | None, macaroon_file: Path | None) -> Table:
    return {
        "url": ask.text("URL of LND's REST interface", url, "https://127.0.0.1:8080"),
        "tls_cert": str(ask.path("Its tls.cert", tls_cert, _home(".lnd/tls.cert"))),
        "macaroon_file": str(ask.path("A macaroon for pjv2", macaroon_file, ask.home / "pjv2.macaroon")),
    }


def _home(name: str) -> Path:
    return Path.home() / name


def _cookie(network: Network) -> Path:
    """Where bitcoind of this network puts its cookie when nobody says otherwise."""
    home = _home("Library/Application Support/Bitcoin") if sys.platform == "darwin" else _home(".bitcoin")
    return home / ("" if network is Network.BITCOIN else network.value) / ".cookie"


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


# ---------------------------------------------------------------- asking


class Questions:
    """Questions to a person. Quiet or away from a terminal, a flag or a default answers; what has neither must be given as a flag.

    `home` is where the configuration will stand.
    """

    def __init__(self, cli: Cli, home: Path, *, quiet: bool) -> None:
        self.home = home
        self._cli = cli
        self.asks = cli.asks and not quiet

    def text(self, question: str, given: str | None, default: str = "", flag: str = "") -> str:
        """One line. Raises WrongUsage where there is neither an answer nor a default."""
        if given is not None:
            return given
        answer = self._line(f"{question} [{default}]: " if default else f"{question}: ") if self.asks else ""
        if not (found := answer.strip() or default):
            raise WrongUsage(
                f"{question[:1].lower()}{question[1:]} is not known: give it{f' as {flag}' if flag else ''}"
            )
        return found

    def choice(self, question: str, given: StrEnum | None, kind: type[StrEnum], default: StrEnum) -> str:
        """One of a few words; asked again until it is one."""
        if given is not None:
            return given.value
        words = [item.value for item in kind]
        while (found := self.text(f"{question} ({', '.join(words)})", None, default.value).lower()) not in words:
            self._cli.out.say(f"{found!r} is none of them.")
        return found

    def path(self, question: str, given: Path | None, default: Path) -> Path:
        """A file's name; relative ones are relative to the working directory."""
        return _absolute(given if given is not None else Path(self.text(question, None, str(default))))

    def many(self, question: str) -> list[str]:
        """Words with blanks or commas between; none where nobody can be asked."""
        return self._line(f"{question}: ").replace(",", " ").split() if self.asks else []

    def _line(self, prompt: str) -> str:
        self._cli.out.say(prompt.rstrip(" "))
        stream = self._cli.stdin or sys.stdin
        if not (line := stream.readline()):
            raise WrongUsage("there is nobody to ask any more: give flags, or --yes")
        return line


# ---------------------------------------------------------------- writing


def _write(path: Path, answers: Answers, *, force: bool, words_file: Path | None, key_file: Path | None) -> str | None:
    """Write the file, and what it names and is to be made; answers new words. Nothing is left where something failed."""
    from pjv2.backends.store.sealed import new_key
    from pjv2.cli.store import write_private

    made: list[Path] = []
    try:
        text = None
        if words_file is not None:
            text = new_mnemonic()
            write_private(words_file, text + "\n", "the words file")
            made.append(words_file)
        if key_file is not None and not key_file.exists():
            write_private(key_file, new_key() + "\n", "the key file")
            made.append(key_file)
        _put(path, as_toml(answers), force=force)
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        raise
    return text


def new_mnemonic() -> str:
    """Twelve fresh words (BIP39). Raises WrongUsage where the library is missing."""
    try:
        from bdkpython import Mnemonic, WordCount
    except ImportError as exc:
        raise WrongUsage(
            "new words are made by bdkpython, which is not installed here: pip install 'pjv2[bdk]', "
            "or name a file that holds your words with --mnemonic-file"
        ) from exc
    return str(Mnemonic(WordCount.WORDS12))


def _put(path: Path, text: str, *, force: bool) -> None:
    """Write `text` beside `path`, read it back as a configuration, and only then give it that name."""
    from pjv2.config import Config

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made 0600
    except OSError as exc:
        raise NotNow(f"{path} cannot be written: {exc.strerror or type(exc).__name__}") from exc
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            Config.load(beside)
        except WrongUsage as exc:
            raise WrongUsage(str(exc).replace(str(beside), str(path))) from exc
        if not force and path.exists():
            raise WrongUsage(f"there is a configuration {path} now: --force writes over it")
        beside.replace(path)
    except OSError as exc:
        raise NotNow(f"{path} cannot be written: {exc.strerror or type(exc).__name__}") from exc
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def as_toml(answers: Answers) -> str:
    """The configuration file: what was answered, and every other key as a comment with its default."""
    from pjv2.config import Config

    policy = Config().policy
    wallet, chain, lightning = answers.wallet, answers.chain, answers.lightning
    services = _services(answers)
    return f"""\
# Configuration of pjv2, written by `pjv2 init`. Check it with `pjv2 doctor`.
# A line that begins with # is a comment: it shows a key with its default, or an example.
# Relative paths are relative to this file. PJV2_SECTION__KEY in the environment overrides a key.

network = {_string(answers.network.value)}  # bitcoin | signet | testnet4 | regtest
{_line("proxy", answers.proxy, "socks5h://127.0.0.1:9050")}  # Tor; covers everything that goes out

[payjoin]
# Directories keep messages, relays hide your address from them. Two relays of different operators are best.
{services}
# ohttp_keys_file = "keys.bin"  # pins a directory's keys: for test directories
# ca_file = "ca.pem"  # an extra trust root

[wallet]
{_line("backend", wallet["backend"])}  # bdk | bitcoind | lnd
{_line("mnemonic_file", wallet.get("mnemonic_file"), _WORDS_FILE)}  # bdk: words, in a file that you alone can read
{_line("descriptor", wallet.get("descriptor"), "wpkh([fingerprint/84h/0h/0h]xprv…/0/*)")}  # bdk: instead of words
{_line("change_descriptor", wallet.get("change_descriptor"), "wpkh([fingerprint/84h/0h/0h]xprv…/1/*)")}
# cold_descriptor = "wpkh([fingerprint/84h/0h/1h]xpub…/0/*)"  # public: payments go there where the payer's software lets them
{_line("url", wallet.get("url"), "http://127.0.0.1:8332/wallet/NAME")}  # bitcoind
{_line("cookie_file", wallet.get("cookie_file"), "/path/to/.cookie")}  # bitcoind; or user and password_file
{_line("user", wallet.get("user"), "pjv2")}
{_line("password_file", wallet.get("password_file"), "bitcoind.password")}

[chain]
# Who tells about blocks. It sees your addresses unless it is your own node.
{_line("backend", chain["backend"])}  # esplora | electrum | bitcoind | lnd
{_line("url", chain.get("url"), "https://host/api")}
{_line("cookie_file", chain.get("cookie_file"), "/path/to/.cookie")}  # bitcoind; or user and password_file
{_line("user", chain.get("user"), "pjv2")}
{_line("password_file", chain.get("password_file"), "bitcoind.password")}

[lightning]
{_line("backend", lightning["backend"])}  # none | lnd | cln | rehearsal (regtest only)
{_line("url", lightning.get("url"), "https://127.0.0.1:8080")}  # lnd
{_line("tls_cert", lightning.get("tls_cert"), "tls.cert")}  # lnd
{_line("macaroon_file", lightning.get("macaroon_file"), "pjv2.macaroon")}  # lnd
{_line("socket", lightning.get("socket"), "/path/to/lightning-rpc")}  # cln

[store]
# Sessions, in the platform's data directory; or postgresql+psycopg://user@host/name
# url = "sqlite:///pjv2.sqlite"
{_line("encryption_key_file", answers.key_file, "store.key")}  # encrypts stored events: pjv2 store encrypt --make-key
# encryption_keyring = "pjv2"  # the same, with the key in the system's keyring

[policy]
# max_fee_rate = {policy.max_fee_rate:g}  # sat/vB that we ever pay for our own weight
# max_fee_share = {policy.max_fee_share:g}  # of the payment
# min_fee_rate = {policy.min_fee_rate:g}  # sat/vB; below it a payer's transaction is refused
# min_amount = {policy.min_amount:_}  # sat; below it no own coin is offered
# own_input = {_string(policy.own_input)}  # require | prefer: whether channels need a coin of ours
# on_peer_failure = {_string(policy.on_peer_failure)}  # drop | deposit | abort
# approve = {_string(policy.approve)}  # auto | ask: whether a person approves each proposal
# approve_within = {policy.approve_within:g}  # seconds; without a word by then the payer's own transaction is broadcast
# expire_in = {policy.expire_in:_}  # seconds that a request is good for, at most 518_400
# fallback_after = {policy.fallback_after:g}  # seconds after the expiry until the payer's own transaction is broadcast
# confirmations = {policy.confirmations}  # when a payment is told as confirmed
# give_up_blocks = {policy.give_up_blocks:_}
# watch_after_expiry = {policy.watch_after_expiry:_.0f}  # seconds

[poller]
# max_in_flight = 256

[hooks]
# command = "notify-me"  # runs per event, JSON on stdin
# webhook = "https://example.org/hook"
# webhook_secret_file = "webhook.secret"

[metrics]
# listen = "127.0.0.1:0"  # Prometheus text and health; off for nowhere
"""


def _services(answers: Answers) -> str:
    packaged = "" if answers.network is Network.REGTEST else "; without it, the list that comes with pjv2"
    lines = []
    for name, urls, example in (
        ("directories", answers.directories, "https://directory.example"),
        ("relays", answers.relays, "https://relay.example"),
    ):
        text = f"{name} = [{', '.join(_string(url) for url in (urls or [example]))}]"
        lines.append(text if urls else f"# {text}  # yours{packaged}")
    return "\n".join(lines)


def _line(key: str, value: str | None, example: str = "") -> str:
    return f"{key} = {_string(value)}" if value is not None else f"# {key} = {_string(example)}"


def _string(text: Any) -> str:
    """A TOML string; JSON's escapes are TOML's. Raises WrongUsage for characters that have no place in a configuration."""
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in str(text)):
        raise WrongUsage("a value for the configuration holds a control character")
    return json.dumps(str(text), ensure_ascii=False)
