"""Mutants of the plan and of the proposal: caps, dust, size, and what the wallet may not do."""

from __future__ import annotations

from tests.mutants.model import Mutant

PLAN = "pjv2/psbt/plan.py"
PROPOSAL = "pjv2/psbt/proposal.py"
PLAN_TESTS = ("tests/unit/psbt/test_plan.py", "tests/unit/psbt/test_guards_plan.py")
PROPOSAL_TESTS = ("tests/unit/psbt/test_proposal.py", "tests/unit/psbt/test_guards_plan.py")


def _plan(name: str, rule: str, old: str, new: str, *serves: str) -> Mutant:
    return Mutant(name, rule, PLAN, old, new, PLAN_TESTS, serves)


def _proposal(name: str, rule: str, old: str, new: str, *serves: str) -> Mutant:
    return Mutant(name, rule, PROPOSAL, old, new, PROPOSAL_TESTS, serves)


PLANNING = (
    # ---------------------------------------------------------------- what a person writes
    _plan(
        "order-form",
        "A channel order names a peer and a capacity.",
        "    if not equals or not at:\n",
        "    if False:\n",
    ),
    _plan(
        "order-option",
        "An unknown wish is refused, never ignored.",
        '            case _:\n                raise WrongUsage(f"{option!r}',
        '            case _ if False:\n                raise WrongUsage(f"{option!r}',
    ),
    _plan(
        "order-amount",
        "An amount is a number of satoshis.",
        '    if not re.fullmatch(r"[0-9]{1,16}", digits):\n',
        "    if False:\n",
    ),
    _plan("order-peer", "A peer is a public key.", "    if not _PEER.match(order.peer):\n", "    if False:\n"),
    _plan(
        "order-least",
        "A channel is at least as large as its minimum.",
        "    if order.capacity is not None and order.capacity < order.min_capacity:\n",
        "    if False:\n",
    ),
    _plan(
        "order-dust",
        "No channel is dust.",
        "    if order.min_capacity < dust_limit(FUNDING_PLACEHOLDER):\n",
        "    if False:\n",
    ),
    _plan(
        "order-push",
        "A channel pushes no more than it holds.",
        "    if order.push > (order.min_capacity if order.capacity is None else order.capacity):\n",
        "    if False:\n",
    ),
    _plan(
        "plan-twice",
        "Each peer is named once.",
        "    if len({order.peer for order in plan.orders}) != len(plan.orders):\n",
        "    if False:\n",
    ),
    _plan(
        "plan-two-rests",
        "One channel takes the rest.",
        "    if sum(order.capacity is None for order in plan.orders) > 1:\n",
        "    if False:\n",
    ),
    _plan(
        "plan-reserve-dust",
        "The reserve is no dust.",
        "    if plan.reserve and plan.reserve < dust_limit(FUNDING_PLACEHOLDER):\n",
        "    if False:\n",
    ),
    _plan(
        "plan-missing-sats",
        "A request carries its plan at the highest fee we allow.",
        "    if amount is not None and not plan.top_up and least + worst_fee > amount:\n",
        "    if amount is not None and not plan.top_up and least > amount:\n",
        "money 2",
    ),
    _plan(
        "plan-too-large",
        "The reply of a plan fits into message B.",
        "    if reply > MAX_REPLY_BYTES:\n        raise WrongUsage",
        "    if False:\n        raise WrongUsage",
    ),
    _plan(
        "replan-abort",
        "A plan that says abort is aborted.",
        '    if policy == "abort":\n',
        "    if False:\n",
        "money 7",
    ),
    _plan(
        "replan-deposit",
        "A plan that says deposit gives up all channels.",
        '    if policy == "deposit" or not orders:\n',
        "    if not orders:\n",
        "money 7",
    ),
    # ---------------------------------------------------------------- intents
    _plan(
        "intent-too-large",
        "An intent's reply fits into message B, before anything is promised.",
        "    if reply > MAX_REPLY_BYTES:\n        raise CannotPropose",
        "    if False:\n        raise CannotPropose",
    ),
    _plan(
        "intent-size-of-signatures",
        "The size of a reply counts our largest signatures.",
        "coin.final_placeholder() for coin in coins",
        "coin.psbt_input() for coin in coins",
    ),
    _plan("intent-dust", "No output of ours is dust.", "    _no_dust(outputs)\n", ""),
    _plan(
        "dust-limit",
        "Dust is what the network calls dust.",
        "        if output.value < dust_limit(output.script or FUNDING_PLACEHOLDER):\n",
        "        if output.value < 0:\n",
    ),
    _plan(
        "coins-twice",
        "A coin is spent once.",
        "    if len({coin.outpoint for coin in coins} | checked.outpoints) != len(coins) + len(checked.outpoints):\n",
        "    if False:\n",
    ),
    _plan(
        "coins-unpredictable",
        "The payer can weigh every coin that we offer.",
        "        if not coin.is_usable:\n",
        "        if False:\n",
    ),
    _plan(
        "coins-native",
        "A coin in a proposal with channels is native segwit.",
        "        if channels and not coin.kind.is_native_segwit:\n",
        "        if False:\n",
        "money 2",
    ),
    _plan(
        "coins-young",
        "A coin satisfies the relative lock that it copies.",
        "        if not _lock_satisfied(checked, coin):\n",
        "        if False:\n",
        "money 2",
    ),
    _plan(
        "plain-nothing-to-do",
        "A plain payjoin contributes a coin or forwards the payment.",
        "    if not coins and script == checked.terms.script:\n",
        "    if False:\n",
    ),
    _plan(
        "plain-substitute",
        "The payment's script is replaced only where the payer allows it.",
        "substitute if substitute is not None and checked.substitution else",
        "substitute if substitute is not None else",
    ),
    _plan(
        "plain-shrinks",
        "The payment does not shrink where the payer forbids it.",
        "    if not checked.substitution and value < original:\n",
        "    if False:\n",
    ),
    _plan(
        "channels-substitution",
        "Channels need output substitution and a known transaction id.",
        "    if not checked.substitution or not checked.txid_is_stable:\n",
        "    if False:\n",
        "money 2",
    ),
    _plan(
        "channels-shortfall",
        "Our own coin pays for channels only when that was asked for.",
        "        if left < 0 and not plan.top_up:\n",
        "        if False:\n",
    ),
    _plan(
        "channels-change-floor",
        "Our change always carries a child that pays for its parent.",
        "    if with_change and change < (floor := change_floor(scripts.change, checked.terms.max_fee_rate)):\n",
        "    if with_change and change < (floor := dust_limit(scripts.change)):\n",
        "money 9",
    ),
    _plan(
        "channels-split-payment",
        "Each slot of the payment is filled.",
        "    if len(outputs) < len(checked.paid_vouts):\n",
        "    if False:\n",
    ),
    _plan(
        "channels-least-rest",
        "The last channel has at least its minimum.",
        "    if left < least:\n        raise CannotPropose",
        "    if False:\n        raise CannotPropose",
    ),
    _plan(
        "channels-top-up",
        "Our change lifts a channel only under top-up.",
        "    if left < least and plan.top_up and with_change:\n",
        "    if left < least and with_change:\n",
    ),
    _plan(
        "channels-deposit-dust",
        "A deposit that would be dust is not made.",
        "    return script if left >= dust_limit(script) else None\n",
        "    return script\n",
    ),
    _plan(
        "channels-script",
        "No output is made without a script.",
        "    if script is None:\n        raise WrongUsage",
        "    if script is None and False:\n        raise WrongUsage",
    ),
    _plan(
        "change-floor-at-the-cap",
        "The child is paid for at the highest rate that we allow.",
        "    return 2 * dust_limit(script) + max_fee_rate.fee(CHILD_WEIGHT)\n",
        "    return 2 * dust_limit(script)\n",
        "money 9",
    ),
    # ---------------------------------------------------------------- fee caps
    _plan(
        "fee-cap-rate",
        "We never pay more than `max_fee_rate`.",
        "    rate = min(max(checked.rate, floor), checked.terms.max_fee_rate)\n",
        "    rate = max(checked.rate, floor)\n",
        "money 2",
    ),
    _plan(
        "fee-cap-share",
        "We never pay more than `max_fee_share` of the payment.",
        "    cap = min(share, checked.terms.max_fee_rate.fee(in_weight + out_weight))\n",
        "    cap = checked.terms.max_fee_rate.fee(in_weight + out_weight)\n",
        "money 2",
    ),
    _plan(
        "fee-demanded",
        "A rate demanded beyond our cap is refused.",
        "    if rate < floor:\n",
        "    if False:\n",
        "money 2",
    ),
    _plan(
        "fee-share-refuses",
        "A payment too small for its fee is not made a payjoin.",
        "    if at(low).ours > cap:\n",
        "    if False:\n",
        "money 2",
    ),
    _plan(
        "fee-of-outputs",
        "Our heavier outputs are paid for by us.",
        "    return max(0, outputs) + overhead\n",
        "    return overhead\n",
    ),
    _plan(
        "sender-pays-his-maximum",
        "The payer pays no more than he offered.",
        "    return min(checked.contribution.max, for_inputs, accepted, spare)\n",
        "    return min(for_inputs, accepted, spare)\n",
    ),
    _plan(
        "sender-pays-for-inputs",
        "The payer pays for our inputs only.",
        "    return min(checked.contribution.max, for_inputs, accepted, spare)\n",
        "    return min(checked.contribution.max, accepted, spare)\n",
    ),
    _plan(
        "sender-pays-what-he-accepts",
        "The payer pays no more than his own check accepts.",
        "    return min(checked.contribution.max, for_inputs, accepted, spare)\n",
        "    return min(checked.contribution.max, for_inputs, spare)\n",
    ),
    _plan(
        "sender-dust",
        "The payer's output never becomes dust.",
        "    return min(checked.contribution.max, for_inputs, accepted, spare)\n",
        "    return min(checked.contribution.max, for_inputs, accepted)\n",
    ),
    _plan(
        "coins-min-amount",
        "Below the least amount no coin is offered.",
        "    if checked.paid < checked.terms.min_amount:\n",
        "    if False:\n",
    ),
    _plan(
        "coins-for-channels",
        "Only confirmed native coins are chosen for channels.",
        "plan is None or (coin.height is not None and coin.kind.is_native_segwit)",
        "True",
        "money 2",
    ),
    # ---------------------------------------------------------------- drafting
    _proposal(
        "draft-scripts",
        "Each channel has its funding script.",
        "    if len(funding_scripts) != len(intent.orders):\n",
        "    if False:\n",
    ),
    _proposal(
        "draft-script-size",
        "A funding script has the size that the fee was computed for.",
        "            if kind_of(script) not in (ScriptKind.P2WSH, ScriptKind.P2TR):\n",
        "            if False:\n",
    ),
    _proposal(
        "draft-forbidden-outputs",
        "No output is added or moved where the payer forbids it.",
        "    if len(own) < slots or (not checked.substitution and (len(own) != slots or not in_place)):\n",
        "    if False:\n",
    ),
    _proposal(
        "draft-coin-twice",
        "No coin is placed twice.",
        "        if coin.outpoint in {txin.outpoint for txin in txins}:\n",
        "        if False:\n",
    ),
    _proposal(
        "draft-sequence",
        "Our input copies the sequence of the payer's first.",
        'TxIn(coin.outpoint, b"", checked.sequence)',
        'TxIn(coin.outpoint, b"", 0xFFFFFFFF)',
    ),
    _proposal(
        "draft-conserved",
        "A draft pays the fee that the intent says, to the satoshi.",
        "    if fee != checked.fee + intent.our_fee + intent.sender_fee:\n",
        "    if False:\n",
    ),
    _proposal(
        "draft-fee-output",
        "The payer's contribution is taken from the output he named.",
        "elif checked.contribution is not None and vout == checked.contribution.vout:",
        "elif checked.contribution is not None and txout.script == checked.tx.outputs[checked.contribution.vout].script:",
    ),
    _proposal(
        "draft-stable",
        "A nested coin of ours makes the transaction id unknown.",
        "checked.txid_is_stable and all(coin.kind.is_native_segwit for coin in intent.coins)",
        "checked.txid_is_stable",
    ),
    _proposal(
        "restore-funding",
        "A stored proposal has the funding outputs that the log says.",
        "    if proposal.funding != tuple(sorted(funding, key=lambda item: item.channel)):\n",
        "    if False:\n",
    ),
    _proposal(
        "restore-inputs",
        "A stored proposal spends the Original's inputs and our coins.",
        "    if senders != [txin.outpoint for txin in checked.tx.inputs] or len(tx.inputs) != len(senders) + len(coins):\n",
        "    if False:\n",
    ),
    _proposal(
        "restore-outputs",
        "A stored proposal lacks no output.",
        "    if waiting or theirs:\n",
        "    if False:\n",
    ),
    # ---------------------------------------------------------------- signing
    _proposal(
        "finish-other-transaction",
        "The wallet signed the drafted transaction.",
        "    if answer.tx.stripped() != provisional.psbt.tx:\n",
        "    if False:\n",
    ),
    _proposal(
        "finish-foreign-input-signed",
        "The wallet signs no input of the payer.",
        "        elif given.has_signature:\n",
        "        elif False:\n",
    ),
    _proposal(
        "finish-size",
        "The signed proposal fits into message B.",
        "    if len(cleaned) > MAX_REPLY_BYTES:\n",
        "    if False:\n",
    ),
    _proposal(
        "finish-txid",
        "Signing does not change a stable transaction id.",
        "    if provisional.txid_is_stable and tx.txid != provisional.txid:\n",
        "    if False:\n",
        "money 3",
    ),
    _proposal(
        "finish-unsigned",
        "Every coin of ours is signed.",
        "    if not given.is_final:\n",
        "    if False:\n",
        "money 4",
    ),
    _proposal(
        "finish-sighash",
        "Our signature commits to the whole transaction.",
        "    if prevout is None or not commits_to_all(final, prevout):\n",
        "    if False:\n",
        "money 4",
    ),
    _proposal(
        "finish-allow-list",
        "What leaves is copied from an allow-list.",
        "            maps.append(_cleaned(asked))\n",
        "            maps.append(given)\n",
    ),
    # ---------------------------------------------------------------- what needs nobody
    _proposal(
        "way-out-above",
        "A way out pays more than the proposal that it replaces.",
        "fee = max(fee_rate.fee(weight), above + INCREMENTAL_RATE.fee(weight) if above else 0)",
        "fee = fee_rate.fee(weight)",
        "money 9",
    ),
    _proposal(
        "way-out-dust",
        "A way out that leaves dust is refused.",
        "    if value < dust_limit(script):\n",
        "    if False:\n",
    ),
    _proposal(
        "way-out-coins",
        "A way out brings a coin back.",
        "    if not coins:\n        raise WrongUsage",
        "    if False:\n        raise WrongUsage",
    ),
    _proposal(
        "child-of-our-output",
        "A child spends the output that is meant.",
        "    if vout >= len(parent.outputs) or parent.outputs[vout] != prevout:\n",
        "    if vout >= len(parent.outputs):\n",
    ),
    _proposal(
        "child-pays",
        "A child lifts its whole package.",
        "target.fee(whole_vbytes(package_weight) + weight) - package_fee",
        "target.fee(weight)",
        "money 9",
    ),
    _proposal(
        "child-dust",
        "A child that leaves dust is refused.",
        "    if prevout.value - fee < dust_limit(script):\n",
        "    if False:\n",
    ),
)
