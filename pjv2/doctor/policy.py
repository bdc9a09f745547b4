"""Policy: settings that contradict each other, that make payjoins impossible, or that the market mocks."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Sequence

from pjv2.config import Config
from pjv2.doctor.installation import Check, Installation
from pjv2.units import Network

_OWN_WEIGHT = 440
"""One native input and one output of ours, in weight units."""


async def check_policy(it: Installation) -> Sequence[Check]:
    """Settings that contradict each other, or that make payjoins impossible."""
    found = list(_contradictions(it.config))
    return found or [Check("policy", "ok", "the limits leave room for payjoins, and no setting contradicts another")]


def _contradictions(config: Config) -> Iterable[Check]:
    policy, lightning = config.policy, config.lightning.backend != "none"
    if config.chain_backend == "lnd":
        yield Check(
            "policy",
            "failed",
            "LND cannot say whether the network would take a payer's transaction, so no Original could be accepted",
            "Give a second chain source: [chain] backend and url.",
            usage=True,
        )
    if policy.max_fee_share == 0:
        why = "max_fee_share is 0: no fee can be paid for coins of ours, so nothing is ever proposed"
        yield Check("policy", "warning", why, "Raise [policy] max_fee_share.")
    elif policy.min_amount and policy.max_fee_share * policy.min_amount < policy.min_fee_rate * _OWN_WEIGHT / 4:
        least = round(policy.min_fee_rate * _OWN_WEIGHT / 4 / policy.max_fee_share)
        yield Check(
            "policy",
            "warning",
            f"from payments below about {least:_} sat, max_fee_share cannot pay for one coin of ours even at min_fee_rate",
            "Raise [policy] min_amount or max_fee_share.",
        )
    if lightning and policy.own_input == "prefer":
        yield Check(
            "policy",
            "warning",
            'own_input = "prefer": without a coin of ours the payer can re-make the transaction under another id, '
            "and a channel's money would need the peer's consent",
            'Set [policy] own_input = "require" unless you trust your payers.',
        )
    if policy.approve == "ask" and policy.expire_in < 3_600:
        why = f"requests expire after {policy.expire_in} s, and a person has to approve before"
        yield Check("policy", "warning", why, "Raise [policy] expire_in.")
    if policy.watch_after_expiry < policy.give_up_blocks * 600:
        yield Check(
            "policy",
            "warning",
            f"an address is watched for {policy.watch_after_expiry / 86_400:.1f} days after its expiry, "
            f"and {policy.give_up_blocks} blocks take about {policy.give_up_blocks / 144:.1f}",
            "Raise [policy] watch_after_expiry.",
        )
    if config.payjoin.ohttp_keys_file is not None and config.network is Network.BITCOIN:
        yield Check(
            "policy",
            "warning",
            "ohttp_keys_file pins the directories' keys: when one changes its key, every new request is dead",
            "Remove [payjoin] ohttp_keys_file; keys are then fetched through relays.",
        )
    if config.hooks.command is not None and not _is_program(config.hooks.command):
        yield Check(
            "policy", "warning", "[hooks] command names no program that can be run", "Correct the path.", usage=True
        )


def _is_program(command: str) -> bool:
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return bool(words) and shutil.which(words[0]) is not None


async def check_fees(it: Installation) -> Sequence[Check]:
    """The policy's rates fit the market."""
    rate, policy = (await (await it.chain()).fee_rate(6)).sat_per_vb, it.config.policy
    if rate > policy.max_fee_rate:
        why = f"the market asks {rate:g} sat/vB, and max_fee_rate is {policy.max_fee_rate:g}: proposals confirm late or never"
        return [Check("fees", "warning", why, "Raise [policy] max_fee_rate, or wait.")]
    if policy.min_fee_rate > rate:
        why = f"min_fee_rate is {policy.min_fee_rate:g} sat/vB, and the market asks only {rate:g}: payers are refused in vain"
        return [Check("fees", "warning", why, "Lower [policy] min_fee_rate.")]
    return [Check("fees", "ok", f"about {rate:g} sat/vB for six blocks, within the policy")]
