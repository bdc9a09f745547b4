"""Mutants of the Core node's wallet and chain: what keeps a coin from being promised twice, and a node from being believed too far."""

from __future__ import annotations

from tests.mutants.model import Mutant

RPC = "pjv2/backends/bitcoind_rpc.py"
PURSE = "pjv2/backends/wallet/bitcoind.py"
CHAIN = "pjv2/backends/chain/bitcoind.py"
SCAN = "pjv2/backends/chain/bitcoind_scan.py"
TESTS = "tests/unit/backends/"


def _wallet(name: str, rule: str, old: str, new: str, *serves: str, by: str) -> Mutant:
    return Mutant(name, rule, PURSE, old, new, (f"{TESTS}wallet/test_bitcoind_wallet.py::{by}",), serves)


def _chain(name: str, rule: str, old: str, new: str, *, by: str) -> Mutant:
    return Mutant(name, rule, CHAIN, old, new, (f"{TESTS}chain/test_bitcoind_chain.py::{by}",))


def _scan(name: str, rule: str, old: str, new: str, *, by: str) -> Mutant:
    return Mutant(name, rule, SCAN, old, new, (f"{TESTS}chain/test_bitcoind_scan.py::{by}",))


BITCOIND = (
    Mutant(
        "node-of-another-network",
        "A node of another network is not asked for anything.",
        RPC,
        "if genesis != self.network.genesis_hash:",
        "if False:",
        (f"{TESTS}test_bitcoind_rpc.py::test_a_node_of_another_network_is_refused",),
    ),
    Mutant(
        "node-answers-by-place",
        "An answer belongs to the question whose number it carries.",
        RPC,
        "return [answers[number] for number in range(count)]",
        "return list(answers.values())",
        (f"{TESTS}test_bitcoind_rpc.py::test_answers_are_told_apart_by_their_numbers_whatever_their_order",),
    ),
    _wallet(
        "node-lease-after-the-lock",
        "A lease is on disk before the node locks the coin.",
        "        leases.add(coins, lock_id, until)\n",
        "",
        by="test_a_lease_is_on_disk_before_the_node_is_asked_to_lock",
    ),
    _wallet(
        "node-hand-locks-taken",
        "A coin that a person locked by hand is not leased.",
        "        taken = locked | leases.held()\n",
        "        taken = leases.held()\n",
        by="test_a_coin_that_somebody_else_locked_is_neither_taken_nor_opened",
    ),
    _wallet(
        "node-unlocks-others",
        "A lock is opened under the id that made it only.",
        "await self._let_go(leases, frozenset(coin for coin in coins if leases.owner(coin) == lock_id))",
        "await self._let_go(leases, frozenset(coins))",
        by="test_a_lock_under_another_id_is_not_opened",
    ),
    _wallet(
        "node-leases-never-end",
        "A lease of a session that died ends by itself.",
        "await self._let_go(leases, leases.expired(self._now()))",
        "leases.expired(self._now())",
        by="test_a_lock_whose_answer_was_lost_is_repeated_or_ends_by_itself",
    ),
    _wallet(
        "node-spent-coin-locked",
        "A coin that is spent meanwhile is not locked, and not signed away.",
        "or there is None or (coin",
        "or (coin",
        by="test_a_coin_that_was_spent_between_choice_and_lock_is_not_signed_away",
    ),
    _wallet(
        "node-change-of-a-thief",
        "An output that is no payment goes to the wallet itself.",
        "            or extra != ours\n",
        "",
        by="test_a_payment_that_is_not_the_one_asked_for_is_not_signed_and_nothing_stays_locked",
    ),
    _wallet(
        "node-payment-missing",
        "Every payment that was asked for is in the transaction, once.",
        "            any(count < 0 for count in rest.values())\n            or extra",
        "            extra",
        by="test_a_payment_that_is_not_the_one_asked_for_is_not_signed_and_nothing_stays_locked",
    ),
    _wallet(
        "node-avoided-coin-spent",
        "A coin to avoid is not spent, whatever the node selects.",
        "spend.outpoint not in found or spend.outpoint in avoid for",
        "spend.outpoint not in found for",
        by="test_a_coin_to_avoid_is_not_spent_even_when_the_wallet_takes_it",
    ),
    _wallet(
        "node-any-fee",
        "The fee of a payment is the one that was asked for.",
        "if not 0 <= done.fee - rate.fee(weight) <= rate.fee(8 * len(inputs) + 8) + _LARGEST_REST:",
        "if False:",
        by="test_a_payment_with_another_fee_is_not_made",
    ),
    _wallet(
        "node-failed-payment-keeps-locks",
        "A payment that failed after its coins were locked gives them back.",
        "                await self._let_go(leases, frozenset(inputs))\n                raise\n",
        "                raise\n",
        by="test_a_payment_with_another_fee_is_not_made",
    ),
    _wallet(
        "node-foreign-input-shown",
        "A foreign input is shown to the wallet as signed already.",
        "PsbtInput(witness_utxo=prevouts[spend.outpoint], final_script_witness=_STAND_IN)",
        "PsbtInput(witness_utxo=prevouts[spend.outpoint])",
        by="test_the_wallet_is_shown_nothing_of_a_foreign_input_that_it_could_sign",
    ),
    _wallet(
        "node-changes-the-transaction",
        "A transaction that came back changed is not taken.",
        "        if signed.tx != psbt.tx:\n",
        "        if False:\n",
        by="test_a_transaction_that_was_changed_while_it_was_signed_is_not_taken",
    ),
    _wallet(
        "node-foreign-sighash",
        "A signature of ours commits to the whole transaction.",
        "if places[outpoint].sighash_type not in (None, 0, 1):",
        "if False:",
        by="test_what_is_not_ours_not_spent_or_signed_otherwise_is_refused_before_the_wallet_is_asked",
    ),
    _wallet(
        "node-signature-believed",
        "A signature counts when the curve agrees to it.",
        "                check_signed_input(tx, index, spent)\n",
        "                pass\n",
        by="test_the_wallet_is_shown_nothing_of_a_foreign_input_that_it_could_sign",
    ),
    _chain(
        "node-still-downloading",
        "A node that is still downloading blocks tells nothing about the present.",
        "if downloading and self._rpc.network is not Network.REGTEST:",
        "if False:",
        by="test_a_node_that_downloads_blocks_is_not_now_but_on_regtest_where_it_always_says_so",
    ),
    _chain(
        "node-tip-moved-in-prevouts",
        "Previous outputs are told as of one tip.",
        "        if best != tip.hash:\n            raise Moved\n        spenders",
        "        spenders",
        by="test_a_tip_that_never_rests_is_not_now",
    ),
    _chain(
        "node-tip-moved-in-a-view",
        "A view is told as of one tip.",
        "        if moved:\n            raise Moved\n",
        "",
        by="test_a_tip_that_never_rests_is_not_now",
    ),
    _chain(
        "node-another-transaction",
        "A transaction is the one that was asked for by its id.",
        "        if tx.txid != txid:\n            raise NotNow(",
        "        if False:\n            raise NotNow(",
        by="test_an_answer_with_another_transaction_is_no_answer",
    ),
    _scan(
        "node-lost-blocks-remembered",
        "What was found in a block that left the chain is forgotten.",
        "            await self._forget_lost(tip)\n",
        "            pass\n",
        by="test_what_was_found_in_blocks_that_left_the_chain_is_forgotten",
    ),
    _scan(
        "node-pruned-is-nothing",
        "A block that is pruned is no block without the transaction.",
        "                self._drop_behind(height)\n",
        "                pass\n",
        by="test_a_pruned_block_that_is_needed_is_not_now_in_words_that_help",
    ),
    _scan(
        "node-dropped-is-not-found",
        "A search that was dropped to make room is not an answer.",
        "            if not self._searches.keys() >= set(wanted):\n",
        "            if False:\n",
        by="test_a_pruned_block_that_is_needed_is_not_now_in_words_that_help",
    ),
)
