"""The mailroom: relays, the keys that they bring, and directories that keep what is left there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pjv2.backends.mailroom import HttpMailroom, Service, Source
from pjv2.doctor.installation import Check, Installation, failure
from pjv2.errors import NotNow, PayjoinError
from pjv2.ports import Entropy, Mailroom
from pjv2.wire.mailbox import MailboxRequest, short_id
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey

MESSAGE_BYTES = 7168


async def check_relays(it: Installation) -> Sequence[Check]:
    """Every relay carries to every directory that another operator runs, and there are two operators."""
    mailroom = await it.mailroom()
    if not isinstance(mailroom, HttpMailroom):
        return [Check("relays", "ok", "the program brought a mailroom of its own")]
    if not mailroom.directories:
        why = "no directory is configured: requests cannot be made"
        return [Check("relays", "failed", why, "Set [payjoin] directories.", usage=True)]
    return [await _relays_for(mailroom, directory) for directory in mailroom.directories]


async def _relays_for(mailroom: HttpMailroom, directory: Service) -> Check:
    pairs = mailroom.relays_for(directory.url)
    names = {relay.operator or relay.domain for relay in pairs}
    if not pairs:
        return Check(
            "relays",
            "failed",
            f"no relay is certainly run by another operator than {directory.url}",
            "Add a relay of somebody else, or write the operators of both into [payjoin].",
            usage=True,
        )
    tried = f"{len(pairs)} relays of {len(names)} operators" if len(pairs) > 1 else "one relay"
    if directory.url.startswith("https://"):
        results = await mailroom.check_relays(directory.url)
        broken = [f"{result.relay.url} ({result.said})" for result in results if not result.works]
        if len(broken) == len(results):
            why = f"no relay carries to {directory.url}: {'; '.join(broken)}"
            return Check("relays", "failed", why, "Check the network and [payjoin] relays; try again.")
        if broken:
            why = f"some relays do not carry to {directory.url}: {'; '.join(broken)}"
            return Check("relays", "warning", why, "Payments work through the others; replace it if it stays.")
        tried += f", all carry to {directory.url}"
    if len(names) < 2:
        why = f"{tried}, of one operator: it carries both polls and proposals, and nobody checks the keys it brings"
        return Check("relays", "warning", why, "Add a relay of another operator to [payjoin] relays.")
    return Check("relays", "ok", tried)


async def check_keys(it: Installation) -> Sequence[Check]:
    """The OHTTP keys of each directory, as two relays of different operators tell them."""
    mailroom = await it.mailroom()
    if not isinstance(mailroom, HttpMailroom):
        url, _ = await mailroom.directory()
        return [Check("keys", "ok", f"the mailroom has the keys of {url}")]

    async def check(directory: Service) -> Check:
        try:
            standing = await mailroom.check_keys(directory.url)
        except PayjoinError as exc:
            return failure("keys", exc)
        if standing.warning:
            return Check("keys", "warning", standing.warning, "Add a relay of another operator to [payjoin] relays.")
        age = max(it.clock.now() - standing.fetched, 0.0)
        how = {
            Source.TWO_RELAYS: "two relays of different operators brought the same keys",
            Source.ONE_RELAY: "one relay brought the keys",
            Source.LOOPBACK: "asked directly, as the directory is on this machine",
            Source.FILE: "read from ohttp_keys_file",
        }[standing.source]
        return Check("keys", "ok", f"{directory.url}: {how}, {age / 60:.0f} min ago")

    return await asyncio.gather(*(check(directory) for directory in mailroom.directories))


async def check_directory(it: Installation) -> Sequence[Check]:
    """Each directory keeps a message and gives it back: random bytes, in a mailbox that nobody else knows."""
    mailroom = await it.mailroom()
    if not isinstance(mailroom, HttpMailroom):
        return [await _round_trip(it, mailroom, *(await mailroom.directory()))]

    async def check(directory: Service) -> Check:
        try:
            return await _round_trip(it, mailroom, directory.url, (await mailroom.check_keys(directory.url)).keys)
        except PayjoinError as exc:
            return failure("directory", exc)

    return await asyncio.gather(*(check(directory) for directory in mailroom.directories))


async def _round_trip(it: Installation, mailroom: Mailroom, url: str, keys: KeyConfig) -> Check:
    relays = await round_trip(mailroom, url, keys, it.rng)
    ways = "two relays" if len(relays) > 1 else "one relay"
    return Check("directory", "ok", f"{url} kept a message and gave it back, through {ways}")


async def round_trip(mailroom: Mailroom, directory: str, keys: KeyConfig, rng: Entropy) -> frozenset[str]:
    """Leave random bytes in a mailbox that nobody else knows, and read them back; answers the relays that carried them. NotNow."""
    # Random bytes are what a message looks like: nobody can tell this mailbox from one of a payment.
    message, session = rng.token(MESSAGE_BYTES), rng.token(16).hex()
    mailbox = short_id(SecretKey.generate(rng).public)
    posted = await mailroom.exchange(directory, keys, MailboxRequest("POST", mailbox, message), session=session)
    look = MailboxRequest("GET", mailbox)
    read = await mailroom.exchange(directory, keys, look, session=session, avoid=posted.relay)
    if posted.reply.status != 200 or read.reply.status != 200 or read.reply.body != message:
        answers = f"it answered {posted.reply.status} and {read.reply.status}"
        raise NotNow(f"{directory} did not give back what was left there ({answers})")
    return frozenset((posted.relay, read.relay))
