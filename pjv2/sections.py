"""The tables of the configuration: every key, its kind, its limits and its default, and how a secret is read.

It refuses a value out of range, two keys that say the same, and a secret file that other users of the machine can read.

Law: what a table shows of itself holds no secret, and a secret file is read when it is needed, not before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    NoDecode,
)

from pjv2.errors import NotNow, WrongUsage
from pjv2.units import MAX_MONEY, FeeRate

if TYPE_CHECKING:
    pass

MAX_EXPIRE_IN = 518_400
"""Six days: a directory keeps a mailbox for seven, and proposing must never outlive it."""

URL_SECRETS = re.compile(r"(?<=://)[^/\s@]*@|(?<=[^/\s])\?\S*")
HEX = re.compile(r"(?:[0-9a-fA-F]{2}){16,}\Z")


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


def socks_proxy(value: str) -> str:
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
            yield name, URL_SECRETS.sub("…", value) if isinstance(value, str) else value

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


# ---------------------------------------------------------------- secret files


def read_secret(path: Path, place: str) -> bytes:
    """The content of a secret file. Raises WrongUsage when others can read it, NotNow when we cannot now."""
    try:
        with path.open("rb") as file:
            refuse_open(path, os.fstat(file.fileno()), place)
            return file.read()
    except OSError as exc:
        raise NotNow(f"{place}: {path} cannot be read now: {exc.strerror or type(exc).__name__}") from exc


def refuse_open(path: Path, status: os.stat_result, place: str) -> None:
    # Group access is left alone: a daemon's cookie is shared with a group on purpose.
    if os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o007:
        raise WrongUsage(
            f"{place}: other users can read {path}, which holds a secret: chmod o-rwx {shlex.quote(str(path))}"
        )
