"""The store: whether it is durable, takes a value and gives it back, and who could read it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from pjv2.backends.store.sealed import SealedStore
from pjv2.doctor.installation import Check, Installation
from pjv2.ports import Store
from pjv2.session import replay
from pjv2.session.log import State
from pjv2.units import Network

_SPACE = 100 * 2**20


async def check_store(it: Installation) -> Sequence[Check]:
    """The database opens (which refuses files that others can read, and databases that forget), and takes a value."""
    store = await it.store()
    name, value = "doctor", it.rng.token(8).hex()
    await store.put(name, value)
    kept = await store.get(name)
    await store.put(name, None)
    if kept != value:
        why = "a value that was just written could not be read back"
        return [Check("store", "failed", why, "Another pjv2 doctor may be running; else check the disk.")]
    file = it.config.store_file
    if file is not None and file.exists() and (free := shutil.disk_usage(file.parent).free) < _SPACE:
        why = f"the disk of the session database has {free // 2**20} MiB left"
        return [Check("store", "warning", why, "Free some space: a payment that cannot be stored is not made.")]
    if isinstance(store, SealedStore):
        if clear := await store.in_the_clear():
            why = f"{clear} stored events are not encrypted yet"
            return [Check("store", "warning", why, "Run pjv2 store encrypt.")]
        return [Check("store", "ok", "durable, writable, its events encrypted")]
    owner = ", readable by its owner alone" if file is not None and os.name == "posix" else ""
    if it.config.network is Network.BITCOIN:
        why = f"durable and writable{owner}, not encrypted: it holds the keys of open sessions"
        todo = "Set [store] encryption_key_file and run pjv2 store encrypt --make-key, or keep it on an encrypted disk."
        return [Check("store", "warning", why, todo)]
    return [Check("store", "ok", f"durable and writable{owner}; not encrypted")]


async def state_of(store: Store, session: str) -> State:
    """The state that a session's log tells."""
    return replay([(record.seq, record.name, record.data) for record in await store.load(session)])
