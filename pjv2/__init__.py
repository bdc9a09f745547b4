"""pjv2: a Payjoin v2 (BIP77) client. The names an app needs, and no logic.

A name is imported when it is first used, so that `import pjv2` costs next to nothing. The pure layers `pjv2.wire`, `pjv2.psbt`
and `pjv2.session`, the seams `pjv2.ports`, and the fakes and contract suites of `pjv2.testing` are public modules of their own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pjv2.app import Channel, Payjoin
    from pjv2.config import Config
    from pjv2.driver import Driver
    from pjv2.errors import (
        BadCiphertext,
        BadOriginal,
        BadProposal,
        BadUri,
        CannotRead,
        Expired,
        IllegalEvent,
        KeyRotated,
        NotNow,
        OurMistake,
        PayjoinError,
        PeerMistake,
        ReplyCode,
        WrongUsage,
    )
    from pjv2.psbt.plan import ChannelOrder, ChannelPlan
    from pjv2.session.events import Outcome, Policy
    from pjv2.units import FeeRate, Network, Outpoint
    from pjv2.wire.uri import PjUri, format_uri, parse_uri

    __version__: str

__all__ = [
    "BadCiphertext",
    "BadOriginal",
    "BadProposal",
    "BadUri",
    "CannotRead",
    "Channel",
    "ChannelOrder",
    "ChannelPlan",
    "Config",
    "Driver",
    "Expired",
    "FeeRate",
    "IllegalEvent",
    "KeyRotated",
    "Network",
    "NotNow",
    "OurMistake",
    "Outcome",
    "Outpoint",
    "Payjoin",
    "PayjoinError",
    "PeerMistake",
    "PjUri",
    "Policy",
    "ReplyCode",
    "WrongUsage",
    "format_uri",
    "parse_uri",
]

_HOMES = {
    "pjv2.app": "Channel Payjoin",
    "pjv2.config": "Config",
    "pjv2.driver": "Driver",
    "pjv2.errors": "BadCiphertext BadOriginal BadProposal BadUri CannotRead Expired IllegalEvent KeyRotated NotNow OurMistake "
    "PayjoinError PeerMistake ReplyCode WrongUsage",
    "pjv2.psbt.plan": "ChannelOrder ChannelPlan",
    "pjv2.session.events": "Outcome Policy",
    "pjv2.units": "FeeRate Network Outpoint",
    "pjv2.wire.uri": "PjUri format_uri parse_uri",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


if not TYPE_CHECKING:  # a type checker shall go on refusing names that are not there

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("pjv2")
            except PackageNotFoundError:
                return "(not installed)"
        if name not in _HOME:
            raise AttributeError(f"module 'pjv2' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
