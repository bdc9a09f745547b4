"""A payee of the first version: a server of his own behind TLS that answers an Original with a proposal (BIP78).

The rules are pjv2's own receiver rules, the wallet and the chain those of a party of the lab; only the server is made here.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from pathlib import Path

import trustme

from pjv2.errors import BadOriginal, ReplyCode
from pjv2.lab.httpd import HttpRequest, HttpResponse, HttpServer
from pjv2.lab.world import Party
from pjv2.psbt.original import OriginalFacts, ReceiverTerms, check_original, parse_original
from pjv2.psbt.plan import ReceiverScripts, make_intent
from pjv2.psbt.proposal import draft_proposal, finish_proposal, reply_payload_error
from pjv2.units import FeeRate, Sats


def certificate(path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for loopback, and the authority to trust for it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(path))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context, path


class Merchant(HttpServer):
    """`uri` pays `amount` to `address`; `asked` holds what payers sent, `refuse` answers them with an error instead."""

    def __init__(self, party: Party, amount: Sats, tls: ssl.SSLContext, *, substitution: bool = True) -> None:
        super().__init__(ssl_context=tls)
        self.party = party
        self.amount = amount
        self.substitution = substitution
        self.refuse: ReplyCode | None = None
        self.lose = 0
        """How many answers are cut off after the work was done."""
        self.asked: list[HttpRequest] = []

    async def open(self) -> str:
        await self.start()
        self.address = await self.party.wallet.new_address()
        btc = f"{self.amount / 100_000_000:.8f}"
        forbidden = "" if self.substitution else "&pjos=0"
        return f"bitcoin:{self.address.address}?amount={btc}{forbidden}&pj=https://127.0.0.1:{self.port}/pay?id=7"

    async def respond(self, request: HttpRequest) -> HttpResponse:
        self.asked.append(request)
        if self.refuse is not None:
            return HttpResponse(400, reply_payload_error(self.refuse), (("Content-Type", "application/json"),))
        query = request.target.partition("?")[2].partition("&")[2]
        try:
            answer = await self._propose(request.body, query)
        except BadOriginal as exc:
            code = exc.reply or ReplyCode.ORIGINAL_PSBT_REJECTED
            return HttpResponse(400, reply_payload_error(code), (("Content-Type", "application/json"),))
        if self.lose:
            self.lose -= 1
            self.cut_after = 1
        return HttpResponse(200, base64.b64encode(answer), (("Content-Type", "text/plain"),))

    async def _propose(self, body: bytes, query: str) -> bytes:
        payload = parse_original(body + b"\n" + query.encode(), v1=True)
        tx = payload.psbt.extract()
        inputs = [txin.outpoint for txin in tx.inputs]
        chain, wallet = self.party.driver.chain, self.party.wallet
        verdict, prevouts, owned, tip = await asyncio.gather(
            chain.test(tx.raw), chain.prevouts(inputs), wallet.mine(inputs), chain.tip()
        )
        terms = ReceiverTerms(
            script=self.address.script,
            amount=self.amount,
            min_fee_rate=FeeRate(250),
            max_fee_rate=FeeRate(12_500),
            max_fee_share_ppm=50_000,
            min_amount=10_000,
        )
        facts = OriginalFacts(tip.height, verdict, prevouts, owned, FeeRate(250), tip.median_time)
        checked = check_original(payload, facts, terms)
        coin = (await wallet.coins())[0]
        change = await wallet.new_address(change=True)
        intent = make_intent(checked, None, [coin], ReceiverScripts(change.script))
        drafted = draft_proposal(checked, intent, (), self.party.driver.entropy)
        signed = await wallet.sign(drafted.psbt.serialize(), drafted.ours)
        return finish_proposal(drafted, signed).psbt
