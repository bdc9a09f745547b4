"""The room where bytes get a meaning: everything a payjoin puts on the wire, and nothing that puts it there.

It refuses to know a socket, a clock, a random source, a database or a logger: randomness is an argument (`pjv2.units.Entropy`),
and what comes in is bytes or text. Law: whatever arrives, the answer is a value or a `PeerMistake`.

From the inside out:

- `secp`     secp256k1: keys, x-only ECDH, ElligatorSwift. The only module that touches the curve library.
- `hpke`     RFC 9180 for DHKEM(secp256k1, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.
- `message`  messages A and B: what payer and receiver say to each other, end to end, 7168 bytes each.
- `bhttp`    RFC 9292: an HTTP message as bytes.
- `ohttp`    RFC 9458: a request to the directory that the relay cannot read, 8192 bytes each way.
- `mailbox`  one request to a mailbox and its answer: short ids, directory and relay addresses, `bhttp` in `ohttp`.
- `uri`      the payment URI: BIP21 / BIP321 with BIP77's fragment.

`_aead` (ChaCha20-Poly1305) serves `hpke` and `ohttp`; `_bech32` (no checksum) and `_url` (scheme, host, port) serve the last two.
"""
