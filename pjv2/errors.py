"""One tree of errors: whose fault it is, and what to do next.

Every exception that leaves a pjv2 module is one of these. The docstring of a class is the sentence a user can act on; the message
of an instance says what happened, in words that hold no secret. Foreign exceptions are translated where they enter (`raise … from`).

```
PayjoinError
├─ OurMistake       the caller broke the contract                                   fix the call
│   ├─ WrongUsage     a person asked for something that cannot be                   ask differently
│   └─ IllegalEvent   an event that the state machine does not know in this state   state unchanged
├─ PeerMistake      the other party broke the protocol; .reply = BIP78 code to send back, or None
│   ├─ BadUri  ├─ BadCiphertext  ├─ BadOriginal  └─ BadProposal
├─ NotNow           directory, relay, wallet, chain or node unavailable; nothing was recorded; .after = seconds
│   └─ KeyRotated     the directory changed its OHTTP key
├─ Expired          the session's time is over; the fallback is still good
└─ CannotRead       stored or received data that this version does not understand; nothing was touched
```

Law: the peer is told a code, never our reasons.
"""

from __future__ import annotations

from enum import StrEnum


class ReplyCode(StrEnum):
    """The error codes a receiver may send back (BIP78, "Receiver's well known errors")."""

    UNAVAILABLE = "unavailable"
    NOT_ENOUGH_MONEY = "not-enough-money"
    VERSION_UNSUPPORTED = "version-unsupported"
    ORIGINAL_PSBT_REJECTED = "original-psbt-rejected"


class PayjoinError(Exception):
    """Something went wrong in a payjoin; the subclass says whose fault it is and what to do."""

    exit_code = 1


class OurMistake(PayjoinError):
    """pjv2 was called against its contract: correct the call."""

    exit_code = 1


class WrongUsage(OurMistake):
    """What was asked for cannot be done this way: correct the command or the configuration."""

    exit_code = 2


class IllegalEvent(OurMistake):
    """An event arrived that this state does not know; the state is unchanged."""


class PeerMistake(PayjoinError):
    """The other party broke the protocol; nothing of ours was harmed."""

    exit_code = 3

    def __init__(self, message: str, reply: ReplyCode | None = None) -> None:
        super().__init__(message)
        self.reply = reply


class BadUri(PeerMistake):
    """The payment URI cannot be used: ask the payee for another one."""


class BadCiphertext(PeerMistake):
    """A message could not be decrypted or decoded: it was damaged, or not meant for us."""


class BadOriginal(PeerMistake):
    """The payer's Original PSBT breaks a rule: it is refused and the payer is told the code."""

    def __init__(self, message: str, reply: ReplyCode = ReplyCode.ORIGINAL_PSBT_REJECTED) -> None:
        super().__init__(message, reply)


class BadProposal(PeerMistake):
    """The receiver's proposal breaks a rule: it is not signed, and the Original pays instead."""


class NotNow(PayjoinError):
    """A service we need is not available; nothing was recorded: try again later."""

    exit_code = 4

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class KeyRotated(NotNow):
    """The directory no longer knows the OHTTP key of this session: its URI is dead, ask for or make a new one."""


class Expired(PayjoinError):
    """The session's time is over: nothing more is proposed, and the fallback payment is still good."""

    exit_code = 5


class CannotRead(PayjoinError):
    """Stored or received data is not understood by this version: nothing was changed, use the version that wrote it."""

    exit_code = 6
