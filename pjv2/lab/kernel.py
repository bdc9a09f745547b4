"""Bitcoin's real consensus for the lab's chain: libbitcoinkernel in this process, or a bitcoind of one's own.

It refuses to guess: where neither is there, the lab does not start. Whichever it is, the lab asks the same three things: judge a
block, tell what it connected and disconnected, verify scripts against given previous outputs.

Law: the kernel's callbacks only take notes; whoever submits applies them, because an exception inside a callback is lost.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pjv2.errors import NotNow
from pjv2.lab.bitcoind import BitcoindKernel
from pjv2.psbt.tx import TxOut

_REASON = re.compile(r"(?:Block validation error: |AcceptBlock FAILED \(|AcceptBlockHeader[^(]*\(|ERROR: )(.+?)\)?\s*$")

_KERNEL_LOCK = threading.Lock()  # the kernel's log is one per process: a reason belongs to the block under this lock


class Kernel(Protocol):
    """A consensus engine, as the lab uses one."""

    def genesis(self) -> tuple[bytes, list[bytes]]: ...

    def submit(self, raw: bytes) -> tuple[list[tuple[str, str]], str]: ...

    def first_bad_input(self, raw: bytes, prevouts: Sequence[TxOut]) -> int | None: ...

    def close(self) -> None: ...


def open_kernel() -> Kernel:
    """libbitcoinkernel in this process; where it has no wheel, a bitcoind on PATH. Raises NotNow when there is neither."""
    try:
        import pbk
    except ImportError as exc:
        program = shutil.which("bitcoind")
        if program is None:
            raise NotNow(
                "the lab's chain needs libbitcoinkernel, which is not installed: install pjv2[lab], or have bitcoind on PATH"
            ) from exc
        return BitcoindKernel(program)
    return _Kernel(pbk)


class _Kernel:
    """libbitcoinkernel on a temporary directory: submit blocks, hear what was connected, verify scripts."""

    def __init__(self, pbk: Any) -> None:
        self._pbk = pbk
        self._events: list[tuple[Literal["connected", "disconnected", "checked"], str]] = []
        self._lines: list[str] = []
        self._trouble: list[BaseException] = []
        self._directory = Path(tempfile.mkdtemp(prefix="pjv2-lab-"))
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        pbk = self._pbk

        def note(kind: Literal["connected", "disconnected"]) -> Any:
            def callback(_user: object, block: Any, _entry: object) -> None:
                try:
                    self._events.append((kind, str(block.block_hash)))
                except BaseException as exc:  # ctypes would print and forget it; it is raised after the call
                    self._trouble.append(exc)

            return callback

        def heard(line: str) -> None:
            self._lines.append(line)

        try:
            self._log = pbk.LoggingConnection(cb=heard)
            self._callbacks = pbk.ValidationInterfaceCallbacks(
                block_connected=note("connected"), block_disconnected=note("disconnected")
            )
            self._context = pbk.make_context(pbk.ChainType.REGTEST, validation_callbacks=self._callbacks)
            options = pbk.ChainstateManagerOptions(self._context, str(self._directory), str(self._directory / "blocks"))
            options.update_block_tree_db_in_memory(True)
            options.update_chainstate_db_in_memory(True)
            options.set_worker_threads_num(0)
            self._manager = pbk.ChainstateManager(options)
        except (RuntimeError, pbk.KernelException) as exc:
            raise NotNow(f"the lab's chain could not be opened: {exc}") from exc
        self._events.clear()

    def genesis(self) -> tuple[bytes, list[bytes]]:
        """Header and transactions of block 0."""
        block = self._manager.blocks[self._manager.get_active_chain().block_tree_entries[0]]
        return bytes(block)[:80], [bytes(t) for t in block.transactions]

    def submit(self, raw: bytes) -> tuple[list[tuple[str, str]], str]:
        """Process a block; answers what was connected and disconnected, in order, and the reason logged for a refusal."""
        with _KERNEL_LOCK:
            self._events.clear()
            self._lines.clear()
            refused = False
            try:
                self._manager.process_block(self._pbk.Block(raw))
            except (RuntimeError, self._pbk.KernelException):
                refused = True
            if self._trouble:
                raise self._trouble.pop()
            reasons = [match[1] for line in self._lines if (match := _REASON.search(line))]
            reason = reasons[0] if reasons else ("the kernel refused it" if refused else "")
            return list(self._events), reason

    def first_bad_input(self, raw: bytes, prevouts: Sequence[TxOut]) -> int | None:
        """The first input whose script fails under all consensus flags; None when all are good."""
        pbk = self._pbk
        tx = pbk.Transaction(raw)
        scripts = [pbk.ScriptPubkey(out.script) for out in prevouts]
        spent = [pbk.TransactionOutput(script, out.value) for script, out in zip(scripts, prevouts, strict=True)]
        precomputed = pbk.script.PrecomputedTransactionData(tx, spent)
        flags = pbk.ScriptVerificationFlags.ALL
        for index, (script, out) in enumerate(zip(scripts, prevouts, strict=True)):
            if script.verify(out.value, tx, precomputed, index, flags) != 1:
                return index
        return None

    def close(self) -> None:
        # The manager goes first: it must not write into a directory that is gone.
        for name in ("_manager", "_context", "_callbacks", "_log"):
            if hasattr(self, name):
                delattr(self, name)
        shutil.rmtree(self._directory, ignore_errors=True)
