"""Files that several processes share: whole replacements, and one turn at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from pjv2.backends.files import TurnLock, replace_whole

HOLDS = """
import sys, time
from pathlib import Path
from pjv2.backends.files import TurnLock
with TurnLock(Path(sys.argv[1])).held(time.monotonic()):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def lock(tmp_path):
    return TurnLock(tmp_path / "lock")


def soon():
    return time.monotonic() + 60


# ---------------------------------------------------------------- replacing


def test_a_file_is_replaced_whole_and_is_private(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with path.open("rb") as reader:
        replace_whole(path, b"new" * 100_000)
        assert reader.read() == b"old"  # whoever reads it has the old one whole
    assert path.read_bytes() == b"new" * 100_000
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_crash_left_half_written_is_written_anew(tmp_path):
    (tmp_path / "file.new").write_bytes(b"half")
    replace_whole(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert not (tmp_path / "file.new").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a directory is not synced there")
def test_the_content_is_on_disk_before_it_has_its_name_and_the_name_before_it_counts(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    replace_whole(tmp_path / "file", b"content")
    assert done == [False, True]


def test_a_failed_replacement_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        replace_whole(path, b"new")
    assert path.read_bytes() == b"old"


# ---------------------------------------------------------------- turns


def test_two_objects_of_one_process_exclude_each_other(lock, tmp_path):
    other = TurnLock(tmp_path / "lock")
    with lock.held(soon()), pytest.raises(TimeoutError), other.held(time.monotonic()):
        pass
    with other.held(time.monotonic()):
        pass


def test_a_lock_ends_with_its_process(lock, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(TimeoutError), lock.held(time.monotonic() + 0.02):
            pass
        process.kill()
        with lock.held(soon()):
            pass


def test_a_child_that_was_forked_in_a_turn_does_not_keep_it(lock, tmp_path, monkeypatch):
    """A fork copies the handle, and the lock with it, as `dup` does."""
    opened, copies = os.open, []

    def copied(*args, **kwargs):
        handle = opened(*args, **kwargs)
        copies.append(os.dup(handle))
        return handle

    monkeypatch.setattr(os, "open", copied)
    with lock.held(soon()):
        monkeypatch.undo()
    with TurnLock(tmp_path / "lock").held(time.monotonic()):
        pass
    (copy,) = copies
    os.close(copy)


def test_a_lock_on_a_file_that_was_taken_away_is_no_lock(lock, tmp_path, monkeypatch):
    path, opened, times = tmp_path / "lock", os.open, []

    def taken_away(*args, **kwargs):
        """The first time, somebody tidies up between the opening and the locking."""
        handle = opened(*args, **kwargs)
        times.append(handle)
        if len(times) == 1:
            path.unlink()
        return handle

    monkeypatch.setattr(os, "open", taken_away)
    with lock.held(soon()):
        assert len(times) == 2
        with pytest.raises(TimeoutError), TurnLock(path).held(time.monotonic()):
            pass


def test_who_waits_gives_up_when_told_and_tries_once_at_least(lock, tmp_path):
    with lock.held(float("-inf")):
        asked = []
        with (
            pytest.raises(TimeoutError),
            TurnLock(tmp_path / "lock").held(soon(), lambda: asked.append(1) is None and len(asked) > 2),
        ):
            pass
        assert len(asked) == 3


def test_who_has_one_turn_after_the_other_lets_others_have_theirs(lock, tmp_path):
    """Nobody is woken when a lock is free: without a gap, who waits would find it taken until the end."""
    started, stop = threading.Event(), threading.Event()

    def greedy():
        while not stop.is_set():
            with lock.held(soon()):
                started.set()
                time.sleep(0.005)  # the work of a turn

    thread = threading.Thread(target=greedy)
    thread.start()
    started.wait(60)
    other = TurnLock(tmp_path / "lock")
    try:
        for _ in range(3):
            with other.held(soon()):
                pass
    finally:
        stop.set()
        thread.join()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(FileNotFoundError), TurnLock(tmp_path / "nowhere" / "lock").held(soon()):
        pass
