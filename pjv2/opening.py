"""Back ends by name: where a configuration becomes a store, a wallet, a chain source, a Lightning node and a mailroom.

It refuses a name that this version does not speak, and says which it does.

Law: this is the one place that chooses a back end; nothing heavy is imported before it is chosen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from pjv2 import config as settings
from pjv2.config import Config
from pjv2.errors import WrongUsage
from pjv2.sections import ChainSection, Service, WalletSection

if TYPE_CHECKING:
    import httpx

    from pjv2.backends.bitcoind_rpc import BitcoindRpc
    from pjv2.backends.mailroom import ServiceLike
    from pjv2.backends.store.sealed import StoreKey
    from pjv2.backends.wallet.bdk_keys import Keys
    from pjv2.backends.wallet.cold import ColdWallet
    from pjv2.ports import Chain, Channels, Mailroom, Store, Wallet


_Opener = TypeVar("_Opener")


async def _sql(config: Config) -> Store:
    from pjv2.backends.store.sealed import SealedStore, refuse_sealed
    from pjv2.backends.store.sql import SqlStore

    key = await store_key(config)
    store = await SqlStore.open(config.store_url)
    try:
        if key is not None:
            return await SealedStore.open(store, key)
        await refuse_sealed(store)
    except BaseException:
        await store.close()
        raise
    return store


async def store_key(config: Config) -> StoreKey | None:
    """The key that stored events are encrypted with; None where none is configured. Raises WrongUsage, NotNow."""
    from pjv2.backends.store.sealed import StoreKey, key_in_keyring

    if config.store.encryption_keyring is not None:
        return await key_in_keyring(config.store.encryption_keyring)
    file = config.store.encryption_key_file
    if file is not None and not file.exists():
        raise WrongUsage(f"[store] encryption_key_file: there is no {file}; pjv2 store encrypt --make-key makes one")
    data = config.store.secret_bytes("encryption_key")
    return None if data is None else StoreKey.parse(data, "[store] encryption_key_file")


def _bdk_keys(config: Config) -> Keys:
    from pjv2.backends.wallet import bdk

    told = config.wallet
    return bdk.keys_from(told.secret("descriptor"), told.secret("change_descriptor"), told.secret_bytes("mnemonic"))


async def _bdk(config: Config) -> Wallet:
    from pjv2.backends.wallet import bdk

    ring = bdk.key_ring(_bdk_keys(config), config.network)
    server = bdk.source_for(config.chain_backend, config.chain.url, config.proxy)
    # By the keys' public name: other keys have another file.
    path = settings.data_directory() / f"wallet-{config.network}-{ring.name}.sqlite"
    return await bdk.BdkWallet.open(path, ring, config.network, sync=server)


def _node(config: Config, told: WalletSection | ChainSection, url: str) -> BitcoindRpc:
    """A Core node at `url`, with the login that `told` names."""
    from pjv2.backends.bitcoind_rpc import BitcoindRpc, cookie_login, password_login

    def cookie() -> bytes:
        return told.secret_bytes("cookie") or b""

    def password() -> str:
        return told.secret("password") or ""

    if told.cookie_file is not None:
        login = cookie_login(cookie)
    elif told.user is not None and (told.password or told.password_file) is not None:
        login = password_login(told.user, password)
    else:
        raise WrongUsage(
            f"[{told.place}] says no login for bitcoind: name its cookie_file, or user and password_file (rpcauth)"
        )
    return BitcoindRpc(url, login, network=config.network, proxied=config.proxy is not None)


async def _bitcoind_wallet(config: Config) -> Wallet:
    from pjv2.backends.wallet.bitcoind import BitcoindWallet

    if config.wallet.url is None:
        raise WrongUsage("[wallet] url is missing: name the node's wallet, such as http://127.0.0.1:8332/wallet/NAME")
    return BitcoindWallet(_node(config, config.wallet, config.wallet.url), settings.data_directory())


async def _bitcoind_chain(config: Config) -> Chain:
    from pjv2.backends.chain.bitcoind import BitcoindChain

    told, wallet = config.chain, config.wallet
    same = wallet if wallet.backend == "bitcoind" else None
    url = told.url or (same.url if same is not None else None)
    if url is None:
        raise WrongUsage("[chain] url is missing: name the node, such as http://127.0.0.1:8332")
    own = told.user is not None or told.cookie_file is not None
    return BitcoindChain(_node(config, told if own or same is None else same, url))


def _chain_url(config: Config, example: str) -> str:
    if config.chain.url is None:
        raise WrongUsage(f"[chain] url is missing: name the server that tells about blocks, such as {example}")
    return config.chain.url


async def _esplora(config: Config) -> Chain:
    from pjv2.backends.chain.esplora import EsploraChain

    url = _chain_url(config, "https://host/api")
    return EsploraChain(url, network=config.network, proxy=config.proxy, ca_file=config.chain.ca_file)


async def _electrum(config: Config) -> Chain:
    from pjv2.backends.chain.electrum import ElectrumChain

    url = _chain_url(config, "ssl://host:50002")
    return ElectrumChain(url, network=config.network, proxy=config.proxy, ca_file=config.chain.ca_file)


async def _no_channels(config: Config, chain: Chain | None) -> None:
    return None


async def _rehearsal(config: Config, chain: Chain | None) -> Channels:
    from pjv2.backends.channel.rehearsal import RehearsalNode

    return RehearsalNode.open(config.lightning.directory or settings.data_directory() / "rehearsal", chain)


# A back end that pjv2 learns to speak is one function and one line here.
STORES: dict[str, Callable[[Config], Awaitable[Store]]] = {"sqlite": _sql, "postgresql": _sql}
WALLETS: dict[str, Callable[[Config], Awaitable[Wallet]]] = {"bdk": _bdk, "bitcoind": _bitcoind_wallet}
CHAINS: dict[str, Callable[[Config], Awaitable[Chain]]] = {
    "esplora": _esplora,
    "electrum": _electrum,
    "bitcoind": _bitcoind_chain,
}
CHANNELS: dict[str, Callable[[Config, Chain | None], Awaitable[Channels | None]]] = {
    "none": _no_channels,
    "rehearsal": _rehearsal,
}


def _chosen(known: Mapping[str, _Opener], name: str, key: str, what: str) -> _Opener:
    if name in known:
        return known[name]
    have = (
        f"it has {', '.join(known)}" if known else f"it has none that can be named, a program hands in its own {what}"
    )
    raise WrongUsage(f"{key} = {name!r} is not in this version of pjv2: {have}")


async def open_store(config: Config) -> Store:
    """The session database. Raises WrongUsage, NotNow, CannotRead."""
    scheme = config.store.url.partition(":")[0].partition("+")[0]
    return await _chosen(STORES, scheme, "[store] url", "store")(config)


async def open_mailroom(
    config: Config, store: Store | None = None, *, http: httpx.AsyncClient | None = None
) -> Mailroom:
    """Directories behind relays; `store` keeps their keys and health between runs, `http` is an app's own client.

    Raises WrongUsage, NotNow, CannotRead.
    """
    from pjv2.backends.mailroom import HttpMailroom

    told = config.payjoin
    return HttpMailroom.for_network(
        config.network,
        relays=_told(told.relays),
        directories=_told(told.directories),
        keys_file=told.ohttp_keys_file,
        ca_file=told.ca_file,
        proxy=config.proxy,
        http=http,
        cache=store,
    )


def _told(services: tuple[Service, ...]) -> list[ServiceLike] | None:
    return [one.url if one.operator is None else {"url": one.url, "operator": one.operator} for one in services] or None


async def open_wallet(config: Config) -> Wallet:
    """The wallet by its name. Raises WrongUsage when this version does not speak it."""
    return await _chosen(WALLETS, config.wallet.backend, "[wallet] backend", "wallet")(config)


async def open_cold(config: Config, wallet: Wallet) -> ColdWallet | Wallet | None:
    """Where addresses of cold keys come from: `cold_descriptor`, or a wallet that only watches; None where there are none.

    Raises WrongUsage for a private descriptor, and for the wallet's own.
    """
    told = config.wallet
    if told.cold_descriptor is None and told.backend != "bdk":
        return None
    from pjv2.backends.wallet import bdk

    if told.cold_descriptor is None:
        return wallet if isinstance(wallet, bdk.BdkWallet) and not await wallet.can_sign() else None
    from pjv2.backends.wallet import cold

    ring = cold.cold_ring(told.cold_descriptor, config.network)
    named = told.backend == "bdk" and (told.descriptor or told.descriptor_file or told.mnemonic_file) is not None
    if named and cold.same_addresses(ring, _bdk_keys(config), config.network):
        raise WrongUsage(
            "[wallet] cold_descriptor is the wallet's own: each would give out the other's addresses; leave it out, or name "
            "another account"
        )
    # Only these servers can tell which addresses were used before; without one the first address is index 0.
    served = config.chain_backend in ("esplora", "electrum")
    server = bdk.source_for(config.chain_backend, config.chain.url, config.proxy) if served else None
    return cold.ColdWallet(settings.data_directory() / f"cold-{config.network}-{ring.name}.sqlite", ring, sync=server)


async def open_chain(config: Config) -> Chain:
    """The chain source by its name. Raises WrongUsage when this version does not speak it."""
    return await _chosen(CHAINS, config.chain_backend, "[chain] backend", "chain")(config)


async def open_channels(config: Config, chain: Chain | None = None) -> Channels | None:
    """The Lightning node by its name; None where none is configured. `chain` is where a rehearsal node sees its channels confirm.

    Raises WrongUsage when this version does not speak it.
    """
    return await _chosen(CHANNELS, config.lightning.backend, "[lightning] backend", "channels")(config, chain)
