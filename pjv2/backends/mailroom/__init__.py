"""The mailroom over HTTP: directories behind oblivious relays (BIP77, RFC 9458).

It refuses to let one operator see both ends: a relay and a directory of the same operator, or of operators that cannot be told
apart, are never paired; keys are never fetched from our own address, except from this machine.

- `mailroom`        `HttpMailroom`, the port: which relay, whose fault, what next.
- `keys`            the directories' OHTTP keys: two relays must agree.
- `operators`       who runs what.
- `health`          timed back-offs that heal.
- `carrier`         one POST over pyreqwest or httpx.
- `tunnel`          CONNECT with TLS inside, SOCKS5.
- `directory_list`  the packaged lists in `relay_config/`.

Law: foreign exceptions end here, and neither an exception nor a log line holds a mailbox id or a payment URI.
"""

from pjv2.backends.mailroom.directory_list import Provenance, ServiceList, load_services
from pjv2.backends.mailroom.keys import KeyCache, KeyStanding, Source
from pjv2.backends.mailroom.mailroom import HttpMailroom, RelayCheck, ServiceLike, service_from
from pjv2.backends.mailroom.operators import Operators, Service

__all__ = [
    "HttpMailroom",
    "KeyCache",
    "KeyStanding",
    "Operators",
    "Provenance",
    "RelayCheck",
    "Service",
    "ServiceLike",
    "ServiceList",
    "Source",
    "load_services",
    "service_from",
]
