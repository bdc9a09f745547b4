"""Messages A and B: what payer and receiver tell each other through mailboxes, end to end encrypted (BIP77, "Messages").

```
message A    payer -> receiver's mailbox       HPKE base mode, info "PjV2MsgA"
  +---------------------+-----------------------------------------------------------+
  | ElligatorSwift(enc) | ChaCha20-Poly1305(reply key 33 ‖ body ‖ 00…00)             |
  |  64                 |  33 + 7055 + tag 16                                       |  = 7168
  +---------------------+-----------------------------------------------------------+
  body = base64(Original PSBT) ‖ "\\n" ‖ query

message B    receiver -> payer's reply mailbox     HPKE auth mode by the receiver key, info "PjV2MsgB"
  +---------------------+-----------------------------------------------------------+
  | ElligatorSwift(enc) | ChaCha20-Poly1305(payload ‖ 00…00)                        |
  |  64                 |  7088 + tag 16                                            |  = 7168
  +---------------------+-----------------------------------------------------------+
  payload = binary Proposal PSBT, or a JSON error object
```

Both are 7168 bytes that look random to everyone else, the directory included. What a body or payload means is not known here.

It refuses what would not fit, when sealing; what does not open, is too short or has no valid reply key, when opening. ElligatorSwift is
only how `enc` travels: HPKE sees the full point, uncompressed, so a wrong parity of y does not open.

Law: every call seals with a new ephemeral key; no two messages are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pjv2.errors import BadCiphertext, WrongUsage
from pjv2.units import Entropy
from pjv2.wire import hpke
from pjv2.wire._aead import TAG_BYTES
from pjv2.wire.secp import (
    COMPRESSED_BYTES,
    ELLSWIFT_BYTES,
    PublicKey,
    SecretKey,
    ellswift_decode,
    ellswift_encode,
)

MESSAGE_BYTES = 7168
PLAINTEXT_A_BODY_BYTES = 7055
PLAINTEXT_B_BYTES = 7088

_INFO_A = b"PjV2MsgA"
_INFO_B = b"PjV2MsgB"


class PayloadTooLarge(WrongUsage):
    """The transaction is too large for a payjoin message: use fewer inputs and outputs."""

    def __init__(self, what: str, actual: int, limit: int) -> None:
        super().__init__(f"{what} takes {actual} bytes, and a payjoin message carries at most {limit}")
        self.actual = actual
        self.limit = limit


@dataclass(frozen=True, slots=True)
class MessageA:
    """What the payer said: where to reply, and the Original PSBT with its query as it was sent."""

    reply: PublicKey
    body: bytes = field(repr=False)


def seal_message_a(receiver: PublicKey, reply: PublicKey, body: bytes, rng: Entropy) -> bytes:
    """Message A to the holder of the URI's receiver key: 7168 bytes.

    `body` is at most 7055 bytes, and empty in a payer's poll. Draws an ephemeral key (`SecretKey.generate(rng)`), then
    `rng.token(32)` for ElligatorSwift. Raises PayloadTooLarge.
    """
    _check_size("the Original PSBT with its query", body, PLAINTEXT_A_BODY_BYTES)
    plaintext = reply.compressed + body.ljust(PLAINTEXT_A_BODY_BYTES, b"\x00")
    return _seal(hpke.setup_s(receiver, _INFO_A, rng), plaintext, rng)


def open_message_a(receiver: SecretKey, message: bytes) -> MessageA:
    """What a payer sealed to our receiver key; the zero padding after the text is gone.

    Raises BadCiphertext when it does not open or is too short to hold a reply key (anybody who has the URI can make such a one).
    """
    plaintext = hpke.setup_r(_enc(message), receiver, _INFO_A).open(message[ELLSWIFT_BYTES:])
    if len(plaintext) < COMPRESSED_BYTES:
        raise BadCiphertext(
            f"message A holds {len(plaintext)} bytes, too few for its {COMPRESSED_BYTES} byte reply key"
        )
    return MessageA(PublicKey.parse(plaintext[:COMPRESSED_BYTES]), plaintext[COMPRESSED_BYTES:].rstrip(b"\x00"))


def seal_message_b(reply: PublicKey, receiver: SecretKey, payload: bytes, rng: Entropy) -> bytes:
    """Message B to the payer's reply key, authenticated by our receiver key: 7168 bytes.

    `payload` is at most 7088 bytes. Draws as `seal_message_a`. Raises PayloadTooLarge.
    """
    _check_size("the reply", payload, PLAINTEXT_B_BYTES)
    context = hpke.setup_s(reply, _INFO_B, rng, sender=receiver)
    return _seal(context, payload.ljust(PLAINTEXT_B_BYTES, b"\x00"), rng)


def open_message_b(reply: SecretKey, receiver: PublicKey, message: bytes) -> bytes:
    """What the holder of the URI's receiver key, and nobody else, sealed to our reply key: payload and zero padding, 7088 bytes.

    The padding stays: a PSBT may end in zero bytes of its own. Raises BadCiphertext.
    """
    return hpke.setup_r(_enc(message), reply, _INFO_B, sender=receiver).open(message[ELLSWIFT_BYTES:])


def is_v1_text(body: bytes) -> bool:
    """Whether a mailbox holds a BIP78 payer's clear text rather than message A: nothing but valid UTF-8 tells them apart."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _seal(context: hpke.SealingContext, plaintext: bytes, rng: Entropy) -> bytes:
    return context.seal(plaintext, prefix=ellswift_encode(context.ephemeral, rng))


def _enc(message: bytes) -> PublicKey:
    if len(message) < ELLSWIFT_BYTES + TAG_BYTES:
        raise BadCiphertext(
            f"a payjoin message has at least {ELLSWIFT_BYTES + TAG_BYTES} bytes, this one {len(message)}"
        )
    return ellswift_decode(message[:ELLSWIFT_BYTES])


def _check_size(what: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise PayloadTooLarge(what, len(data), limit)
