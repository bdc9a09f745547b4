"""The query that travels with an Original PSBT: what the payer allows and offers (BIP78, "Optional parameters").

It refuses unknown versions and fee rates that are no finite number in 0..25000 sat/vB; every other oddity is ignored, as the BIP asks.

Law: substitution is disabled by exactly `true`, and a contribution exists only when both its parameters do. Limits are asked when
a query arrives, never again when a log is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from urllib.parse import unquote_to_bytes

from pjv2.errors import BadOriginal, ReplyCode, WrongUsage
from pjv2.units import FeeRate, Sats

SUPPORTED_VERSIONS = (1, 2)
_EVER_SUPPORTED = (1, 2)
"""Versions whose meaning a log may rest on: SUPPORTED_VERSIONS may lose one, this never does."""
DEFAULT_MIN_FEE_RATE = FeeRate(250)
MAX_MIN_FEE_RATE = FeeRate(25_000 * 250)
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?\Z", re.ASCII)
_INTEGER = re.compile(r"\+?\d{1,20}\Z", re.ASCII)
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Params:
    """What the payer allows and offers; `fee_output` indexes the outputs of his Original, amounts are in satoshis."""

    version: int = 2
    output_substitution: bool = True
    fee_output: int | None = None
    max_fee_contribution: Sats | None = None
    min_fee_rate: FeeRate = DEFAULT_MIN_FEE_RATE


def parse_params(query: str, *, default_version: int = 1, versions: tuple[int, ...] | None = None) -> Params:
    """Read a query such as `v=2&minfeerate=1.5`; without `v` it is of `default_version`.

    Raises BadOriginal: `.reply` is version-unsupported for a version not in `versions` (those that are supported), and
    original-psbt-rejected for a bad fee rate.
    """
    params = _read(query, default_version, SUPPORTED_VERSIONS if versions is None else versions)
    if params.min_fee_rate > MAX_MIN_FEE_RATE:
        raise BadOriginal("the payer's minfeerate is out of range")
    return params


def restore_params(query: str, *, default_version: int = 1) -> Params:
    """The query of an Original that was accepted once: today's limits are not asked again.

    Raises BadOriginal when it cannot be read, or is of a version that was never supported.
    """
    return _read(query, default_version, _EVER_SUPPORTED)


def _read(query: str, default_version: int, versions: tuple[int, ...]) -> Params:
    pairs = _pairs(query)
    fee_output = _integer(pairs.get("additionalfeeoutputindex"))
    contribution = _integer(pairs.get("maxadditionalfeecontribution"))
    if fee_output is None or contribution is None:
        fee_output = contribution = None
    return Params(
        version=_version(pairs.get("v"), default_version, versions),
        output_substitution=pairs.get("disableoutputsubstitution") != "true",
        fee_output=fee_output,
        max_fee_contribution=contribution,
        min_fee_rate=_fee_rate(pairs.get("minfeerate")),
    )


def format_params(params: Params) -> str:
    """The query of `params`, in the order deployed wallets use. A zero rate and a missing contribution are left out."""
    pairs = [f"v={params.version}"]
    if not params.output_substitution:
        pairs.append("disableoutputsubstitution=true")
    if params.fee_output is not None and params.max_fee_contribution is not None:
        pairs.append(f"additionalfeeoutputindex={params.fee_output}")
        pairs.append(f"maxadditionalfeecontribution={params.max_fee_contribution}")
    if params.min_fee_rate.sat_per_kwu:
        pairs.append(f"minfeerate={format_rate(params.min_fee_rate)}")
    return "&".join(pairs)


def format_rate(rate: FeeRate) -> str:
    """A fee rate in sat/vB, exact and as short as possible: `10`, `1.5`."""
    if rate > MAX_MIN_FEE_RATE:
        raise WrongUsage(f"a fee rate of {rate} is beyond what a payjoin can ask for (25000 sat/vB)")
    text = f"{Decimal(rate.sat_per_kwu) / 250:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _pairs(query: str) -> dict[str, str]:
    """Decoded pairs; those without `=` or undecodable are dropped, the last of a name counts."""
    pairs: dict[str, str] = {}
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        if not equals:
            continue
        try:
            pairs[_decoded(name)] = _decoded(value)
        except UnicodeError:
            continue
    return pairs


def _decoded(text: str) -> str:
    return unquote_to_bytes(text.replace("+", " ")).decode("utf-8")


def _integer(text: str | None) -> int | None:
    if text is None or not _INTEGER.match(text) or int(text) > _UINT64:
        return None
    return int(text)


def _version(text: str | None, default: int, versions: tuple[int, ...]) -> int:
    if text is None:
        return default
    number = _integer(text)
    if number not in versions:
        raise BadOriginal("the payer speaks a payjoin version that is not supported", ReplyCode.VERSION_UNSUPPORTED)
    return number


def _fee_rate(text: str | None) -> FeeRate:
    """minfeerate in sat/vB, rounded up to the next sat/kwu; finite, not negative (reference 1.1.0, #1845)."""
    if text is None:
        return DEFAULT_MIN_FEE_RATE
    if not _FLOAT.match(text):
        raise BadOriginal("the payer's minfeerate is not a number")
    number = Decimal(text)
    if number < 0 or number.adjusted() > 5:
        raise BadOriginal("the payer's minfeerate is out of range")
    if number.adjusted() < -12:
        return FeeRate(1 if number else 0)
    scaled = Fraction(number) * 250
    return FeeRate(-(-scaled.numerator // scaled.denominator))
