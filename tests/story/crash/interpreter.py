"""What a new interpreter does with what an old one left.

`replay FILE SESSION` reads a session's log out of a SQLite file and prints the digest of the state that it tells.
`receive HOME` is a receiver's whole process: everything from disk, the directory and its relays over HTTP, the chain over a socket.
It ends with `os._exit` at the point that it is told, which is as sudden as SIGKILL: no handler runs, nothing is flushed or closed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pjv2 import session as model
from pjv2.session.needs import Memory


def digest(state: model.State) -> str:
    """Everything that follows from a log alone: what the session needs when nothing is remembered, and what it shows."""
    needs = sorted(str(_flat(need)) for need in model.needs(state, state.updated, Memory()).due)
    shown = json.dumps(model.public_session(state), sort_keys=True, default=str)
    return sha256("\n".join([*needs, shown, str(state.seq)]).encode()).hexdigest()


def _flat(value: Any) -> Any:
    """A need, field by field: its repr hides secrets, and sets have no order."""
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return [type(value).__name__, *((name, _flat(getattr(value, name))) for name in fields)]
    if isinstance(value, frozenset):
        return sorted(str(_flat(item)) for item in value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_flat(item) for item in value]
    return str(value)


def replay(file: Path, session: str) -> model.State:
    connection = sqlite3.connect(file)
    query = "SELECT seq, name, data FROM events WHERE session = ? ORDER BY seq"
    records = connection.execute(query, (session,)).fetchall()
    connection.close()
    return model.replay(records)


def receive(home: Path) -> None:
    """The life of a receiver's process, from disk. Its orders lie in `orders.json`; it says where it stands on stdout."""
    from tests.story.crash.process import live

    asyncio.run(live(home, lambda: os._exit(137)))


if __name__ == "__main__":
    if sys.argv[1] == "replay":
        print(digest(replay(Path(sys.argv[2]), sys.argv[3])))
    else:
        receive(Path(sys.argv[2]))
