"""One event of every kind with every field filled in, always the same: the content of the golden files."""

from __future__ import annotations

import dataclasses
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pjv2.session import events as ev
from pjv2.session.log import EVENTS
from pjv2.units import FeeRate, Outpoint
from tests.unit.session.world import World, unrelated

RAW = unrelated()
FIXED: dict[str, Any] = {
    "at": 1_700_000_000.25,
    "session": "0123456789abcdef0123456789abcdef",
    "txid": RAW.txid,
    "parent": "cc" * 32,
    "raw": RAW.raw,
}


def sample(hint: Any, name: str = "") -> Any:
    """A value of a type: present, not empty, and not its default where that can be helped."""
    if name in FIXED:
        return FIXED[name]
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return sample(next(a for a in get_args(hint) if a is not types.NoneType), name)
    if origin is Literal:
        return get_args(hint)[-1]
    if origin is tuple:
        arguments = get_args(hint)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return (sample(arguments[0]),)
        return tuple(sample(argument) for argument in arguments)
    if hint is Outpoint:
        return Outpoint("ab" * 32, 3)
    if hint is FeeRate:
        return FeeRate(1_234)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return list(hint)[-1]
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: sample(hints[f.name], f.name) for f in dataclasses.fields(hint) if f.init})
    return {bytes: b"\x01\x02\xff", str: "text \u2192", bool: True, int: 12_345, float: 1.5}[hint]


def _created() -> dict[str, ev.Event]:
    """The two beginnings must hold real keys and a real Original, or no session begins with them."""
    world = World(seed=99)
    return {"ReceiverCreated": world.receiver().events[0], "SenderCreated": world.sender().events[0]}


SAMPLES: dict[str, Any] = {**{name: sample(kind) for name, kind in EVENTS.items()}, **_created()}
