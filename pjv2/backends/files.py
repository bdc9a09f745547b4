"""Files that several processes share: replaced whole, and changed by one at a time.

It refuses to wait for ever, and a lock on a file that somebody has taken away meanwhile. A lock ends with its process, however
that ends.

Law: what a reader finds is the old content or the new one, never a part; when `replace_whole` returns, the new one is on disk.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST_NAP = 0.004
_HOT = 0.05
"""Seconds of turns with hardly a pause after which a process lets others have one."""


def replace_whole(path: Path, data: bytes) -> None:
    """Put `data` (mode 0600) in the place of the file at `path`, durably. One writer at a time. Raises OSError."""
    beside = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(handle)
    finally:
        os.close(handle)
    beside.replace(path)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class TurnLock:
    """An exclusive lock by a file of its own: between processes, and between objects of one process. Not reentrant."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = float("-inf")
        self.let_go = float("-inf")
        """When this object had it last, by time.monotonic()."""

    def __repr__(self) -> str:
        return f"TurnLock({self._path.name})"

    @contextmanager
    def held(self, until: float, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Wait for the lock until `until` (by time.monotonic), blocking this thread, or until `given_up`; at least one try.

        Raises TimeoutError; OSError where the file cannot be made.
        """
        handle = self._take(until, given_up)
        try:
            yield
        finally:
            self.let_go = time.monotonic()
            _unlock(handle)

    def _take(self, until: float, given_up: Callable[[], bool]) -> int:
        self._let_others_first()
        nap = _LONGEST_NAP / 8
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            if _try_lock(handle):
                if self._is_still(handle):
                    return handle
                _unlock(handle)
            else:
                os.close(handle)
            if time.monotonic() >= until or given_up():
                raise TimeoutError(f"{self._path} stayed locked")
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)

    def _let_others_first(self) -> None:
        """Nobody is woken when the lock is free: who has one turn after the other leaves a gap that all who wait will see."""
        now = time.monotonic()
        if now - self.let_go > 2 * _LONGEST_NAP:
            self._since = now
        elif now - self._since > _HOT:
            time.sleep(2 * _LONGEST_NAP)
            self._since = time.monotonic()

    def _is_still(self, handle: int) -> bool:
        """Whether the file that was locked is the one that the next process will find."""
        try:
            return os.path.samestat(os.fstat(handle), self._path.stat())
        except FileNotFoundError:
            return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _unlock(handle: int) -> None:
        try:
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        finally:
            os.close(handle)

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except BaseException:
            os.close(handle)
            raise
        return True

    def _unlock(handle: int) -> None:
        # Unlocked before it is closed: a child that was forked meanwhile has the same lock, and would keep it.
        try:
            fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)
