"""Every mutant there is."""

from __future__ import annotations

from tests.mutants.bitcoind import BITCOIND
from tests.mutants.checklists import RECEIVER, SENDER
from tests.mutants.model import Mutant
from tests.mutants.planning import PLANNING
from tests.mutants.sessions import MODEL, MONEY
from tests.mutants.wallet import WALLET

CATALOGUE: tuple[Mutant, ...] = (*MONEY, *MODEL, *RECEIVER, *SENDER, *PLANNING, *WALLET, *BITCOIND)

SAMPLE = (
    "secure-before-post",
    "post-after-release",
    "seen-inputs-not-refused",
    "proposal-own-output-decreased",
    "fee-cap-share",
    "finish-foreign-input-signed",
)
"""The six that every run of the suite tries, with the node that must catch each."""
