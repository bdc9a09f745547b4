"""Wallets: whose coins are contributed, and who signs.

- `bdk`        `BdkWallet`, the embedded wallet over bdkpython: a file of its own, kept current by an Esplora or Electrum server.
- `bdk_file`   that file and everything the library does with it, on one thread.
- `bdk_keys`   descriptors and mnemonics, and the library itself.
- `bdk_sync`   the servers.
- `leases`     which coin is locked for whom, on disk.
- `signature`  whether a signature holds, by our own reckoning.

How money could be lost here, and what prevents it: an address that is given out twice (its index is on disk before it is shown);
a coin that is pledged twice (locks are on disk before they are answered, one process owns the file); a signature nobody asked
for (only named inputs are handed to the library unsigned, only their final scripts are taken back); a previous output as a peer
tells it (ours come from our own records).

Law: foreign exceptions end here, and neither an exception nor a repr holds a key, a word or a descriptor.
"""
