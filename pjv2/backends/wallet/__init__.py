"""Wallets: whose coins are contributed, and who signs.

- `bdk`        `BdkWallet`, the embedded wallet over bdkpython: a file of its own, kept current by an Esplora or Electrum server.
- `bdk_file`   that file and everything the library does with it, on one thread, in turns with other processes.
- `bdk_keys`   descriptors and mnemonics, and the library itself.
- `bdk_sync`   the servers.
- `bitcoind`   `BitcoindWallet`, a wallet of a Bitcoin Core node (`bitcoind_shapes` reads what that tells).
- `leases`     which coin is locked for whom, and what was just broadcast, on disk.
- `signature`  whether a signature holds, by our own reckoning.

How money could be lost here, and what prevents it: an address that is given out twice (its index is on disk before it is shown);
a coin that is pledged twice (locks are on disk before they are answered); either of them by two processes (one at a time has its
turn, and knows what the others stored); a signature nobody asked for (only named inputs are handed to the library unsigned, only
their final scripts are taken back); a previous output as a peer tells it (ours come from our own records).

Law: foreign exceptions end here, and neither an exception nor a repr holds a key, a word or a descriptor.
"""
