"""Amounts as people type them: satoshis (`100_000`), or bitcoin with the unit (`0.001btc`).

Law: an amount is exact, or it is refused.
"""

from __future__ import annotations

import re
from decimal import Decimal

from pjv2.errors import WrongUsage
from pjv2.units import MAX_MONEY, Sats

_SATS = re.compile(r"(\d[\d_]{0,20})\s*(?:sats?)?", re.ASCII | re.IGNORECASE)
_BTC = re.compile(r"(\d{1,8}(?:\.\d{1,8})?|\.\d{1,8})\s*btc", re.ASCII | re.IGNORECASE)


def parse_amount(text: str) -> Sats:
    """Read an amount in satoshis, or in bitcoin with the unit. Raises WrongUsage."""
    told = text.strip()
    if match := _SATS.fullmatch(told):
        amount = int(match[1].replace("_", ""))
    elif match := _BTC.fullmatch(told):
        amount = int(Decimal(match[1]) * 100_000_000)
    else:
        raise WrongUsage(f"{text!r} is not an amount: write satoshis like 100_000, or bitcoin like 0.001btc")
    if not 0 < amount <= MAX_MONEY:
        raise WrongUsage(f"{text!r} is not an amount that can be paid: at least 1 sat, at most {MAX_MONEY:_}")
    return amount
