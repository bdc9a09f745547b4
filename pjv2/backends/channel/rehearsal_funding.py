"""How a rehearsal channel comes to be: an offer, a funding script, two signatures; our node's side of each step.

It refuses what LND refuses, in LND's words: an id that is taken, sizes outside the limits, a PSBT that is not what it was said to be.
A refusal of the peer and a failure of the node stay in the record until whoever called has heard them.

Law: a channel enters the database only in `signed`, after the peer's signature for exactly its outpoint was verified.
"""

from __future__ import annotations

from pjv2.backends.channel.rehearsal_commitment import ChannelTerms, home_script, is_public_key, public
from pjv2.backends.channel.rehearsal_memory import (
    Document,
    Record,
    anchor_reserve,
    by_id,
    failure,
    funding_key,
    public_count,
    secured,
    terms_of,
)
from pjv2.backends.channel.rehearsal_peer import MAX_CHANNEL, MIN_CHANNEL, Message
from pjv2.errors import NotNow, PayjoinError, PeerMistake, WrongUsage
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.proposal import Funding
from pjv2.psbt.tx import Psbt, PsbtInput, ScriptKind, TxOut, kind_of
from pjv2.session.facts import SecuredChannel
from pjv2.units import Outpoint

MAX_MEMO = 500
RESERVE_ERROR = (
    "reserved wallet balance invalidated: transaction would leave insufficient funds for fee bumping anchor channel "
    "closings (see debug log for details)"
)

# ---------------------------------------------------------------- the offer


def record_of(node: str, id: bytes, order: ChannelOrder, memo: str) -> Record:
    if len(id) != 32 or not any(id):
        raise WrongUsage("pending chan ID not set: it is 32 random bytes")
    if len(memo.encode()) > MAX_MEMO:
        raise WrongUsage(f"the memo is of length {len(memo.encode())}, exceeds {MAX_MEMO}")
    if order.capacity is None:
        raise WrongUsage("the capacity of a channel must be settled before it is reserved")
    if not is_public_key(order.peer):
        raise WrongUsage(f"invalid public key: {order.peer}")
    if order.peer == node:
        raise WrongUsage("cannot open channel to self")
    if order.kind is not None and order.kind.lower() != "anchors":
        raise WrongUsage(f"the rehearsal node opens channels of the type anchors only, not {order.kind}")
    return {
        "peer": order.peer,
        "capacity": order.capacity,
        "push": order.push,
        "private": order.private,
        "memo": memo,
        "key": -1,
        "stage": "opening",
        "cancelled": False,
        "peer_key": "",
        "peer_script": "",
        "outpoint": "",
        "error": "",
        "peer_refused": False,
    }


def begin_reserve(document: Document, id: str, wanted: Record) -> tuple[PayjoinError | None, int]:
    """Send the request, or find the one that is under way: why not, or the number of its key."""
    present = document["records"].get(id)
    if by_id(document, id) is not None or (present is not None and present["stage"] == "verifying"):
        return WrongUsage("this id already names a pending channel"), -1
    if present is not None and present["stage"] != "failed":
        same = all(present[name] == wanted[name] for name in ("peer", "capacity", "push", "private", "memo"))
        if not same:
            return WrongUsage("this id already names another reservation"), -1
        return None, present["key"]
    if (refusal := _unfit(document, wanted)) is not None:
        return refusal, -1
    wanted["key"] = document["next_key"]
    document["next_key"] += 1
    document["records"][id] = wanted
    document["queue"].append(
        {
            "type": "open",
            "to": wanted["peer"],
            "id": id,
            "node_key": public(funding_key(document, wanted["key"])).hex(),
            "node_script": home_script(bytes.fromhex(document["seed"])).hex(),
            "capacity": wanted["capacity"],
            "push": wanted["push"],
        }
    )
    return None, wanted["key"]


def _unfit(document: Document, wanted: Record) -> PayjoinError | None:
    capacity, push = wanted["capacity"], wanted["push"]
    balance = ChannelTerms(b"", b"", b"", b"", capacity, push).opener_balance
    reasons = [
        (bool(document["why_not"]), document["why_not"]),
        (wanted["peer"] not in document["links"], f"peer {wanted['peer']} is not online"),
        (capacity < MIN_CHANNEL, f"channel is too small, the minimum channel size is: {MIN_CHANNEL} SAT"),
        (
            capacity > MAX_CHANNEL,
            f"funding amount is too large, the max channel size is: 0.{MAX_CHANNEL:08d} BTC",
        ),
        (
            not 0 <= push < capacity,
            "amount pushed to remote peer for initial state must be below the local funding amount",
        ),
        (balance < 0, "the amount pushed leaves too little of the capacity for the commitment fee"),
    ]
    # NotNow, not WrongUsage: capacities follow from the payment, and a payment degrades instead of failing.
    return next((NotNow(words) for unfit, words in reasons if unfit), None)


def accepted(document: Document, record: Record, answer: Message) -> None:
    record["peer_key"], record["peer_script"] = answer["peer_key"], answer["peer_script"]
    record["stage"] = "reserved"
    if record["cancelled"] or answer["error"]:
        record["stage"] = "failed"
        record["error"] = "user canceled funding" if record["cancelled"] else answer["error"]
        document["queue"].append({"type": "cancel", "to": record["peer"], "id": answer["id"]})
    elif not is_public_key(answer["peer_key"]):
        record["stage"], record["peer_refused"] = "failed", True
        record["error"] = "the peer's funding key is not a point of the curve"


# ---------------------------------------------------------------- the signatures


def begin_secure(
    document: Document, id: bytes, outpoint: Outpoint, funding: Funding, offered: Psbt
) -> SecuredChannel | PayjoinError | int:
    """Send our signature, or find what is under way: the channel, why not, or the number of its key."""
    channel, record = by_id(document, id.hex()), document["records"].get(id.hex())
    begun = channel if channel is not None else record
    if begun is not None and begun["outpoint"] not in ("", str(outpoint)):
        return WrongUsage(f"this channel is being secured for {begun['outpoint']}, not for {outpoint}")
    if channel is not None:
        return secured(document, channel)
    if record is None or record["stage"] == "opening":
        return NotNow(f"no funding intent found for pendingChannelID({id.hex()})")
    if record["stage"] == "reserved":
        return _send_created(document, id, record, outpoint, funding, offered)
    return record["key"] if record["stage"] == "verifying" else failure(record)


def _send_created(
    document: Document, id: bytes, record: Record, outpoint: Outpoint, funding: Funding, offered: Psbt
) -> PayjoinError | int:
    terms = terms_of(document, record)
    try:
        outputs = _verify_psbt(offered, outpoint, funding, terms)
    except WrongUsage as refusal:
        return refusal
    if not record["private"]:
        ours = sum(output.value for output in outputs if output.script == home_script(bytes.fromhex(document["seed"])))
        if document["wallet"] + ours < anchor_reserve(public_count(document) + 1):
            record["error"] = RESERVE_ERROR
    record["stage"], record["outpoint"] = "verifying", str(outpoint)
    signature = terms.sign(outpoint, funding_key(document, record["key"]))
    document["queue"].append(
        {
            "type": "created",
            "to": record["peer"],
            "id": id.hex(),
            "outpoint": str(outpoint),
            "signature": signature.hex(),
        }
    )
    return record["key"]


def signed(document: Document, record: Record, answer: Message) -> None:
    terms, outpoint = terms_of(document, record), Outpoint.parse(record["outpoint"])
    try:
        terms.verify(outpoint, terms.peer_key, bytes.fromhex(answer["signature"]))
    except PeerMistake as mistake:
        record["stage"], record["peer_refused"], record["error"] = "failed", True, str(mistake)
        return
    document["channels"].append(
        {
            "id": answer["id"],
            "peer": record["peer"],
            "host": document["links"][record["peer"]]["host"],
            "capacity": record["capacity"],
            "push": record["push"],
            "private": record["private"],
            "memo": record["memo"],
            "key": record["key"],
            "peer_key": record["peer_key"],
            "peer_script": record["peer_script"],
            "outpoint": record["outpoint"],
            "signature": answer["signature"],
            "state": "pending",
        }
    )
    record["error"] = record["error"] or answer["error"]
    if record["error"]:
        record["stage"] = "failed"
    else:
        del document["records"][answer["id"]]


def _verify_psbt(parsed: Psbt, outpoint: Outpoint, funding: Funding, terms: ChannelTerms) -> tuple[TxOut, ...]:
    """What LND's verify looks at, in its words, and that the transaction is the one we were told; answers its outputs."""
    tx = parsed.tx
    total = 0
    for index, (spent, given) in enumerate(zip(tx.inputs, parsed.inputs, strict=True)):
        prevout = _utxo(spent.outpoint, given)
        if prevout is None:
            raise WrongUsage(
                f"error verifying PSBT: error determining input sum: input {index} has no UTXO information"
            )
        total += prevout.value
        # As LND does, a witness_utxo is believed: whether the real output is native segwit is not checked here.
        programs = (given.redeem_script or b"", prevout.script)
        if given.witness_utxo is None and not any(_is_witness_program(script) for script in programs):
            raise WrongUsage(
                "error verifying PSBT: not all inputs are SegWit spends, risk of malleability: "
                f"input {index} is non-SegWit spend or missing redeem script"
            )
    if sum(output.value for output in tx.outputs) >= total:
        raise WrongUsage("error verifying PSBT: input amount sum must be larger than output amount sum")
    matching = [vout for vout, output in enumerate(tx.outputs) if output.script == terms.script]
    if not matching or tx.outputs[matching[0]].value != terms.capacity:
        raise WrongUsage("error verifying PSBT: funding output not found in PSBT")
    if (funding.vout, funding.value, funding.script) != (matching[0], terms.capacity, terms.script):
        raise WrongUsage(f"the channel is funded by output {matching[0]}, which is not the output that was announced")
    if tx.txid != outpoint.txid:
        raise WrongUsage(f"the PSBT is transaction {tx.txid}, not {outpoint.txid}")
    return tx.outputs


def _utxo(outpoint: Outpoint, given: PsbtInput) -> TxOut | None:
    if given.witness_utxo is not None:
        return given.witness_utxo
    previous = given.non_witness_utxo
    if previous is None or previous.txid != outpoint.txid or outpoint.vout >= len(previous.outputs):
        return None
    return previous.outputs[outpoint.vout]


def _is_witness_program(script: bytes) -> bool:
    return kind_of(script) in (ScriptKind.P2WPKH, ScriptKind.P2WSH, ScriptKind.P2TR)
