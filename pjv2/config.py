"""The configuration, and the one place where a back end is chosen by its name.

Sources, a later one wins: defaults, the TOML file (`pjv2/config.toml` in the platform's configuration directory), environment
variables `PJV2_SECTION__KEY`, and the mapping that a program or the command line hands in. It refuses keys it does not know (a
mistyped limit would be no limit), values out of range, and secret files that other users of the machine can read.

Paths in the file are relative to the file, elsewhere to the working directory; a relative SQLite URL is relative to the
platform's data directory, so that a timer and a shell meet in the same database.

Law: a `Config` never changes, its repr holds no secret, and a secret file is read when it is needed, not before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args
from urllib.parse import urlsplit

from platformdirs import user_config_path, user_data_path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pjv2.errors import NotNow, WrongUsage
from pjv2.units import MAX_MONEY, FeeRate, Network

if TYPE_CHECKING:
    import httpx

    from pjv2.backends.bitcoind_rpc import BitcoindRpc
    from pjv2.backends.mailroom import ServiceLike
    from pjv2.backends.store.sealed import StoreKey
    from pjv2.backends.wallet.bdk_keys import Keys
    from pjv2.backends.wallet.cold import ColdWallet
    from pjv2.ports import Chain, Channels, Mailroom, Store, Wallet
    from pjv2.session.events import Policy

MAX_EXPIRE_IN = 518_400
"""Six days: a directory keeps a mailbox for seven, and proposing must never outlive it."""

PREFIX = "PJV2_"
_FILE = "config.toml"
_REPR_URL = re.compile(r"(?<=://)[^/\s@]*@|(?<=[^/\s])\?\S*")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){16,}\Z")


# ---------------------------------------------------------------- kinds of values


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _url_of(*schemes: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError as exc:
            raise ValueError("is not a URL") from exc
        if parts.scheme == "socks5" and "socks5h" in schemes:
            raise ValueError("would look names up outside of the proxy: write socks5h://")
        if parts.scheme not in schemes or not host:
            raise ValueError(f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return value

    return check


def _listen(value: str) -> str:
    host, _, port = value.rpartition(":")
    if value != "off" and not (host and port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
        raise ValueError("must be host:port, or off")
    return value


def _public(value: str) -> str:
    if "prv" in value:
        raise ValueError("holds a private key: give the public descriptor (xpub, tpub) that the cold wallet exports")
    return value


def _proxy(value: str) -> str:
    value = _url_of("socks5h")(value)
    parts = urlsplit(value)
    if parts.port is None or parts.username is not None:
        raise ValueError("must be socks5h://host:port: each session brings its own user name")
    return value


Whole: TypeAlias = Annotated[int, BeforeValidator(_no_bool)]
Number: TypeAlias = Annotated[float, BeforeValidator(_no_bool)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
WebUrl: TypeAlias = Annotated[str, AfterValidator(_url_of("http", "https"))]


class Section(BaseModel):
    """A table of the configuration file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)
    place: ClassVar[str] = ""
    secret_files: ClassVar[tuple[str, ...]] = ()
    """Keys that name a file which holds a secret."""
    either: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Keys of which only one can be meant; one given later takes the place of one given earlier."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # A URL may carry a password, as user information or as a parameter.
        for name, value in super().__repr_args__():
            yield name, _REPR_URL.sub("…", value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_one_of_each(self) -> Section:
        for group in self.either:
            given = [name for name in group if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"has both {given[0]} and {given[1]}: keep one of them")
        return self

    def secret(self, name: str) -> str | None:
        """The secret `name`, as it stands or out of `name`_file; None when neither is given. Raises WrongUsage, NotNow."""
        found = getattr(self, name, None)
        if isinstance(found, SecretStr):
            return found.get_secret_value()
        data = self.secret_bytes(name)
        if data is None:
            return None
        try:
            return data.decode().rstrip("\r\n")
        except UnicodeDecodeError as exc:
            raise WrongUsage(f"[{self.place}] {name}_file does not hold text") from exc

    def secret_bytes(self, name: str) -> bytes | None:
        """The bytes of the file that `name`_file names, None when there is none. Raises WrongUsage, NotNow."""
        path = getattr(self, f"{name}_file")
        return None if path is None else read_secret(path, f"[{self.place}] {name}_file")


# ---------------------------------------------------------------- the tables


class Service(Section):
    """A relay or a directory. `operator` None: derived from its host."""

    url: WebUrl
    operator: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_string_is_its_url(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value


def _services(value: object) -> object:
    """What an environment variable says: a JSON list, or URLs between commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as exc:
            raise ValueError("is not a JSON list of URLs") from exc
    return [part.strip() for part in value.split(",") if part.strip()]


Services: TypeAlias = Annotated[tuple[Service, ...], NoDecode, BeforeValidator(_services)]


class PayjoinSection(Section):
    """`[payjoin]`: whom mail goes through. No directories or relays: those of `relay_config` for the network."""

    place: ClassVar[str] = "payjoin"
    directories: Services = ()
    relays: Services = ()
    ohttp_keys_file: Path | None = None
    ca_file: Path | None = None


class WalletSection(Section):
    """`[wallet]`: whose coins."""

    place: ClassVar[str] = "wallet"
    secret_files: ClassVar[tuple[str, ...]] = (
        "descriptor_file",
        "change_descriptor_file",
        "mnemonic_file",
        "password_file",
        "cookie_file",
    )
    either: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("descriptor", "descriptor_file", "mnemonic_file"),
        ("change_descriptor", "change_descriptor_file", "mnemonic_file"),
        ("password", "password_file", "cookie_file"),
    )
    backend: Literal["bdk", "bitcoind", "lnd"] = "bdk"
    descriptor: SecretStr | None = None
    descriptor_file: Path | None = None
    change_descriptor: SecretStr | None = None
    change_descriptor_file: Path | None = None
    mnemonic_file: Path | None = None
    # Public, and yet it tells every address: it is shown to nobody.
    cold_descriptor: Annotated[Text, AfterValidator(_public)] | None = Field(default=None, repr=False)
    url: WebUrl | None = None
    user: Text | None = None
    password: SecretStr | None = None
    password_file: Path | None = None
    cookie_file: Path | None = None


class ChainSection(Section):
    """`[chain]`: who tells us about blocks. No back end: the one that goes with the wallet."""

    place: ClassVar[str] = "chain"
    secret_files: ClassVar[tuple[str, ...]] = ("password_file", "cookie_file")
    either: ClassVar[tuple[tuple[str, ...], ...]] = (("password", "password_file", "cookie_file"),)
    backend: Literal["esplora", "electrum", "bitcoind", "lnd"] | None = None
    url: Annotated[str, AfterValidator(_url_of("http", "https", "tcp", "ssl"))] | None = None
    ca_file: Path | None = None
    user: Text | None = None
    password: SecretStr | None = None
    password_file: Path | None = None
    cookie_file: Path | None = None


class LightningSection(Section):
    """`[lightning]`: the node that opens channels."""

    place: ClassVar[str] = "lightning"
    secret_files: ClassVar[tuple[str, ...]] = ("macaroon_file",)
    either: ClassVar[tuple[tuple[str, ...], ...]] = (("macaroon", "macaroon_file"),)
    backend: Literal["none", "lnd", "cln", "rehearsal"] = "none"
    url: WebUrl | None = None
    tls_cert: Path | None = None
    macaroon: SecretStr | None = None
    """In hex; a path is taken as `macaroon_file`."""
    macaroon_file: Path | None = None
    socket: Path | None = None
    directory: Path | None = None
    """Where a rehearsal node keeps itself; by default in the platform's data directory."""


class StoreSection(Section):
    """`[store]`: where sessions are kept."""

    place: ClassVar[str] = "store"
    secret_files: ClassVar[tuple[str, ...]] = ("encryption_key_file",)
    either: ClassVar[tuple[tuple[str, ...], ...]] = (("encryption_key_file", "encryption_keyring"),)
    url: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+]*://")] = "sqlite:///pjv2.sqlite"
    encryption_key_file: Path | None = None
    """32 bytes, or 64 hex characters: stored events are encrypted with it."""
    encryption_keyring: Text | None = None
    """The name under which the system's keyring holds such a key instead."""


class PolicySection(Section):
    """`[policy]`: the limits under which a session is made. Rates in sat/vB, amounts in satoshis, times in seconds."""

    place: ClassVar[str] = "policy"
    max_fee_rate: Number = Field(default=50, gt=0, le=10_000)
    max_fee_share: Number = Field(default=0.05, ge=0, le=1)
    min_fee_rate: Number = Field(default=1, ge=0, le=10_000)
    min_amount: Whole = Field(default=10_000, ge=0, le=MAX_MONEY)
    own_input: Literal["require", "prefer"] = "require"
    on_peer_failure: Literal["drop", "deposit", "abort"] = "deposit"
    approve: Literal["auto", "ask"] = "auto"
    approve_within: Number = Field(default=600, gt=0, le=MAX_EXPIRE_IN)
    expire_in: Whole = Field(default=86_400, ge=1, le=MAX_EXPIRE_IN)
    fallback_after: Number = Field(default=600, ge=0, le=31_536_000)
    confirmations: Whole = Field(default=1, ge=1, le=6)
    give_up_blocks: Whole = Field(default=1_000, ge=1, le=2_000)
    """Below 2,016, when peers forget a channel that was never funded."""
    watch_after_expiry: Number = Field(default=2_592_000, ge=0, le=315_360_000)

    @field_validator("min_fee_rate")
    @classmethod
    def _in_whole_steps(cls, value: float) -> float:
        FeeRate.from_sat_per_vb(value)
        return value

    @model_validator(mode="after")
    def _the_least_rate_is_below_the_greatest(self) -> PolicySection:
        if self.min_fee_rate > self.max_fee_rate:
            raise ValueError("has a min_fee_rate above max_fee_rate, so that no Original could be answered")
        return self


class PollerSection(Section):
    """`[poller]`: how much at a time."""

    place: ClassVar[str] = "poller"
    max_in_flight: Whole = Field(default=256, ge=1, le=100_000)


class HooksSection(Section):
    """`[hooks]`: who is told about events."""

    place: ClassVar[str] = "hooks"
    secret_files: ClassVar[tuple[str, ...]] = ("webhook_secret_file",)
    either: ClassVar[tuple[tuple[str, ...], ...]] = (("webhook_secret", "webhook_secret_file"),)
    # Both may carry a token of the service that is called.
    command: Text | None = Field(default=None, repr=False)
    webhook: WebUrl | None = Field(default=None, repr=False)
    webhook_secret: SecretStr | None = None
    webhook_secret_file: Path | None = None


class MetricsSection(Section):
    """`[metrics]`: where Prometheus asks; `off` for nowhere."""

    place: ClassVar[str] = "metrics"
    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:0"


class Config(BaseSettings):
    """Everything pjv2 can be told before it starts; `Config.load` reads it, the constructor only checks what it is given."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
    )

    network: Network = Network.REGTEST
    proxy: Annotated[str, AfterValidator(_proxy)] | None = None
    payjoin: PayjoinSection = PayjoinSection()
    wallet: WalletSection = WalletSection()
    chain: ChainSection = ChainSection()
    lightning: LightningSection = LightningSection()
    store: StoreSection = StoreSection()
    policy: PolicySection = PolicySection()
    poller: PollerSection = PollerSection()
    hooks: HooksSection = HooksSection()
    metrics: MetricsSection = MetricsSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` reads file and environment itself, so that a mistake can be told with the place where it stands.
        return (init_settings,)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _REPR_URL.sub("…", value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _rehearsals_are_for_regtest(self) -> Config:
        if self.lightning.backend == "rehearsal" and self.network is not Network.REGTEST:
            raise ValueError("[lightning] backend = 'rehearsal' moves no real money: it needs network = 'regtest'")
        return self

    @classmethod
    def load(cls, path: Path | str | None = None, mapping: Mapping[str, Any] | None = None) -> Config:
        """Read the configuration: the file at `path` (else the platform's, where there is one), the environment, `mapping`.

        Raises WrongUsage in one sentence that names the key and its place, NotNow when a file cannot be read now.
        """
        file = Path(path).expanduser() if path is not None else default_path()
        sources = (
            Source("the configuration that the program gave", Path.cwd(), _thawed(mapping or {})),
            Source("the environment", Path.cwd(), _environment()),
            Source(str(file), file.absolute().parent, _read_toml(file, required=path is not None)),
        )
        merged: dict[str, Any] = {}
        for source in reversed(sources):
            _refuse_unknown(source)
            _merge(merged, _anchored(source))
        try:
            config = cls(**merged)
        except ValidationError as exc:
            raise WrongUsage(_in_words(exc, sources)) from exc
        _refuse_open_files(config, file, sources[-1].data)
        return config

    @property
    def chain_backend(self) -> str:
        """The chain source's back end: as configured, else the one that goes with the wallet."""
        return self.chain.backend or {"bdk": "esplora"}.get(self.wallet.backend, self.wallet.backend)

    @property
    def store_url(self) -> str:
        """The database URL, a relative SQLite path made absolute in the platform's data directory. May hold a password."""
        path = self.store_file
        return self.store.url if path is None else f"sqlite:///{path.as_posix()}"

    @property
    def store_file(self) -> Path | None:
        """The file of a SQLite store; None for a server."""
        scheme, _, rest = self.store.url.partition("://")
        name = rest.removeprefix("/")
        if scheme not in {"sqlite", "sqlite+pysqlite"} or not name or name == ":memory:" or "?" in name:
            return None
        return data_directory() / Path(name).expanduser()

    def session_policy(self) -> Policy:
        """The limits as a session records them."""
        from pjv2.session.events import Policy

        told = self.policy
        return Policy(
            # Rounded against ourselves: what we pay down, what we ask for up.
            max_fee_rate=FeeRate(int(Decimal(str(told.max_fee_rate)) * 250)),
            max_fee_share_ppm=int(Decimal(str(told.max_fee_share)) * 1_000_000),
            min_fee_rate=FeeRate.from_sat_per_vb(told.min_fee_rate),
            min_amount=told.min_amount,
            own_input=told.own_input,
            on_peer_failure=told.on_peer_failure,
            approve=told.approve,
            approve_within=told.approve_within,
            fallback_after=told.fallback_after,
            confirmations=told.confirmations,
            give_up_blocks=told.give_up_blocks,
            watch_after_expiry=told.watch_after_expiry,
        )


# ---------------------------------------------------------------- reading it


def default_path() -> Path:
    """Where the configuration is when nobody says otherwise."""
    return user_config_path("pjv2", appauthor=False) / _FILE


def data_directory() -> Path:
    """Where the session database is when nobody says otherwise."""
    return user_data_path("pjv2", appauthor=False)


@dataclass(frozen=True, slots=True)
class Source:
    """Some of the configuration, where it came from, and what its relative paths are relative to."""

    name: str
    base: Path
    data: dict[str, Any]

    def place(self, loc: tuple[str | int, ...]) -> str:
        """Where the key at `loc` stands, as a person would look for it."""
        if self.name == "the environment":
            return PREFIX + "__".join(str(part) for part in loc[:2]).upper()
        return f"{_key(loc)} in {self.name}"

    def holds(self, loc: tuple[str | int, ...]) -> bool:
        found: Any = self.data
        for part in loc[:2]:
            if not isinstance(found, Mapping) or part not in found:
                return False
            found = found[part]
        return True


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def _key(loc: tuple[str | int, ...]) -> str:
    section, keys = (f"[{loc[0]}]", loc[1:]) if loc and loc[0] in SECTIONS else ("", loc)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in keys).lstrip(".")
    return f"{section} {path}".strip()


def _thawed(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _thawed(value) if isinstance(value, Mapping) else value for name, value in mapping.items()}


def _read_toml(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError as exc:
        if required:
            raise WrongUsage(f"there is no configuration file {path}: write it, or name another with --config") from exc
        return {}
    except OSError as exc:
        raise NotNow(f"the configuration {path} cannot be read now: {exc.strerror or type(exc).__name__}") from exc
    except UnicodeDecodeError as exc:
        raise WrongUsage(f"the configuration {path} is not UTF-8 text") from exc
    except tomllib.TOMLDecodeError as exc:
        raise WrongUsage(f"the configuration {path} is not TOML: {exc}") from exc


def _environment() -> dict[str, Any]:
    for name in os.environ:
        if not name.upper().startswith(PREFIX):
            continue
        head, nested, _ = name[len(PREFIX) :].lower().partition("__")
        known = SECTIONS if nested else Config.model_fields
        if head in SECTIONS and not nested:
            raise WrongUsage(f"{name} in the environment names a section: write {PREFIX}{head.upper()}__KEY")
        # Without a section it may be somebody else's variable; only what looks like a slip of the pen is refused.
        near = get_close_matches(head, known, n=1, cutoff=0.6 if nested else 0.8)
        if head not in known and (nested or near):
            raise WrongUsage(
                f"{name} in the environment names no known key{_did_you_mean(near, ' section' if nested else '')}"
            )
    try:
        return {name: value for name, value in EnvSettingsSource(Config)().items() if value != {}}
    except SettingsError as exc:
        raise WrongUsage(f"the environment cannot be read: {exc}") from exc


def _did_you_mean(near: list[str], what: str = "") -> str:
    return f"; did you mean{what} {near[0]}?" if near else ""


def _refuse_unknown(source: Source) -> None:
    for name, value in source.data.items():
        if name not in Config.model_fields:
            raise WrongUsage(f"{source.place((name,))} is not a known key{_nearest(name, None)}")
        if name in SECTIONS and isinstance(value, Mapping):
            for key in value:
                if key not in SECTIONS[name].model_fields:
                    raise WrongUsage(f"{source.place((name, key))} is not a known key{_nearest(key, name)}")


def _nearest(key: str, section: str | None) -> str:
    """The key that was probably meant: this very key of another section, else one near it in this section or another."""
    here = SECTIONS[section].model_fields if section else Config.model_fields
    elsewhere = {name: f"[{other}] {name}" for other, kind in SECTIONS.items() for name in kind.model_fields}
    elsewhere |= {name: f"{name}, above the first section" for name in Config.model_fields if name not in SECTIONS}
    if key not in elsewhere and (near := get_close_matches(key, here, n=1)):
        return _did_you_mean(near)
    near = get_close_matches(key, elsewhere, n=1)
    return _did_you_mean([elsewhere[near[0]]] if near else [])


def _anchored(source: Source) -> dict[str, Any]:
    """The source's data with absolute paths."""

    def absolute(text: object) -> object:
        return source.base / Path(text).expanduser() if isinstance(text, str | Path) and str(text) else text

    found: dict[str, Any] = {}
    for name, value in source.data.items():
        if name not in SECTIONS or not isinstance(value, Mapping):
            found[name] = value
            continue
        table = dict(value)
        if name == "lightning" and isinstance(table.get("macaroon"), str) and not _HEX.match(table["macaroon"]):
            table.setdefault("macaroon_file", table.pop("macaroon"))
        for key, field in SECTIONS[name].model_fields.items():
            if key in table and Path in get_args(field.annotation):
                table[key] = absolute(table[key])
        found[name] = table
    return found


def _merge(into: dict[str, Any], later: Mapping[str, Any]) -> None:
    for name, value in later.items():
        if name in SECTIONS and isinstance(value, Mapping) and isinstance(into.get(name), dict):
            for group in SECTIONS[name].either:
                if any(key in value for key in group):
                    for key in group:
                        into[name].pop(key, None)
            into[name] |= value
        else:
            into[name] = dict(value) if isinstance(value, Mapping) else value


def _in_words(exc: ValidationError, sources: tuple[Source, ...]) -> str:
    """One sentence about the first mistake. Values are shown only where they are numbers: others may be secrets."""
    errors = exc.errors(include_url=False)
    loc = errors[0]["loc"]
    source = next((source for source in sources if loc and source.holds(loc)), None)
    place = source.place(loc) if source is not None else _key(loc)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{place} {_complaint(errors[0])}{more}".strip()


_RANGES = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_SENTENCES = {
    "missing": "is missing",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be a URL",
}
_KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "path": "a path",
    "tuple": "a list",
    "model": "a table",
    "dict": "a table",
}


def _complaint(error: ErrorDetails) -> str:
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind in _RANGES:
        name, words = _RANGES[kind]
        limit = f"{context[name]:,}".replace(",", "_")
        return f"is {given}, and must be {words} {limit}"
    if kind == "extra_forbidden":
        near = get_close_matches(str(error["loc"][-1]), Service.model_fields, n=1)
        return f"is not a known key{_did_you_mean(near)}"
    if kind in {"literal_error", "enum"}:
        return f"must be one of {context['expected']}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    wanted = _KINDS.get(kind.partition("_")[0])
    return f"must be {wanted}" if wanted else f"is not valid: {error['msg']}"


# ---------------------------------------------------------------- secret files


def read_secret(path: Path, place: str) -> bytes:
    """The content of a secret file. Raises WrongUsage when others can read it, NotNow when we cannot now."""
    try:
        with path.open("rb") as file:
            _refuse_open(path, os.fstat(file.fileno()), place)
            return file.read()
    except OSError as exc:
        raise NotNow(f"{place}: {path} cannot be read now: {exc.strerror or type(exc).__name__}") from exc


def _refuse_open(path: Path, status: os.stat_result, place: str) -> None:
    # Group access is left alone: a daemon's cookie is shared with a group on purpose.
    if os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o007:
        raise WrongUsage(
            f"{place}: other users can read {path}, which holds a secret: chmod o-rwx {shlex.quote(str(path))}"
        )


def _refuse_open_files(config: Config, file: Path, in_file: Mapping[str, Any]) -> None:
    named = [
        (path, f"[{name}] {key}")
        for name, kind in SECTIONS.items()
        for key in kind.secret_files
        if (path := getattr(getattr(config, name), key)) is not None
    ]
    if _holds_secret(in_file):
        named.append((file, "the configuration"))
    for path, place in named:
        try:
            status = path.stat()
        except OSError:
            continue  # told when it is needed: a cookie appears only when its daemon runs
        _refuse_open(path, status, place)


def _holds_secret(data: Mapping[str, Any]) -> bool:
    for name, value in data.items():
        if isinstance(value, Mapping):
            if _holds_secret(value):
                return True
        elif isinstance(value, str):
            if name in {"password", "webhook_secret"} or (name == "macaroon" and _HEX.match(value)):
                return True
            if (name.endswith("descriptor") and "prv" in value) or re.search(r"://[^/\s@]*:[^/\s@]+@", value):
                return True
    return False


# ---------------------------------------------------------------- back ends by name

_Opener = TypeVar("_Opener")


async def _sql(config: Config) -> Store:
    from pjv2.backends.store.sealed import SealedStore, refuse_sealed
    from pjv2.backends.store.sql import SqlStore

    key = await store_key(config)
    store = await SqlStore.open(config.store_url)
    try:
        if key is not None:
            return await SealedStore.open(store, key)
        await refuse_sealed(store)
    except BaseException:
        await store.close()
        raise
    return store


async def store_key(config: Config) -> StoreKey | None:
    """The key that stored events are encrypted with; None where none is configured. Raises WrongUsage, NotNow."""
    from pjv2.backends.store.sealed import StoreKey, key_in_keyring

    if config.store.encryption_keyring is not None:
        return await key_in_keyring(config.store.encryption_keyring)
    file = config.store.encryption_key_file
    if file is not None and not file.exists():
        raise WrongUsage(f"[store] encryption_key_file: there is no {file}; pjv2 store encrypt --make-key makes one")
    data = config.store.secret_bytes("encryption_key")
    return None if data is None else StoreKey.parse(data, "[store] encryption_key_file")


def _bdk_keys(config: Config) -> Keys:
    from pjv2.backends.wallet import bdk

    told = config.wallet
    return bdk.keys_from(told.secret("descriptor"), told.secret("change_descriptor"), told.secret_bytes("mnemonic"))


async def _bdk(config: Config) -> Wallet:
    from pjv2.backends.wallet import bdk

    ring = bdk.key_ring(_bdk_keys(config), config.network)
    server = bdk.source_for(config.chain_backend, config.chain.url, config.proxy)
    # By the keys' public name: other keys have another file.
    path = data_directory() / f"wallet-{config.network}-{ring.name}.sqlite"
    return await bdk.BdkWallet.open(path, ring, config.network, sync=server)


def _node(config: Config, told: WalletSection | ChainSection, url: str) -> BitcoindRpc:
    """A Core node at `url`, with the login that `told` names."""
    from pjv2.backends.bitcoind_rpc import BitcoindRpc, cookie_login, password_login

    def cookie() -> bytes:
        return told.secret_bytes("cookie") or b""

    def password() -> str:
        return told.secret("password") or ""

    if told.cookie_file is not None:
        login = cookie_login(cookie)
    elif told.user is not None and (told.password or told.password_file) is not None:
        login = password_login(told.user, password)
    else:
        raise WrongUsage(
            f"[{told.place}] says no login for bitcoind: name its cookie_file, or user and password_file (rpcauth)"
        )
    return BitcoindRpc(url, login, network=config.network, proxied=config.proxy is not None)


async def _bitcoind_wallet(config: Config) -> Wallet:
    from pjv2.backends.wallet.bitcoind import BitcoindWallet

    if config.wallet.url is None:
        raise WrongUsage("[wallet] url is missing: name the node's wallet, such as http://127.0.0.1:8332/wallet/NAME")
    return BitcoindWallet(_node(config, config.wallet, config.wallet.url), data_directory())


async def _bitcoind_chain(config: Config) -> Chain:
    from pjv2.backends.chain.bitcoind import BitcoindChain

    told, wallet = config.chain, config.wallet
    same = wallet if wallet.backend == "bitcoind" else None
    url = told.url or (same.url if same is not None else None)
    if url is None:
        raise WrongUsage("[chain] url is missing: name the node, such as http://127.0.0.1:8332")
    own = told.user is not None or told.cookie_file is not None
    return BitcoindChain(_node(config, told if own or same is None else same, url))


def _chain_url(config: Config, example: str) -> str:
    if config.chain.url is None:
        raise WrongUsage(f"[chain] url is missing: name the server that tells about blocks, such as {example}")
    return config.chain.url


async def _esplora(config: Config) -> Chain:
    from pjv2.backends.chain.esplora import EsploraChain

    url = _chain_url(config, "https://host/api")
    return EsploraChain(url, network=config.network, proxy=config.proxy, ca_file=config.chain.ca_file)


async def _electrum(config: Config) -> Chain:
    from pjv2.backends.chain.electrum import ElectrumChain

    url = _chain_url(config, "ssl://host:50002")
    return ElectrumChain(url, network=config.network, proxy=config.proxy, ca_file=config.chain.ca_file)


async def _no_channels(config: Config, chain: Chain | None) -> None:
    return None


async def _rehearsal(config: Config, chain: Chain | None) -> Channels:
    from pjv2.backends.channel.rehearsal import RehearsalNode

    return RehearsalNode.open(config.lightning.directory or data_directory() / "rehearsal", chain)


# A back end that pjv2 learns to speak is one function and one line here.
STORES: dict[str, Callable[[Config], Awaitable[Store]]] = {"sqlite": _sql, "postgresql": _sql}
WALLETS: dict[str, Callable[[Config], Awaitable[Wallet]]] = {"bdk": _bdk, "bitcoind": _bitcoind_wallet}
CHAINS: dict[str, Callable[[Config], Awaitable[Chain]]] = {
    "esplora": _esplora,
    "electrum": _electrum,
    "bitcoind": _bitcoind_chain,
}
CHANNELS: dict[str, Callable[[Config, Chain | None], Awaitable[Channels | None]]] = {
    "none": _no_channels,
    "rehearsal": _rehearsal,
}


def _chosen(known: Mapping[str, _Opener], name: str, key: str, what: str) -> _Opener:
    if name in known:
        return known[name]
    have = (
        f"it has {', '.join(known)}" if known else f"it has none that can be named, a program hands in its own {what}"
    )
    raise WrongUsage(f"{key} = {name!r} is not in this version of pjv2: {have}")


async def open_store(config: Config) -> Store:
    """The session database. Raises WrongUsage, NotNow, CannotRead."""
    scheme = config.store.url.partition(":")[0].partition("+")[0]
    return await _chosen(STORES, scheme, "[store] url", "store")(config)


async def open_mailroom(
    config: Config, store: Store | None = None, *, http: httpx.AsyncClient | None = None
) -> Mailroom:
    """Directories behind relays; `store` keeps their keys and health between runs, `http` is an app's own client.

    Raises WrongUsage, NotNow, CannotRead.
    """
    from pjv2.backends.mailroom import HttpMailroom

    told = config.payjoin
    return HttpMailroom.for_network(
        config.network,
        relays=_told(told.relays),
        directories=_told(told.directories),
        keys_file=told.ohttp_keys_file,
        ca_file=told.ca_file,
        proxy=config.proxy,
        http=http,
        cache=store,
    )


def _told(services: tuple[Service, ...]) -> list[ServiceLike] | None:
    return [one.url if one.operator is None else {"url": one.url, "operator": one.operator} for one in services] or None


async def open_wallet(config: Config) -> Wallet:
    """The wallet by its name. Raises WrongUsage when this version does not speak it."""
    return await _chosen(WALLETS, config.wallet.backend, "[wallet] backend", "wallet")(config)


async def open_cold(config: Config, wallet: Wallet) -> ColdWallet | Wallet | None:
    """Where addresses of cold keys come from: `cold_descriptor`, or a wallet that only watches; None where there are none.

    Raises WrongUsage for a private descriptor, and for the wallet's own.
    """
    told = config.wallet
    if told.cold_descriptor is None and told.backend != "bdk":
        return None
    from pjv2.backends.wallet import bdk

    if told.cold_descriptor is None:
        return wallet if isinstance(wallet, bdk.BdkWallet) and not await wallet.can_sign() else None
    from pjv2.backends.wallet import cold

    ring = cold.cold_ring(told.cold_descriptor, config.network)
    named = told.backend == "bdk" and (told.descriptor or told.descriptor_file or told.mnemonic_file) is not None
    if named and cold.same_addresses(ring, _bdk_keys(config), config.network):
        raise WrongUsage(
            "[wallet] cold_descriptor is the wallet's own: each would give out the other's addresses; leave it out, or name "
            "another account"
        )
    # Only these servers can tell which addresses were used before; without one the first address is index 0.
    served = config.chain_backend in ("esplora", "electrum")
    server = bdk.source_for(config.chain_backend, config.chain.url, config.proxy) if served else None
    return cold.ColdWallet(data_directory() / f"cold-{config.network}-{ring.name}.sqlite", ring, sync=server)


async def open_chain(config: Config) -> Chain:
    """The chain source by its name. Raises WrongUsage when this version does not speak it."""
    return await _chosen(CHAINS, config.chain_backend, "[chain] backend", "chain")(config)


async def open_channels(config: Config, chain: Chain | None = None) -> Channels | None:
    """The Lightning node by its name; None where none is configured. `chain` is where a rehearsal node sees its channels confirm.

    Raises WrongUsage when this version does not speak it.
    """
    return await _chosen(CHANNELS, config.lightning.backend, "[lightning] backend", "channels")(config, chain)
