"""`pjv2 lab up`: a lab that stays up until it is interrupted, with a configuration for a receiver and one for a payer.

Everything is reached over sockets on loopback: the directory, two relays, and the chain as an Esplora server. Both configurations
name an embedded wallet with confirmed coins, the receiver's also two rehearsal Lightning peers. A miner makes a block whenever
something waits, and goes on until it is buried.

Law: everything listens on loopback, and everything it wrote is deleted when it goes down.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path

from pjv2.backends.channel.rehearsal_peer import RehearsalPeer, make_peers
from pjv2.lab.demo import Out
from pjv2.lab.world import World
from pjv2.session.facts import BURIED
from pjv2.units import Network, Sats

COINS: tuple[Sats, ...] = (5_000_000, 2_000_000, 1_000_000)
_BLOCK_EVERY = 2.0

_CONFIG = """\
# Written by `pjv2 lab up` for the {who}; it is gone when the lab goes down.
network = "regtest"

[payjoin]
directories = [{{ url = "{directory}", operator = "operator of the directory" }}]
relays = [
{relays}
]
ohttp_keys_file = "{keys}"

[wallet]
backend = "bdk"
mnemonic_file = "{home}/wallet.words"

[chain]
backend = "esplora"
url = "{esplora}"
{lightning}
[store]
url = "sqlite:///{home}/pjv2.sqlite"
"""

_LIGHTNING = """
[lightning]
backend = "rehearsal"
directory = "{home}/node"
"""


async def run(out: Out, *, stop: asyncio.Event | None = None) -> None:
    """Serve until `stop` is set, or for ever. Raises NotNow where the lab's kernel is not installed."""
    async with World() as world:
        esplora = await world.serve_chain()
        keys = world.home / "ohttp-keys.bin"
        keys.write_bytes(world.directory.keys.encode())
        relays = "\n".join(
            f'    {{ url = "{relay.url}", operator = "operator of relay {number}" }},'
            for number, relay in enumerate(world.relays, 1)
        )
        configs: dict[str, Path] = {}
        peers: tuple[RehearsalPeer, ...] = ()
        for who in ("receiver", "payer"):
            home = world.home / who
            home.mkdir(mode=0o700)
            await _fund(world, home, who)
            lightning = ""
            if who == "receiver":
                peers = make_peers(home / "node" / "peers", 2)
                lightning = _LIGHTNING.format(home=home)
            configs[who] = home / "pjv2.toml"
            configs[who].write_text(
                _CONFIG.format(
                    who=who,
                    directory=world.directory.url,
                    relays=relays,
                    keys=keys,
                    home=home,
                    esplora=esplora.url,
                    lightning=lightning,
                )
            )
            configs[who].chmod(0o600)
        out.say(
            "The lab is up: a directory, two relays, a chain with an Esplora server, two Lightning peers, and coins in both",
            "wallets. Ctrl-C takes it down. In two other shells:",
            f"  pjv2 --config {configs['receiver']} receive 150_000",
            f"  pjv2 --config {configs['payer']} send URI",
            "",
        )
        out.result(
            "LabUp",
            configs["receiver"].read_text(),
            config=str(configs["receiver"]),
            payer_config=str(configs["payer"]),
            directory=world.directory.url,
            relays=[relay.url for relay in world.relays],
            esplora=esplora.url,
            peers=[peer.uri for peer in peers],
        )
        miner = asyncio.create_task(_mine(world))
        try:
            await asyncio.wait(
                {miner, asyncio.create_task((stop or asyncio.Event()).wait())}, return_when="FIRST_COMPLETED"
            )
        finally:
            miner.cancel()
            await asyncio.gather(miner, return_exceptions=True)


async def _fund(world: World, home: Path, who: str) -> None:
    """The words of a wallet in `home`, and confirmed coins at its first address; only the words where BDK has no wheel."""
    if find_spec("bdkpython") is None:
        return
    from pjv2.backends.wallet.bdk import BdkWallet
    from pjv2.backends.wallet.bdk_keys import MnemonicKeys, words_from_entropy

    words = words_from_entropy(world.entropy.token(16))
    secret = home / "wallet.words"
    secret.touch(mode=0o600)
    secret.write_text(words + "\n")
    wallet = await BdkWallet.open(home / "first.sqlite", MnemonicKeys(words, "p2wpkh"), Network.REGTEST)
    try:
        address = await wallet.new_address()
    finally:
        await wallet.close()
    for value in COINS:
        await world.chain.fund(address.script, value)


async def _mine(world: World) -> None:
    """A block every now and then while something waits or is not buried yet."""
    left = 0
    while True:
        await asyncio.sleep(_BLOCK_EVERY)
        if world.chain.mempool():
            left = BURIED
        if left:
            await world.chain.mine(1)
            left -= 1
