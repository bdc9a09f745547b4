"""`pjv2 lab up`: the lab's directory and relays stay up until they are interrupted, with a configuration that points at them.

What it serves over sockets is the BIP77 side of the lab; its chain lives in this process and serves this process alone. The
rehearsal peers' states lie on disk, so that a configured program reaches them too.

Law: everything listens on loopback, and everything it wrote is deleted when it goes down.
"""

from __future__ import annotations

import asyncio

from pjv2.lab.demo import Out
from pjv2.lab.world import World

_CONFIG = """\
# Written by `pjv2 lab up`; it is gone when the lab goes down.
network = "regtest"

[payjoin]
directories = [{{ url = "{directory}", operator = "operator of the directory" }}]
relays = [
{relays}
]
ohttp_keys_file = "{keys}"

[lightning]
backend = "rehearsal"
directory = "{node}"

[store]
url = "sqlite:///{store}"
"""


async def run(out: Out, *, stop: asyncio.Event | None = None) -> None:
    """Serve until `stop` is set, or for ever. Raises NotNow where the lab's kernel is not installed."""
    async with World() as world:
        receiver = await world.party("receiver", lightning=True)
        peers = world.peers(2)
        keys = world.home / "ohttp-keys.bin"
        keys.write_bytes(world.directory.keys.encode())
        relays = "\n".join(
            f'    {{ url = "{relay.url}", operator = "operator of relay {number}" }},'
            for number, relay in enumerate(world.relays, 1)
        )
        config = world.home / "lab.toml"
        config.write_text(
            _CONFIG.format(
                directory=world.directory.url,
                relays=relays,
                keys=keys,
                node=receiver.home / "node",
                store=world.home / "pjv2.sqlite",
            )
        )
        config.chmod(0o600)
        out.say("The lab is up: a directory, two relays, a chain, two Lightning peers. Ctrl-C takes it down.", "")
        out.result(
            "LabUp",
            config.read_text(),
            config=str(config),
            directory=world.directory.url,
            relays=[relay.url for relay in world.relays],
            peers=[peer.uri for peer in peers],
        )
        await (stop or asyncio.Event()).wait()
