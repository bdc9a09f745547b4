"""Chain sources: a Bitcoin Core node, and servers that are no node of ours (Esplora's HTTP API, the Electrum protocol).

- `bitcoind`       `BitcoindChain`: the node's own verdicts and coins.
- `bitcoind_scan`  its blocks and mempool, read for what it has no index of.
- `esplora`        `EsploraChain`.
- `electrum`       `ElectrumChain`.
- `remote`         what the latter two do alike: views, previous outputs, broadcasts, and what a server is not believed about.
- `suitability`    would the network take a transaction, judged without a node.

How money could be lost here, and what prevents it: a server that makes up amounts (every transaction is hashed); a transaction that
is called broadcastable and is not (only known shapes of spends get a yes); a payment called refused that is under way (the server is
looked at again before a refusal counts).
"""

from pjv2.backends.chain.electrum import ElectrumChain
from pjv2.backends.chain.esplora import EsploraChain
from pjv2.backends.chain.suitability import Outlook, ScriptVerifier, judge

__all__ = ["ElectrumChain", "EsploraChain", "Outlook", "ScriptVerifier", "judge"]
