"""Mutants of the embedded wallet's file: what keeps several processes from giving out one address, or promising one coin, twice."""

from __future__ import annotations

from tests.mutants.model import Mutant

FILES = "pjv2/backends/files.py"
FILE = "pjv2/backends/wallet/bdk_file.py"
TURNS = "tests/unit/backends/wallet/test_bdk_turns.py::"


def _file(name: str, rule: str, old: str, new: str, *serves: str, by: str) -> Mutant:
    return Mutant(name, rule, FILE, old, new, (TURNS + by,), serves)


WALLET = (
    Mutant(
        "wallet-turns-at-once",
        "One process at a time has its turn at a wallet file.",
        FILES,
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        ("tests/unit/backends/test_files.py::test_two_objects_of_one_process_exclude_each_other",),
    ),
    _file(
        "wallet-not-read-again",
        "What another process stored is known before an address is given out.",
        "if self._seen is None or self._seen != self._written():",
        "if self._seen is None:",
        by="test_objects_of_one_process_take_turns_too",
    ),
    _file(
        "wallet-index-after-the-answer",
        "The index of an address is on disk before it is shown.",
        "        self._wallet.reveal_addresses_to(branch, index)\n        self._persist()\n",
        "        self._wallet.reveal_addresses_to(branch, index)\n",
        "money 6",
        by="test_objects_of_one_process_take_turns_too",
    ),
    _file(
        "wallet-leases-not-read-again",
        "A lease that another process took or gave back counts at once.",
        "            self._leases.refresh()\n            if self._seen",
        "            if self._seen",
        by="test_a_coin_is_never_leased_to_two_of_them",
    ),
    _file(
        "wallet-failed-turn-kept",
        "What could not be stored is not in memory either.",
        "            except BaseException:\n                self._seen = None\n                raise\n",
        "            except BaseException:\n                raise\n",
        by="test_what_a_turn_could_not_store_is_forgotten",
    ),
    _file(
        "wallet-older-answer-wins",
        "A server's answer that was overtaken takes no blocks of a newer one back.",
        "if overtaken and before not in map(_block, self._wallet.checkpoints()):",
        "if False:",
        by="test_an_answer_from_before_a_reorganisation_takes_nothing_back",
    ),
    _file(
        "wallet-scripts-believed",
        "An address that is given out is derived from the keys, and the file knows it.",
        "if known is None or (known.keychain, known.index) != (self._branches[branch], index):",
        "if False:",
        by="test_an_address_that_the_file_knows_otherwise_than_the_keys_is_not_given_out",
    ),
    _file(
        "wallet-broadcast-of-another-evicted",
        "A coin that any process of ours spent a moment ago is spent.",
        "        self._broadcasts.refresh()\n        kept = self._broadcasts.known()\n",
        "        kept = self._broadcasts.known()\n",
        by="test_a_broadcast_of_one_process_survives_the_syncs_of_another",
    ),
)
