"""State on disk that several processes share: one JSON document, one lock, whole replacements only.

It refuses a document it does not understand (`CannotRead`) instead of repairing it. Directories that it makes are 0700
and files 0600, for a document holds the seed of a node's keys.

Law: the file is the truth. Nobody keeps a copy across an `await`: read, change and write happen under the lock, in one step
that blocks the event loop for the time of two fsyncs, which a lab can afford.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pjv2.errors import CannotRead

VERSION = 1


class StateFile:
    """A JSON object in a file: atomic, durable, locked between processes and between objects of one process."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind

    def __repr__(self) -> str:
        return f"StateFile({self.kind!r})"

    def exists(self) -> bool:
        return self.path.exists()

    def create(self, document: dict[str, Any]) -> bool:
        """Write the first document; False when there is one already (it is left as it is)."""
        # One by one: `parents=True` would give the directories in between the default mode.
        missing = [directory for directory in self.path.parents if not directory.exists()]
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            if self.path.exists():
                return False
            self._write(json.dumps({"version": VERSION, "kind": self.kind, **document}))
            return True

    def read(self) -> dict[str, Any]:
        """The document as it is now. Raises CannotRead."""
        return self._parse(self._text())

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """The document under the lock; what the block leaves in it is durable afterwards, unless the block raises.

        Not reentrant: a second `change` of the same file inside the block would wait for itself.
        """
        with self._locked():
            before = self._text()
            document = self._parse(before)
            yield document
            after = json.dumps(document)
            if after != before:
                self._write(after)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own: the document is replaced, and a lock on a replaced file excludes nobody.
        handle = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError as exc:
            raise CannotRead(f"there is no {self.kind} in {self.path.parent}") from exc
        except UnicodeDecodeError as exc:
            raise CannotRead(f"the state of the {self.kind} in {self.path} is not text") from exc

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            document = json.loads(text)
        except json.JSONDecodeError as exc:
            # `from None`: the decoder's error carries the whole document, seed included.
            raise CannotRead(f"the state of the {self.kind} in {self.path} is damaged at byte {exc.pos}") from None
        if not isinstance(document, dict) or document.get("version") != VERSION or document.get("kind") != self.kind:
            raise CannotRead(f"{self.path} is not the state of a {self.kind} of version {VERSION}")
        return document

    def _write(self, text: str) -> None:
        temporary = self.path.with_suffix(".new")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
