"""How events are written down and read again, and what else the store writes with them.

A record is JSON: `{"v":1,"event":"Seen","at":…,…}`, one name per event; both roles begin with `Created` and tell themselves apart by
`role`. The codec is driven by the events' own types: bytes are hex, an outpoint is `txid:vout`, a fee rate whole sat/kwu, an enum
its value, a tuple a list, a nested value an object.

It refuses what it does not know: another version, another event, a field it has never heard of, a value of another type. A program
that guesses at a newer log could release what the newer program still needs. Fields that were added later have defaults, so older
logs are read by newer programs, never the other way round.

Law: reading gives the whole state or CannotRead naming the record; never half a state, and never code.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pjv2.errors import CannotRead, IllegalEvent, PayjoinError, WrongUsage
from pjv2.session import events as ev
from pjv2.session.receive.life import Receiver
from pjv2.session.receive.life import begin as begin_receiver
from pjv2.session.receive.life import evolve as evolve_receiver
from pjv2.session.send.life import Sender
from pjv2.session.send.life import begin as begin_sender
from pjv2.session.send.life import evolve as evolve_sender
from pjv2.units import FeeRate, Outpoint

VERSION: Final = 1

State = Receiver | Sender


def _known_events() -> dict[str, type[ev.Event]]:
    found: dict[str, type[ev.Event]] = {}
    for value in vars(ev).values():
        if isinstance(value, type) and issubclass(value, ev.Event) and value is not ev.Event:
            found[value.__name__] = value
    return found


EVENTS: Final = _known_events()
"""Every event by the name of its type."""


# ---------------------------------------------------------------- state


def evolve(state: State | None, event: ev.Event) -> State:
    """The state after an event: the only way a state changes, live and in replay. Raises IllegalEvent, the state unchanged."""
    match state:
        case None:
            if isinstance(event, ev.ReceiverCreated):
                return begin_receiver(event)
            if isinstance(event, ev.SenderCreated):
                return begin_sender(event)
            raise IllegalEvent(f"a session begins with Created, not with {type(event).__name__}")
        case Receiver():
            return evolve_receiver(state, event)
        case Sender():
            return evolve_sender(state, event)


def replay(records: Sequence[tuple[int, str, str]]) -> State:
    """The state that a log tells: `(seq, name, data)` in order, from 0. Raises CannotRead naming the record."""
    state: State | None = None
    for expected, (seq, name, data) in enumerate(records):
        if seq != expected:
            raise CannotRead(
                f"the session's log has record {seq} where {expected} belongs: records are missing or doubled"
            )
        try:
            state = evolve(state, decode(name, data))
        except CannotRead as exc:
            raise CannotRead(f"record {seq} of the session's log: {exc}") from exc
        except PayjoinError as exc:
            raise CannotRead(f"record {seq} of the session's log does not fit what stands before it: {exc}") from exc
    if state is None:
        raise CannotRead("the session's log is empty")
    return state


# ---------------------------------------------------------------- records


def event_name(event: ev.Event) -> str:
    """The public name of an event: that of its type, and `Created` for both roles."""
    return _name_and_role(type(event))[0]


def _name_and_role(kind: type[ev.Event]) -> tuple[str, str | None]:
    if kind is ev.ReceiverCreated:
        return "Created", "receiver"
    if kind is ev.SenderCreated:
        return "Created", "sender"
    return kind.__name__, None


def encode(event: ev.Event) -> str:
    """The record of an event, as JSON text; it can hold secrets."""
    name, role = _name_and_role(type(event))
    record: dict[str, Any] = {"v": VERSION, "event": name}
    if role is not None:
        record["role"] = role
    for entry in _fields_of(type(event)):
        record[entry.name] = entry.write(getattr(event, entry.name))
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def decode(name: str, data: str) -> ev.Event:
    """The event of a record. Raises CannotRead for anything that `encode` does not write."""
    try:
        record = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise CannotRead("it is not JSON") from exc
    if not isinstance(record, dict):
        raise CannotRead("it is not a JSON object")
    if type(record.get("v")) is not int or record["v"] != VERSION:
        raise CannotRead(f"it has version {record.get('v')!r}, and this program reads version {VERSION}")
    if record.get("event") != name:
        raise CannotRead(f"it is named {name!r}, and says {record.get('event')!r} of itself")
    role = record.get("role")
    kind = EVENTS.get(name)
    if name == "Created":
        kind = {"receiver": ev.ReceiverCreated, "sender": ev.SenderCreated}.get(role) if isinstance(role, str) else None
    elif role is not None:
        raise CannotRead(f"{name} has a role")
    if kind is None or _name_and_role(kind)[0] != name:
        raise CannotRead(f"it holds an event {name!r} that this program does not know")
    values = {key: value for key, value in record.items() if key not in ("v", "event", "role")}
    event = _read_fields(kind, values, name)
    if not isinstance(event, ev.Event):
        raise CannotRead(f"{name} is no event")
    return event


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a field is given twice")
    return record


# ---------------------------------------------------------------- the codec


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    write: Callable[[Any], Any]
    read: Callable[[Any, str], Any]
    required: bool


_FIELDS: dict[type[Any], tuple[_Field, ...]] = {}


def _fields_of(kind: type[Any]) -> tuple[_Field, ...]:
    """The fields of a dataclass with their codecs, worked out once per type."""
    if kind not in _FIELDS:
        _FIELDS[kind] = _work_out(kind)
    return _FIELDS[kind]


def _work_out(kind: type[Any]) -> tuple[_Field, ...]:
    hints = get_type_hints(kind)
    return tuple(
        _Field(
            entry.name,
            *_codec(hints[entry.name]),
            required=entry.default is MISSING and entry.default_factory is MISSING,
        )
        for entry in fields(kind)
        if entry.init
    )


def _read_fields(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    known = _fields_of(kind)
    unknown = set(values) - {entry.name for entry in known}
    if unknown:
        raise CannotRead(f"{where} has a field {sorted(unknown)[0]!r} that this program does not know")
    arguments: dict[str, Any] = {}
    for entry in known:
        if entry.name in values:
            arguments[entry.name] = entry.read(values[entry.name], f"{where}.{entry.name}")
        elif entry.required:
            raise CannotRead(f"{where} lacks {entry.name!r}")
    try:
        return kind(**arguments)
    except PayjoinError as exc:
        raise CannotRead(f"{where} holds a value out of range: {exc}") from exc


def _codec(hint: Any) -> tuple[Callable[[Any], Any], Callable[[Any, str], Any]]:  # noqa: PLR0911  # one return per case
    """How values of a type are written and read."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _optional(hint)
    if origin is Literal:
        return _same, _one_of(get_args(hint))
    if origin is tuple:
        return _tuple(get_args(hint))
    if hint is Outpoint:
        return str, _outpoint
    if hint is FeeRate:
        return (lambda rate: rate.sat_per_kwu), _rate
    if isinstance(hint, type) and issubclass(hint, Enum):
        return (lambda value: value.value), _enum(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _object_writer(hint), _object_reader(hint)
    scalars: dict[Any, tuple[Callable[[Any], Any], Callable[[Any, str], Any]]] = {
        bytes: (bytes.hex, _bytes),
        str: (_same, _exactly(str, "text")),
        bool: (_same, _exactly(bool, "true or false")),
        int: (_same, _integer),
        float: (_number_out, _number),
    }
    if hint not in scalars:
        raise TypeError(f"the log has no form for {hint!r}")
    return scalars[hint]


def _same(value: Any) -> Any:
    return value


def _exactly(kind: type[Any], words: str) -> Callable[[Any, str], Any]:
    def read(value: Any, where: str) -> Any:
        if type(value) is not kind:
            raise CannotRead(f"{where} is not {words}")
        return value

    return read


def _integer(value: Any, where: str) -> int:
    if type(value) is not int:
        raise CannotRead(f"{where} is not a whole number")
    return value


def _number_out(value: float) -> float | int:
    """A whole number is written without a fraction, so that equal instants are equal bytes."""
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CannotRead(f"{where} is not a number")
    return float(value)


def _bytes(value: Any, where: str) -> bytes:
    if type(value) is not str or value != value.lower():
        raise CannotRead(f"{where} is not lower-case hex")
    try:
        data = bytes.fromhex(value)
    except ValueError as exc:
        raise CannotRead(f"{where} is not lower-case hex") from exc
    if data.hex() != value:
        raise CannotRead(f"{where} is not lower-case hex")
    return data


def _outpoint(value: Any, where: str) -> Outpoint:
    try:
        return Outpoint.parse(value if type(value) is str else "")
    except PayjoinError as exc:
        raise CannotRead(f"{where} is not an outpoint") from exc


def _rate(value: Any, where: str) -> FeeRate:
    try:
        return FeeRate(_integer(value, where))
    except WrongUsage as exc:
        raise CannotRead(f"{where} is out of range: {exc}") from exc


def _one_of(allowed: tuple[Any, ...]) -> Callable[[Any, str], Any]:
    def read(value: Any, where: str) -> Any:
        if type(value) is not str or value not in allowed:
            raise CannotRead(f"{where} is none of {', '.join(map(str, allowed))}")
        return value

    return read


def _enum(kind: type[Enum]) -> Callable[[Any, str], Any]:
    def read(value: Any, where: str) -> Any:
        try:
            return kind(value)
        except ValueError as exc:
            raise CannotRead(f"{where} is no {kind.__name__} that this program knows") from exc

    return read


def _object_writer(kind: type[Any]) -> Callable[[Any], Any]:
    return lambda value: {entry.name: entry.write(getattr(value, entry.name)) for entry in _fields_of(kind)}


def _object_reader(kind: type[Any]) -> Callable[[Any, str], Any]:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise CannotRead(f"{where} is not an object")
        return _read_fields(kind, value, where)

    return read


def _tuple(arguments: tuple[Any, ...]) -> tuple[Callable[[Any], Any], Callable[[Any, str], Any]]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        write, read = _codec(arguments[0])

        def read_many(value: Any, where: str) -> tuple[Any, ...]:
            if not isinstance(value, list):
                raise CannotRead(f"{where} is not a list")
            return tuple(read(entry, f"{where}[{index}]") for index, entry in enumerate(value))

        return (lambda values: [write(value) for value in values]), read_many
    codecs = [_codec(argument) for argument in arguments]

    def read_each(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(codecs):
            raise CannotRead(f"{where} is not a list of {len(codecs)}")
        return tuple(codec[1](entry, where) for codec, entry in zip(codecs, value, strict=True))

    return (lambda values: [codec[0](value) for codec, value in zip(codecs, values, strict=True)]), read_each


def _optional(hint: Any) -> tuple[Callable[[Any], Any], Callable[[Any, str], Any]]:
    inner = [argument for argument in get_args(hint) if argument is not types.NoneType]
    if len(inner) != 1:
        raise TypeError(f"the log has no form for {hint!r}")
    write, read = _codec(inner[0])
    return (
        (lambda value: None if value is None else write(value)),
        (lambda value, where: None if value is None else read(value, where)),
    )
