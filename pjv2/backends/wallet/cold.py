"""Addresses of keys that are kept elsewhere: `[wallet] cold_descriptor`, read by a watch-only embedded wallet with a file of its own.

```
start.receive ─► ColdWallet.new_address ─► BdkWallet (public keys, cold-NETWORK-NAME.sqlite) ─► reveal, on disk
```

It refuses private keys, with a sentence that does not quote them, and the descriptor of the hot wallet itself, whose addresses
would be given out twice. It offers no coins, signs nothing and holds no lock: nobody else than the owner of the keys can spend what
arrives there.

Law: an address is given out once, its index on disk before anybody hears of it; a file without history asks the server first which
addresses were used.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from pjv2.backends.wallet.bdk import BdkWallet
from pjv2.backends.wallet.bdk_keys import DescriptorKeys, KeyRing, Keys, key_ring, library
from pjv2.backends.wallet.bdk_sync import Source
from pjv2.errors import WrongUsage
from pjv2.ports import WalletAddress
from pjv2.units import Network

PRIVATE = "holds a private key: give the public descriptor (xpub, tpub) that the cold wallet exports"


def cold_ring(descriptor: str, network: Network) -> KeyRing:
    """The keys of a public descriptor with one path or two; of two the first gives the addresses. Raises WrongUsage."""
    text = descriptor.strip()
    if "prv" in text:
        raise WrongUsage(f"[wallet] cold_descriptor {PRIVATE}")
    try:
        if "<" in text:  # both ways of writing the same branch have one file: their addresses are the same
            text = str(key_ring(DescriptorKeys(text), network).external).partition("#")[0]
        ring = key_ring(DescriptorKeys(text, _unused_branch(text)), network)
    except WrongUsage as exc:
        raise WrongUsage(f"[wallet] cold_descriptor: {exc}") from exc
    if ring.signs:
        raise WrongUsage(f"[wallet] cold_descriptor {PRIVATE}")
    return ring


def _unused_branch(text: str) -> str:
    """The embedded wallet wants a branch for change. Nothing is ever paid to this one: it lies one step below the addresses."""
    return text.partition("#")[0].replace("/*", "/1/*")


def same_addresses(cold: KeyRing, hot: Keys, network: Network) -> bool:
    """Whether the cold addresses are the hot wallet's own, for payments or for change. Raises WrongUsage for unreadable keys."""
    ring = key_ring(hot, network)
    return _first(cold.external, network) in (_first(ring.external, network), _first(ring.change, network))


def _first(descriptor: object, network: Network) -> bytes:
    address = descriptor.derive_address(0, getattr(library().Network, network.name))  # type: ignore[attr-defined]  # the library has no types
    return bytes(address.script_pubkey().to_bytes())


class ColdWallet:
    """The next address of public keys. Its file is opened when the first address is wanted, and shared with other processes."""

    def __init__(self, path: Path, ring: KeyRing, *, sync: Source | None) -> None:
        self._path = path
        self._ring = ring
        self._sync = sync
        self._wallet: BdkWallet | None = None
        self._opening = asyncio.Lock()

    def __repr__(self) -> str:
        return f"ColdWallet({self._ring.name}, {self._ring.network})"

    async def network(self) -> Network:
        return self._ring.network

    async def new_address(self) -> WalletAddress:
        """The next address, never given out before. Raises NotNow (server, disk), CannotRead, WrongUsage (other network)."""
        async with self._opening:
            if self._wallet is None:
                self._wallet = await BdkWallet.open(self._path, self._ring, self._ring.network, sync=self._sync)
        return await self._wallet.new_address()

    async def close(self) -> None:
        async with self._opening:
            wallet, self._wallet = self._wallet, None
        if wallet is not None:
            await wallet.close()
