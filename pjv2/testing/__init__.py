"""Fakes that this project's own tests use, and the contracts that every implementation of a port must keep.

A third party who writes a wallet, a store or a chain source runs the same checks over it: `WALLET_CHECKS`, `STORE_CHECKS`,
`CHAIN_CHECKS` hold named coroutines for one test each, `check_wallet(make)` and its siblings run them all.

Law: nothing in here is imported by the program itself.
"""

from pjv2.testing.check_chain import CHAIN_CHECKS, ChainRig, check_chain
from pjv2.testing.check_store import STORE_CHECKS, check_store
from pjv2.testing.check_wallet import WALLET_CHECKS, WalletRig, check_wallet
from pjv2.testing.clock import ManualClock
from pjv2.testing.entropy import SeededEntropy
from pjv2.testing.memory_store import MemoryStore
from pjv2.testing.paper_wallet import PaperWallet

__all__ = [
    "CHAIN_CHECKS",
    "STORE_CHECKS",
    "WALLET_CHECKS",
    "ChainRig",
    "ManualClock",
    "MemoryStore",
    "PaperWallet",
    "SeededEntropy",
    "WalletRig",
    "check_chain",
    "check_store",
    "check_wallet",
]
