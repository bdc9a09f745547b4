"""Writes `docs/reference`: commands with their flags, configuration keys, JSON lines; `tests.docs_generator` calls it.

Commands are read from the signatures that the shell is built from, keys from the configuration's own models, JSON lines from the
source: the events of sessions from `session.public`, results from what the commands hand to `Output.result`.

Law: the code is the source. What it cannot tell (the meaning of a key or a field) stands in the tables below; a name that is
missing there, or stands there in vain, is an error. Nothing depends on terminal, machine or environment.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import SecretStr

from pjv2 import config as conf
from pjv2 import opening
from pjv2.accounts import Account
from pjv2.cli import command as shared
from pjv2.cli.app import COMMANDS, GROUPS
from pjv2.cli.plainly import Kept

ROOT = Path(__file__).resolve().parents[1]
STAR = "\\*"
FOLDER = ROOT / "docs" / "reference"


class StaleTables(Exception):
    """The tables of this module and the code name different things."""


def _same(what: str, here: Iterable[str], code: Iterable[str]) -> None:
    ours, theirs = set(here), set(code)
    if ours != theirs:
        raise StaleTables(f"{what}: missing {sorted(theirs - ours)}, in vain {sorted(ours - theirs)}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- commands

COMMANDS_HEAD = """\
# Commands

Written by `make docs` from the code; a test compares them. `pjv2 COMMAND --help` says the same.

People's text goes to stderr, results to stdout; with `--json` results are [JSON lines](events.md), and nobody is asked anything.
A session's ID is 32 hex characters; its beginning is enough wherever it names one session only.

| exit code | means |
|---|---|
| 0 | done |
| 1 | our bug |
| 2 | wrong usage |
| 3 | the peer's mistake; a payment that was refused, or that conflicts |
| 4 | not now: try again |
| 5 | expired |
| 6 | stored data that this version does not understand |
| 130 | interrupted; what was stored stays |
"""


def _run_of(words: str) -> Callable[..., Any]:
    path, _, function = COMMANDS[words].partition(":")
    found: Callable[..., Any] = getattr(import_module(path), function or "run")
    return found


def _kind(hint: Any) -> str:
    """What may be written there."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Annotated:
        return _kind(get_args(hint)[0])
    if get_origin(hint) is list:
        return f"{_kind(get_args(hint)[0])}, repeatable"
    if get_origin(hint) is tuple:
        return "list"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{one.value}`" for one in hint)
    kinds = {bool: "flag", int: "whole number", float: "number", str: "text", Path: "path", SecretStr: "text, a secret"}
    if hint not in kinds:
        raise StaleTables(f"{hint} has no words")
    return kinds[hint]


def _shown(value: Any) -> str:
    match value:
        case None | False | () | "":
            return ""
        case Enum():
            return f"`{value.value}`"
        case bool():
            return "yes"
        case int() if value >= 10_000:
            return f"`{value:_}`"
        case float():
            return f"`{value:_g}`" if value != int(value) else f"`{int(value):_}`"
        case _:
            return f"`{value}`"


def _option_row(name: str, hint: Any, default: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether it is an argument, and its row."""
    bare, told = get_args(hint)[:2]
    kind = _kind(bare)
    what = f"`{told.metavar}`" if told.metavar else kind
    if "repeatable" in kind and told.metavar:
        what += ", repeatable"
    if type(told).__name__ == "ArgumentInfo":
        return True, (f"`{told.metavar or name.upper()}`", kind, _shown(default), told.help)
    # With Annotated, typer takes the first spelling for a default and moves it later.
    written = [one for one in (told.default, *(told.param_decls or ())) if isinstance(one, str) and one.startswith("-")]
    names = [name for one in written for name in one.split("/")]  # a flag and its opposite
    if not names:
        raise StaleTables(f"the option {name} does not say how it is written")
    if told.count:
        what = "flag, counted"
    environment = f" Also `{told.envvar}` in the environment." if told.envvar else ""
    return False, (", ".join(f"`{one}`" for one in names), what, _shown(default or None), told.help + environment)


def commands() -> str:
    """Every command: usage, what it does, arguments and options."""
    parts = [COMMANDS_HEAD]
    globals_ = [_option_row(name, hint, default)[1] for name, (hint, default) in sorted(shared._GLOBALS.items())]
    parts.append("## Everywhere\n")
    parts.append(
        "Before the command's name or after it; `-h` and `--help` explain, `pjv2 --version` says which version this is.\n"
    )
    parts.append(table(("option", "value", "default", "meaning"), globals_))
    groups: set[str] = set()
    for words in COMMANDS:
        group = words.partition(" ")[0]
        note = ""
        if group in GROUPS and group not in groups:
            groups.add(group)
            note = f"{GROUPS[group]}\n\n"
        parts.append(_command(words, note))
    return "\n".join(parts)


def options(words: str) -> set[str]:
    """Every spelling of an option that a command takes, those of all commands included."""
    run = _run_of(words)
    hints = get_type_hints(run, include_extras=True)
    names = list(inspect.signature(run).parameters)[1:]
    rows = [_option_row(name, hints[name], None) for name in names]
    rows += [_option_row(name, hint, None) for name, (hint, _) in shared._GLOBALS.items()]
    return {"-h", "--help"} | {
        one.strip("`") for is_argument, row in rows if not is_argument for one in row[0].split(", ")
    }


def _command(words: str, note: str) -> str:
    run = _run_of(words)
    hints = get_type_hints(run, include_extras=True)
    arguments, options = [], []
    for parameter in list(inspect.signature(run).parameters.values())[1:]:
        default = None if parameter.default is parameter.empty else parameter.default
        is_argument, row = _option_row(parameter.name, hints[parameter.name], default)
        (arguments if is_argument else options).append(row)
    usage = " ".join(["pjv2", words, *(row[0].strip("`") for row in arguments), *(["[OPTIONS]"] if options else [])])
    text = " ".join((run.__doc__ or "").split())
    if not text:
        raise StaleTables(f"pjv2 {words} does not say what it does")
    lines = [f"## pjv2 {words}\n", f"{note}{text}\n", f"`{usage}`\n"]
    if arguments:
        lines.append(table(("argument", "value", "default", "meaning"), arguments))
    if options:
        lines.append(table(("option", "value", "default", "meaning"), options))
    return "\n".join(lines)


# ---------------------------------------------------------------- configuration

CONFIG_HEAD = """\
# Configuration

Written by `make docs` from the code; a test compares them. `pjv2 init` writes a file with all of it as comments, `pjv2 doctor` tries
what it says.

A later source wins: defaults, the TOML file (`config.toml` in the platform's configuration directory, or `--config FILE`), environment
variables `PJV2_SECTION__KEY` (`PJV2_NETWORK` and `PJV2_PROXY` have no section), and what a program or a flag says. A key that is not
known is refused, and so is a secret file that other users of the machine can read.

Paths in the file are relative to the file, elsewhere to the working directory; a relative SQLite URL is relative to the platform's
data directory. Of keys that exclude each other, a later source's takes the place of an earlier source's.
"""

KEYS: Mapping[str, str] = {
    "network": "which Bitcoin; `regtest` unless told otherwise, so that nothing happens to real money by accident",
    "proxy": "`socks5h://host:port`, such as Tor's: directories, relays and chain servers that are not on this machine are reached "
    "through it, names are looked up there, and each session has a circuit of its own; a PostgreSQL database is reached without it",
    "payjoin.directories": "directories, as URLs or as `{url, operator}`; none: the packaged list of the network",
    "payjoin.relays": "relays, likewise; a directory is never reached through a relay of its own operator",
    "payjoin.ohttp_keys_file": "the directory's OHTTP keys, so that nobody is asked for them; for test directories",
    "payjoin.ca_file": "certificates to trust besides the system's",
    "wallet.backend": "whose coins",
    "wallet.descriptor": "bdk: where coins are received; private, or public for a wallet that sees and does not sign",
    "wallet.descriptor_file": "the same in a private file",
    "wallet.change_descriptor": "bdk: the branch for change, unless the first one has two paths",
    "wallet.change_descriptor_file": "the same in a private file",
    "wallet.mnemonic_file": "bdk: a private file with the words (BIP39)",
    "wallet.cold_descriptor": "a public descriptor of keys kept elsewhere, such as `wpkh([…]xpub…/0/*)`: payments without channels go to "
    "its addresses, where the payer allows it; see [cold-receiver.md](../howto/cold-receiver.md)",
    "wallet.url": "bitcoind: the URL of the node's wallet",
    "wallet.user": "bitcoind: who logs in",
    "wallet.password": "bitcoind: his password",
    "wallet.password_file": "the same in a private file",
    "wallet.cookie_file": "bitcoind: its cookie, instead of user and password",
    "chain.backend": "who tells about blocks; none: `esplora` with the wallet `bdk`, else the wallet's own back end",
    "chain.url": "the server: `https://host/api`, `ssl://host:port`, `tcp://host:port`",
    "chain.ca_file": "certificates to trust besides the system's",
    "chain.user": "bitcoind: who logs in",
    "chain.password": "bitcoind: his password",
    "chain.password_file": "the same in a private file",
    "chain.cookie_file": "bitcoind: its cookie, instead of user and password",
    "lightning.backend": "the node that opens channels; `rehearsal` moves no money and works on regtest only",
    "lightning.url": "lnd: the URL of its REST interface",
    "lightning.tls_cert": "lnd: its certificate",
    "lightning.macaroon": "lnd: a macaroon in hex; a path is taken as `macaroon_file`",
    "lightning.macaroon_file": "the same in a private file",
    "lightning.socket": "cln: its `lightning-rpc`",
    "lightning.directory": "rehearsal: where the node keeps itself; none: in the platform's data directory",
    "store.url": "the database of sessions: `sqlite:///path`, or `postgresql+psycopg://user@host/name`",
    "store.encryption_key_file": "32 bytes, or 64 hex characters, in a private file: stored events are encrypted with it",
    "store.encryption_keyring": "the name under which the system's keyring holds such a key instead",
    "policy.max_fee_rate": "sat/vB that is ever paid for weight of our own",
    "policy.max_fee_share": "the share of the payment that our part of the fee may take",
    "policy.min_fee_rate": "sat/vB; an Original below it is refused",
    "policy.min_amount": "sat; below it no coin of ours is added",
    "policy.own_input": "`require`: channels only with a coin of ours in the transaction; `prefer` opens them without one, at a risk",
    "policy.on_peer_failure": "`drop`: a channel that fails is left out, its satoshis go to the others or to the wallet; `deposit`: no "
    "channels, a plain payjoin; `abort`: no payjoin, the Original pays",
    "policy.approve": "`ask`: no proposal leaves before a person agrees",
    "policy.approve_within": "seconds after the payer's transaction was accepted that a person has to agree, at most until half a minute "
    "before the request expires; without a word the payer is refused, and his transaction pays",
    "policy.expire_in": "seconds that a request is good for",
    "policy.fallback_after": "seconds after the expiry until the Original is broadcast",
    "policy.confirmations": "after how many a payment is told as confirmed",
    "policy.give_up_blocks": "after how many blocks our own coin is spent back; peers forget a channel after 2,016",
    "policy.watch_after_expiry": "seconds after the expiry that the address of a request is watched",
    "poller.max_in_flight": "sessions that are worked on at once",
    "hooks.command": "is checked, and not acted on in this version",
    "hooks.webhook": "is checked, and not acted on in this version",
    "hooks.webhook_secret": "is checked, and not acted on in this version",
    "hooks.webhook_secret_file": "is checked, and not acted on in this version",
    "metrics.listen": "is checked, and not acted on in this version",
}
"""What a key means; the code has the rest."""

URLS = frozenset({"payjoin.url", "wallet.url", "chain.url", "lightning.url", "store.url", "hooks.webhook", "proxy"})


def _limits(metadata: Iterable[Any]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = [
        f"{word} {getattr(one, name):_}"
        for one in metadata
        for name, word in words.items()
        if isinstance(getattr(one, name, None), int | float)
    ]
    return f", {' and '.join(found)}" if found else ""


def config() -> str:
    """Every section and key: type, default, meaning; what excludes what; which back ends this version has."""
    here = [name for name in conf.Config.model_fields if name not in conf.SECTIONS]
    every = [*here, *(f"{section}.{key}" for section, kind in conf.SECTIONS.items() for key in kind.model_fields)]
    _same("keys", KEYS, every)
    parts = [CONFIG_HEAD, "## Above the first section\n"]
    parts.append(_keys("", {name: conf.Config.model_fields[name] for name in here}))
    for section, kind in conf.SECTIONS.items():
        parts += [f"## [{section}]\n", _keys(section, kind.model_fields)]
        alone = [", ".join(f"`{key}`" for key in group) for group in kind.either]
        if alone:
            parts.append(f"Only one of each: {'; '.join(alone)}.\n")
    parts.append("## Back ends that this version opens\n")
    parts.append("Others can be named, and are refused with a sentence that says so. A program can hand in its own.\n")
    have = {
        "[wallet]": opening.WALLETS,
        "[chain]": opening.CHAINS,
        "[lightning]": opening.CHANNELS,
        "[store] url": opening.STORES,
    }
    parts.append(
        table(("key", "has"), ((f"`{key}`", ", ".join(f"`{one}`" for one in known)) for key, known in have.items()))
    )
    return "\n".join(parts)


def _keys(section: str, found: Mapping[str, Any]) -> str:
    rows = []
    for key, field in found.items():
        name = f"{section}.{key}" if section else key
        kind = "URL" if name in URLS else _kind(field.annotation)
        rows.append((f"`{key}`", f"{kind}{_limits(field.metadata)}", _shown(field.default) or "–", KEYS[name]))
    return table(("key", "value", "default", "meaning"), rows)


# ---------------------------------------------------------------- JSON lines

EVENTS_HEAD = """\
# JSON lines

Written by `make docs` from the code; a test compares them.

With `--json` each line on stdout is one object, written as soon as it is true. It begins with

| field | value | meaning |
|---|---|---|
| `event` | text | what happened; the names below |
| `at` | text | when: RFC 3339, UTC, milliseconds |
| `session` | text | 32 hex characters; left out where no session is meant |

Amounts are whole satoshis, rates sat/vB, outpoints `txid:vout`, times inside an object seconds since the epoch unless the table says
otherwise. A field may be null. Fields may be added; none changes its meaning. No private key, message or PSBT is ever in them.
"""

EVENTS_MIDDLE = """\
## Events of a session

Told by `receive`, `send`, `run`, `resume`, `cancel`, `approve`, `refuse`, each once and in the order of the log. What each one means
stands in [flow.md](../flow.md#events). Fields of `Closed` with a star are a payer's only.
"""

RESULTS_HEAD = """\
## Results of commands

One line each, beside the events above. `DryRun` has the fields that its command knows.
"""

OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "NotNow": ("what", "why", "tries"),
    "KeyRotated": ("what", "why", "tries"),
    "Error": ("error", "why"),
}
"""Facts beside the log, with their fields; `NotNow` about the store has no `tries`."""

FIELDS: Mapping[str, tuple[str, str]] = {
    "address": ("text", "where the payment goes"),
    "alarms": ("list of text", "what a person should look at"),
    "added": ("number", "when the plan was added"),
    "amount": ("satoshis", "what is paid to the receiver; null: any amount"),
    "amount_received": ("satoshis", "what the receiver gained; for a payer, what the payee was owed"),
    "amount_requested": ("satoshis", "what was asked for; null: any amount"),
    "amount_sent": ("satoshis", "what the payee was owed"),
    "approve_until": ("number", "until when a person may approve a proposal; null: nobody is asked, or not any more"),
    "attempt": ("whole number", "which try at opening channels, from 1"),
    "blocked_peers": ("list of objects", "`peer` and `until_height`: not asked before that block"),
    "broadcast": ("truth", "whether the Original may go out instead"),
    "cancelled": ("truth", "somebody asked to stop it"),
    "capacity": ("satoshis", "of the channel"),
    "chain": ("text", "the chain source's back end"),
    "changed": ("whole number", "stored events that were rewritten"),
    "channels": ("list of text", "outpoints of channels"),
    "closed": ("text", "when it ended, RFC 3339"),
    "code": ("text", "the code of a refusal (BIP78)"),
    "coins": ("whole number", "how many coins of ours are set aside"),
    "cold": ("truth", "the payment goes to the cold address; null: the request has none"),
    "cold_address": ("text", "the cold wallet's address that a proposal sends the payment to; null: there is none"),
    "config": ("text", "the file that was written"),
    "esplora": ("text", "the lab's chain as an Esplora server"),
    "payer_config": ("text", "the payer's configuration file"),
    "contributed": ("satoshis", "own coins in the transaction that ended the session"),
    "created": ("number", "when the session was made"),
    "deferred": ("whole number", "sessions that could not be worked on in this pass"),
    "detail": ("text", "more of it, for people"),
    "directory": ("text", "the directory's URL"),
    "directory_peers": ("list of text", "addresses that the directory was asked from"),
    "error": ("text", "the kind of the error"),
    "events": ("whole number", "stored events there are"),
    "exit": ("whole number", "the exit code"),
    "expire_in": ("number", "seconds that the request would be good for"),
    "expires": ("number", "when the request expires"),
    "explanation": ("list of text", "the log as prose"),
    "failed": ("whole number", "checks that failed"),
    "failures": ("whole number", "in a row"),
    "fallback": ("text", "the Original's transaction id"),
    "fee": ("satoshis", "of the transaction"),
    "fee_extra": ("satoshis", "of children that sped a parent up"),
    "fee_ours": ("satoshis", "our share of the fee"),
    "fee_rate": ("number", "sat/vB"),
    "fee_theirs": ("satoshis", "the other side's share"),
    "health": ("text", "`good`, `resting` (left alone for a while) or `failed`"),
    "height": ("whole number", "the block; null: in the mempool, or not known"),
    "key_age": ("number", "seconds since the directory's keys were fetched"),
    "key_source": ("text", "who brought them"),
    "label": ("text", "as it stands in the URI"),
    "last_success": ("text", "RFC 3339"),
    "late": ("list of text", "payments after the end: transaction ids"),
    "lightning": ("text", "the node's back end"),
    "message": ("text", "one sentence"),
    "min": ("satoshis", "the least capacity, where the payment sets it"),
    "name": ("text", "of the check"),
    "network": ("text", "which Bitcoin"),
    "new_words": ("text", "the file that new words were written to"),
    "next": ("text", "what follows: `plan`, `plain`, `end` or `dead`"),
    "next_due": ("number", "when it is looked at again"),
    "note": ("text", "stays in the database"),
    "ok": ("truth", "nothing failed"),
    "open": ("whole number", "open sessions"),
    "operator": ("text", "who runs it"),
    "order": ("text", "the order number that the request was made for"),
    "outcome": ("text", "`Paid`, `PaidByFallback`, `PaidOtherwise`, `Refused`, `Expired`, `Cancelled` or `Conflicted`"),
    "outpoint": ("text", "the channel's"),
    "parent": ("text", "the stuck transaction"),
    "path": ("text", "the file that was written"),
    "payjoin": ("truth", "the payjoin itself paid"),
    "peer": ("text", "the peer's public key"),
    "peers": ("list of text", "Lightning peers, `pubkey@host:port`"),
    "plan": ("text", "the plan's id"),
    "private": ("truth", "the channel is not announced"),
    "progressed": ("whole number", "sessions that moved on"),
    "proposal": ("text", "the payjoin's transaction id"),
    "push": ("satoshis", "given to the peer"),
    "reason": ("text", "in the network's words"),
    "receiver_inputs": ("whole number", "coins of the receiver in the payjoin"),
    "ref": ("text", "what is labelled (BIP329)"),
    "relay_bytes_with_mailbox_id": ("whole number", "how often a relay saw the mailbox's id"),
    "relay_requests": ("whole number", "requests that the relays carried"),
    "relays": ("list of text", "the relays' URLs"),
    "removed": ("truth", "it is forgotten; only after `plan remove`"),
    "reply_bytes": ("whole number", "the largest proposal that the plan can lead to"),
    "returned": ("satoshis", "outputs to ourselves, channels included"),
    "risks": ("list of text", "what is to be agreed to"),
    "role": ("text", "`receiver` or `sender`"),
    "said": ("text", "what it said when it was tried"),
    "script": ("text", "to be read by the shell"),
    "seconds": ("number", "how long it took"),
    "seen": ("list of objects", "transactions in sight: `what`, `txid`, `height`, `amount`"),
    "session_state": ("text", "the state of the session"),
    "shell": ("text", "for which"),
    "state": ("text", "where it stands; see [flow.md](../flow.md)"),
    "states": ("list of text", "the way it went"),
    "status": ("text", "where it stands, in a few words"),
    "todo": ("text", "what to do"),
    "tries": ("whole number", "in a row"),
    "txid": ("text", "transaction id"),
    "type": ("text", "the channel's type"),
    "uri": ("text", "the payment URI"),
    "url": ("text", "of the service"),
    "value": ("satoshis", "of these coins"),
    "version": ("text", "of pjv2"),
    "wait": ("number", "seconds that it is left alone"),
    "waited": ("list of objects", "`session` and `why`: what kept it from going on in this pass"),
    "wallet": ("text", "the wallet's back end"),
    "warnings": ("whole number", "things to know of"),
    "what": (
        "text",
        "`payjoin`, `original`, `bumped`, `conflict`, `way_out`, `reclaim` or `address`",
    ),
    "where": ("text", "where it was found: `mailbox`, `node` or `chain`"),
    "why": ("text", "the reason"),
    "works": ("truth", "it answered; null: it was not tried"),
    "worst_contribution": ("satoshis", "what the receiver may take for his inputs at most"),
    "worst_fee": ("satoshis", "our part at most"),
    "Account.created": ("text", "when it was made, RFC 3339"),
    "Account.channels": ("list of objects", "`outpoint` and `capacity`"),
    "Account.cold_address": ("text", "where it arrived, if that is an address of the cold wallet"),
    "Alarm.what": ("text", "the alarm's name"),
    "ChannelsIntended.channels": ("list of objects", "`peer` and `capacity`; null: the rest"),
    "ChannelsReserved.channels": ("whole number", "how many peers agreed"),
    "Check.status": ("text", "`ok`, `warning` or `failed`"),
    "Created.channels": ("whole number", "how many channels are planned; receiver only"),
    "DemoDone.channels": ("list of objects", "`outpoint` and `capacity`"),
    "DryRun.channels": ("list of objects", "`peer` and `capacity`; null: the rest"),
    "DryRun.cold": ("truth", "a proposal would send the payment to the cold wallet"),
    "Error.next": ("text", "what to do"),
    "KeyRotated.what": ("text", "the need that has to wait"),
    "Label.label": ("text", "the label (BIP329)"),
    "Label.type": ("text", "`tx`, `addr` or `output` (BIP329)"),
    "NotNow.what": ("text", "the need that has to wait, or `store`"),
    "Plan.capacity": ("satoshis or text", "or `rest`"),
    "Plan.state": ("text", "`waiting`, or bound to a session, or opened"),
    "Relay.role": ("text", "`relay` or `directory`"),
}
"""Kind and meaning of a field, and of one that is something else in one event."""


def _functions(path: str) -> Mapping[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse((ROOT / "pjv2" / path).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def _keys_of(node: ast.AST) -> list[str]:
    """Top-level keys of the tables that a piece of code returns, in order: literals, and what is put into `facts` afterwards."""
    found: dict[str, None] = {}
    for one in ast.walk(node):
        value: ast.expr | None = None
        if isinstance(one, ast.Return | ast.AnnAssign):
            value = one.value
        elif isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Subscript):
            key = one.targets[0].slice
            if isinstance(key, ast.Constant):
                found[str(key.value)] = None
        if isinstance(value, ast.Dict):
            found |= {str(key.value): None for key in value.keys if isinstance(key, ast.Constant)}
    return list(found)


def session_events() -> dict[str, list[str]]:
    """The fields of every event that has some, read from the cases of `session.public`."""
    found: dict[str, list[str]] = {}
    match = next(node for node in _functions("session/public.py")["_facts"].body if isinstance(node, ast.Match))
    for case in match.cases:
        patterns = case.pattern.patterns if isinstance(case.pattern, ast.MatchOr) else [case.pattern]
        for pattern in patterns:
            if not isinstance(pattern, ast.MatchClass) or not isinstance(pattern.cls, ast.Attribute):
                continue
            name = pattern.cls.attr
            name = "Created" if name in ("ReceiverCreated", "SenderCreated") else name
            keys = _keys_of(ast.Module([*case.body], []))
            if name == "Closed":
                keys = [f"{key}*" if key == "payjoin" else key for key in keys]
            found[name] = list(dict.fromkeys([*found.get(name, []), *keys]))
    return found


def _spread() -> Mapping[tuple[str, str], Sequence[str]]:
    """What is spread into a result, by file and expression."""
    shown = [key for key in _keys_of(_functions("session/public.py")["public_session"]) if key != "session"]
    whole = [*shown, "next_due", "note", "order"]
    channel = [key for key in _keys_of(_functions("cli/channels.py")["_facts"]) if key != "session"]
    hidden = {"raw", "at", "sent"}
    return {
        ("cli/history.py", "row_facts(row)"): _keys_of(_functions("cli/sessions.py")["row_facts"]),
        ("cli/show.py", "found.facts"): whole,
        ("cli/explain.py", "found.facts"): whole,
        ("cli/export.py", "facts"): [field.name for field in fields(Account) if field.name != "session"],
        ("cli/channels.py", "_facts(channel, rows)"): channel,
        ("cli/channels.py", "facts"): channel,
        ("cli/relays.py", "_facts(line)"): _keys_of(_functions("cli/relays.py")["_facts"]),
        ("cli/plainly.py", "told"): [field.name for field in fields(Kept) if field.name not in hidden],
        ("cli/plan.py", "more"): ["removed"],
        ("lab/demo.py", "done"): [
            *_keys_of(_functions("lab/demo.py")["_first_act"]),
            *_keys_of(_functions("lab/demo.py")["_what_was_seen"]),
        ],
    }


def _results() -> Iterator[tuple[str, str, list[str]]]:
    """Every result of a command whose name stands in the source: file, event, fields."""
    spread = dict(_spread())
    used: set[tuple[str, str]] = set()
    files = [
        *sorted((ROOT / "pjv2" / "cli").glob("*.py")),
        *((ROOT / "pjv2" / "lab" / f"{n}.py") for n in ("demo", "up")),
    ]
    for path in files:
        name = path.relative_to(ROOT / "pjv2").as_posix()
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "result"):
                continue
            if not call.args or not isinstance(call.args[0], ast.Constant):
                continue  # an event of a session, or the result of a task
            keys: list[str] = []
            for keyword in call.keywords:
                if keyword.arg is not None:
                    keys.append(keyword.arg)
                    continue
                what = (name, ast.unparse(keyword.value))
                if what not in spread:
                    raise StaleTables(
                        f"{name} spreads {what[1]} into {call.args[0].value}, and nobody knows what that holds"
                    )
                used.add(what)
                keys += spread[what]
            yield name, str(call.args[0].value), [key for key in dict.fromkeys(keys) if key not in ("at", "session")]
    _same("spread", map(str, spread), map(str, used))


WHERE: Mapping[str, str] = {
    "app": "any command that fails; `--version`",
    "plainly": "send",
    "demo": "demo",
    "up": "lab up",
    "store": "store encrypt, store decrypt",
    "plan": "plan add, plan list, plan remove",
}
"""The commands of files that are not named like theirs."""


def results() -> dict[str, tuple[list[str], list[str]]]:
    """Commands and fields of every result."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for file, event, keys in _results():
        stem = Path(file).stem
        if stem == "app":
            who = "`--version`" if event == "Version" else "any command that fails"
        elif stem == "store":
            who = "store encrypt" if event == "StoreEncrypted" else "store decrypt"
        else:
            who = WHERE.get(stem, stem)
        commands_, fields_ = found.setdefault(event, ([], []))
        commands_ += [who] if who not in commands_ else []
        fields_ += [key for key in keys if key not in fields_]
    return found


def events() -> str:
    """Every JSON line: events of sessions, facts beside the log, results of commands; then every field."""
    told, done = session_events(), results()
    used: set[str] = set()
    for name, keys in [*told.items(), *OUTSIDE.items(), *((name, keys) for name, (_, keys) in done.items())]:
        used |= {f"{name}.{bare}" if f"{name}.{bare}" in FIELDS else bare for bare in (key.rstrip("*") for key in keys)}
    _same("fields", FIELDS, used)
    parts = [EVENTS_HEAD, EVENTS_MIDDLE, table(("event", "fields"), ((f"`{n}`", _listed(k)) for n, k in told.items()))]
    parts.append("Every other event of the log has no fields of its own.\n")
    parts.append(
        "Beside the log, from whoever drives it: something has to wait, a directory changed its key, or a bug.\n"
    )
    parts.append(table(("event", "fields"), ((f"`{n}`", _listed(k)) for n, k in OUTSIDE.items())))
    parts += [RESULTS_HEAD]
    parts.append(
        table(
            ("event", "told by", "fields"), ((f"`{n}`", ", ".join(w), _listed(k)) for n, (w, k) in sorted(done.items()))
        )
    )
    parts += [
        "## Fields\n",
        table(("field", "value", "meaning"), ((f"`{n}`", *FIELDS[n]) for n in sorted(FIELDS, key=_place))),
    ]
    return "\n".join(parts)


def _place(name: str) -> tuple[str, str]:
    head, _, tail = name.rpartition(".")
    return (tail, head)


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key.rstrip('*')}`{STAR if key.endswith('*') else ''}" for key in keys) or "–"


# ---------------------------------------------------------------- the documents


def documents() -> dict[Path, str]:
    """The text of every reference document."""
    drawn = {"commands.md": commands(), "config.md": config(), "events.md": events()}
    return {FOLDER / name: text.rstrip("\n") + "\n" for name, text in drawn.items()}
