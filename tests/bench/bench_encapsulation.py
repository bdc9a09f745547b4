"""What does it cost to make one envelope, and is anything wasted? Run: python tests/bench/bench_encapsulation.py [--json]

The unit of account is one x-only ECDH, the dearest step that cannot be avoided, measured in the same run: machines differ, the ratio
does not much. The bar: a fresh key, the HPKE setup and sealing 8104 bytes cost no more than 2.8 ECDH.
"""

from __future__ import annotations

import json
import secrets
import statistics
import sys
import time
from collections.abc import Callable

from pjv2.wire import bhttp, hpke, mailbox, message, ohttp, secp

BAR = 2.8
ROUNDS = 400
WARM_UP = 20


class SystemEntropy:
    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)

    def below(self, limit: int) -> int:
        return secrets.randbelow(limit)


def parts() -> dict[str, Callable[[], object]]:
    """Each part of a poll and of a message, by name."""
    rng = SystemEntropy()
    gateway = ohttp.Gateway(secp.SecretKey.generate(rng))
    keys = ohttp.KeyConfig.parse(gateway.keys.encode())
    receiver, reply = secp.SecretKey.generate(rng), secp.SecretKey.generate(rng)
    request = rng.token(ohttp.PADDED_BHTTP_REQUEST_BYTES)
    envelope, opener = ohttp.encapsulate(keys, request, rng)
    _, sealer = gateway.open(envelope)
    answer = sealer.seal(bhttp.encode_response(202, b"", ohttp.PADDED_BHTTP_RESPONSE_BYTES), rng)
    poll = mailbox.MailboxRequest("GET", mailbox.short_id(receiver.public))
    message_a = message.seal_message_a(receiver.public, reply.public, b"x" * 700, rng)
    ellswift = message_a[: secp.ELLSWIFT_BYTES]
    context = hpke.setup_s(keys.public, b"bench", rng)
    return {
        "ecdh_x": lambda: secp.ecdh_x(receiver, keys.public),
        "encapsulate": lambda: ohttp.encapsulate(keys, request, rng),
        "key_create_serialise": lambda: secp.SecretKey.generate(rng).public.uncompressed,
        "hpke_setup_s": lambda: hpke.setup_s(keys.public, b"bench", rng),
        "aead_seal_8104": lambda: context.seal(request),
        "padding_8104": lambda: rng.token(ohttp.PADDED_BHTTP_REQUEST_BYTES),
        "mailbox_request": lambda: mailbox.encapsulate_request("https://payjo.in", keys, poll, rng),
        "response_open": lambda: opener.open(answer),
        "ellswift_encode": lambda: secp.ellswift_encode(keys.public, rng),
        "ellswift_decode": lambda: secp.ellswift_decode(ellswift),
        "message_a_seal": lambda: message.seal_message_a(receiver.public, reply.public, b"x" * 700, rng),
        "message_a_open": lambda: message.open_message_a(receiver, message_a),
        "message_b_seal": lambda: message.seal_message_b(reply.public, receiver, b"x" * 700, rng),
    }


def measure(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of each in microseconds. They take turns, so that a slow moment hits all of them."""
    samples: dict[str, list[int]] = {name: [] for name in functions}
    clock = time.perf_counter_ns
    for turn in range(WARM_UP + rounds):
        for name, function in functions.items():
            began = clock()
            function()
            ended = clock()
            if turn >= WARM_UP:
                samples[name].append(ended - began)
    return {name: statistics.median(taken) / 1000 for name, taken in samples.items()}


def main() -> int:
    """Print every figure; 0 when the bar holds."""
    functions = parts()
    compared = {name: functions.pop(name) for name in ("ecdh_x", "encapsulate")}
    medians = measure(compared, 4 * ROUNDS) | measure(functions)
    ratio = medians["encapsulate"] / medians["ecdh_x"]
    lines: list[tuple[str, float, str, float | None, bool]] = [
        (name, round(value, 1), "us", None, True) for name, value in medians.items()
    ]
    lines.append(("encapsulate_per_ecdh", round(ratio, 3), "ratio", BAR, ratio <= BAR))
    for name, value, unit, bar, ok in lines:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"event": "Bench", "name": name, "value": value, "unit": unit, "bar": bar, "ok": ok}))
        else:
            print(name, value, unit, "-" if bar is None else bar, "ok" if ok else "short", sep="\t")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
