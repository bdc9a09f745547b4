"""The configuration: where it is looked for, what counts more, and mistakes told with the place where they stand.

Sources, a later one wins: defaults, the TOML file (`pjv2/config.toml` in the platform's configuration directory), environment
variables `PJV2_SECTION__KEY`, and the mapping that a program or the command line hands in. It refuses keys it does not know (a
mistyped limit would be no limit), values out of range, and secret files that other users of the machine can read.

Paths in the file are relative to the file, elsewhere to the working directory; a relative SQLite URL is relative to the
platform's data directory, so that a timer and a shell meet in the same database.

Law: a `Config` never changes, its repr holds no secret, and a secret file is read when it is needed, not before.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from platformdirs import user_config_path, user_data_path
from pydantic import (
    AfterValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pjv2.errors import NotNow, WrongUsage
from pjv2.sections import (
    HEX,
    URL_SECRETS,
    ChainSection,
    HooksSection,
    LightningSection,
    MetricsSection,
    PayjoinSection,
    PolicySection,
    PollerSection,
    Section,
    Service,
    StoreSection,
    WalletSection,
    refuse_open,
    socks_proxy,
)
from pjv2.units import FeeRate, Network

if TYPE_CHECKING:
    from pjv2.session.events import Policy

PREFIX = "PJV2_"
_FILE = "config.toml"


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
    proxy: Annotated[str, AfterValidator(socks_proxy)] | None = None
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
            yield name, URL_SECRETS.sub("…", value) if isinstance(value, str) else value

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
        if name == "lightning" and isinstance(table.get("macaroon"), str) and not HEX.match(table["macaroon"]):
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
        refuse_open(path, status, place)


def _holds_secret(data: Mapping[str, Any]) -> bool:
    for name, value in data.items():
        if isinstance(value, Mapping):
            if _holds_secret(value):
                return True
        elif isinstance(value, str):
            if name in {"password", "webhook_secret"} or (name == "macaroon" and HEX.match(value)):
                return True
            if (name.endswith("descriptor") and "prv" in value) or re.search(r"://[^/\s@]*:[^/\s@]+@", value):
                return True
    return False
