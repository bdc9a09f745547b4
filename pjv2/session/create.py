"""The first event of a session, and the URI that it makes.

It refuses a lifetime that the reply mailbox would not outlive, and a URI without a payjoin endpoint: those are ordinary payments.

Law: a receiver key serves one session only; everything random is drawn here and written down.
"""

from __future__ import annotations

from dataclasses import dataclass

from pjv2.errors import WrongUsage
from pjv2.psbt.params import format_params
from pjv2.psbt.plan import ChannelPlan
from pjv2.psbt.tx import Psbt
from pjv2.psbt.verify import SentOriginal
from pjv2.session.events import ColdAddress, Policy, ReceiverCreated, SenderCreated
from pjv2.session.receive.life import Receiver
from pjv2.units import Entropy, Instant, Network, Sats, SessionId
from pjv2.wire.mailbox import short_id
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey
from pjv2.wire.uri import PjUri, V1Endpoint, V2Endpoint, format_uri

MAX_LIFETIME = 6 * 86_400
"""Seconds: proposing never outlives the reply mailbox, which a directory keeps for 7 days."""
BIP78_PATIENCE = 120
"""Seconds that a payee's own server has to answer; then the Original pays. BIP78 sessions have no expiry of their own."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an Original goes: a mailbox, or the payee's own server."""

    directory: str
    keys: bytes
    receiver: bytes
    short_id: str
    expires: int
    endpoint: str | None = None


def new_session_id(rng: Entropy) -> SessionId:
    """32 lower-case hex characters."""
    return rng.token(16).hex()


def create_receiver(
    now: Instant,
    rng: Entropy,
    *,
    session: SessionId | None = None,
    network: Network,
    genesis: str,
    wallet: str,
    node: str | None,
    address: str,
    script: bytes,
    address_index: int,
    amount: Sats | None,
    directory: str,
    keys: KeyConfig,
    expires: int,
    height: int,
    plan: ChannelPlan | None = None,
    policy: Policy | None = None,
    label: str | None = None,
    note: str | None = None,
    order: str | None = None,
    cold: ColdAddress | None = None,
) -> ReceiverCreated:
    """`Created` of a receiver, with a fresh receiver key. `expires` is in whole Unix seconds, at most 6 days ahead.

    Raises WrongUsage for a lifetime out of range, for channels without a Lightning node or beside a cold address, and for a cold
    address that is the request's own.
    """
    if not now < expires <= now + MAX_LIFETIME:
        raise WrongUsage("a payment request lives between a moment and 518400 seconds (6 days)")
    if plan is not None and node is None:
        raise WrongUsage("the request plans channels, and no Lightning node is configured")
    if plan is not None and cold is not None:
        raise WrongUsage("channels take the payment into the node: they are not planned beside a cold address")
    if cold is not None and cold.script == script:
        raise WrongUsage(
            "the cold address is the request's own: the cold descriptor is the wallet's, give it another one"
        )
    if amount is not None and amount <= 0:
        raise WrongUsage("a request is for at least one satoshi, or for any amount")
    return ReceiverCreated(
        now,
        session=session or new_session_id(rng),
        network=network,
        genesis=genesis,
        wallet=wallet,
        node=node,
        address=address,
        script=script,
        address_index=address_index,
        amount=amount,
        directory=directory,
        keys=keys.encode(),
        receiver_key=SecretKey.generate(rng).reveal(),
        expires=expires,
        height=height,
        plan=plan,
        policy=policy or Policy(),
        label=label,
        note=note,
        order=order,
        cold=cold,
    )


def payment_uri(state: Receiver) -> str:
    """What the payer is shown (BIP77, "Payjoin URI"). A v2 receiver writes `pjos=0`, against payers that only know BIP78."""
    created = state.created
    key = SecretKey(created.receiver_key).public
    endpoint = V2Endpoint(
        directory=created.directory,
        short_id=short_id(key),
        expires=created.expires,
        keys=KeyConfig.parse(created.keys),
        receiver=key,
    )
    return format_uri(
        PjUri(
            address=created.address,
            amount=created.amount,
            label=created.label,
            endpoint=endpoint,
            output_substitution=False,
        )
    )


def create_sender(
    now: Instant,
    rng: Entropy,
    *,
    session: SessionId | None = None,
    network: Network,
    genesis: str,
    wallet: str,
    uri: PjUri,
    sent: SentOriginal,
    amount: Sats,
    lock_id: bytes,
    height: int,
    policy: Policy | None = None,
    label: str | None = None,
) -> SenderCreated:
    """`Created` of a sender, with a fresh reply key; its coins are leased with it.

    `sent` is the Original as `psbt.verify.make_sent_original` checked it, of version 1 where the payee has a server of his own: that
    one is asked for `BIP78_PATIENCE` seconds. Raises WrongUsage when the URI has no payjoin endpoint, or expired.
    """
    match uri.endpoint:
        case V2Endpoint(directory, mailbox, expires, keys, receiver):
            if expires <= now:
                raise WrongUsage("this payment URI has expired: ask the payee for another one")
            place = _Place(directory, keys.encode(), receiver.compressed, mailbox, expires)
        case V1Endpoint(url):
            place = _Place("", b"", b"", "", int(now) + BIP78_PATIENCE, url)
        case _:
            raise WrongUsage("this payment URI offers no payjoin: pay it as an ordinary payment")
    if (sent.params.version == 1) is not (place.endpoint is not None):
        raise WrongUsage("the Original was made for the other version of the protocol")
    return SenderCreated(
        now,
        session=session or new_session_id(rng),
        network=network,
        genesis=genesis,
        wallet=wallet,
        uri=format_uri(uri),
        address=uri.address,
        script=sent.payee_script,
        amount=amount,
        directory=place.directory,
        keys=place.keys,
        receiver=place.receiver,
        short_id=place.short_id,
        reply_key=SecretKey.generate(rng).reveal(),
        expires=place.expires,
        original=sent.psbt,
        query=format_params(sent.params),
        inputs=tuple(txin.outpoint for txin in sent.tx.inputs),
        txid=sent.tx.txid,
        fee=Psbt.parse(sent.psbt).fee,
        lock_id=lock_id,
        height=height,
        policy=policy or Policy(),
        label=label,
        endpoint=place.endpoint,
    )
