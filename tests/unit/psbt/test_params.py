"""The parameters of an Original: what payers write is read as they mean it, and what we write is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2.errors import BadOriginal, ReplyCode, WrongUsage
from pjv2.psbt.params import MAX_MIN_FEE_RATE, Params, format_params, format_rate, parse_params
from pjv2.units import FeeRate

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "psbt.json").read_text())["vectors"]


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["kind"] == "query_encode"], ids=lambda v: v["expected_query"]
)
def test_the_reference_queries_are_written(vector: dict[str, object]) -> None:
    offered = vector["fee_contribution_sat_and_vout"]
    most, vout = offered if isinstance(offered, list) else (None, None)
    params = Params(
        version=2,
        output_substitution=vector["output_substitution"] == "Enabled",
        fee_output=vout,
        max_fee_contribution=most,
        min_fee_rate=FeeRate.from_sat_per_vb(str(vector["min_fee_rate_sat_vb"])),
    )
    assert format_params(params) == vector["expected_query"]


def test_the_reference_query_is_read() -> None:
    vector = next(v for v in VECTORS if v["name"] == "parse_params")
    assert parse_params(vector["query"]) == Params(1, False, 0, 182, FeeRate(500))


def test_the_reference_test_query_is_read() -> None:
    vector = next(v for v in VECTORS if v["name"] == "test_utils_query_params")
    params = parse_params(vector["value"])
    assert (params.fee_output, params.max_fee_contribution, params.min_fee_rate) == (0, 182, FeeRate(250))


def test_an_unknown_version_is_refused_with_its_own_code() -> None:
    for query in ("v=888", "v=x", "v=", "v=-1"):
        with pytest.raises(BadOriginal) as refusal:
            parse_params(query)
        assert refusal.value.reply is ReplyCode.VERSION_UNSUPPORTED
    with pytest.raises(BadOriginal):
        parse_params("v=2", versions=(1,))
    assert parse_params("").version == 1
    assert parse_params("", default_version=2).version == 2


@pytest.mark.parametrize(
    "text", ["inf", "-inf", "nan", "NaN", "-1", "1e20", "25000.004", "26000", "", "x", "1_0", "1e99999"]
)
def test_upbug_h_minfeerate_that_is_infinite_negative_or_absurd_is_refused(text: str) -> None:
    with pytest.raises(BadOriginal) as refusal:
        parse_params(f"minfeerate={text}")
    assert refusal.value.reply is ReplyCode.ORIGINAL_PSBT_REJECTED


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("25000", 6_250_000),
        ("0", 0),
        ("-0", 0),
        ("1.5", 375),
        (".5", 125),
        ("5.", 1250),
        ("1.0001", 251),
        ("1e-30", 1),
        ("%2B2", 500),
    ],
)
def test_minfeerate_is_rounded_up_to_the_next_sat_per_kwu(text: str, rate: int) -> None:
    assert parse_params(f"minfeerate={text}").min_fee_rate == FeeRate(rate)


@pytest.mark.parametrize("text", ["1", "TRUE", "True", "", "yes"])
def test_fixed_29_only_exactly_true_disables_substitution(text: str) -> None:
    assert parse_params(f"disableoutputsubstitution={text}").output_substitution
    assert not parse_params("disableoutputsubstitution=true").output_substitution
    assert "disableoutputsubstitution=true" in format_params(Params(output_substitution=False))


@pytest.mark.parametrize(
    "query",
    [
        "additionalfeeoutputindex=0",
        "maxadditionalfeecontribution=5",
        "additionalfeeoutputindex=-1&maxadditionalfeecontribution=5",
        "additionalfeeoutputindex=0&maxadditionalfeecontribution=1.5",
        "additionalfeeoutputindex=99999999999999999999&maxadditionalfeecontribution=5",
        "additionalfeeoutputindex&maxadditionalfeecontribution=5",
    ],
)
def test_half_or_malformed_contributions_are_none(query: str) -> None:
    params = parse_params(query)
    assert (params.fee_output, params.max_fee_contribution) == (None, None)


def test_undecodable_pairs_are_dropped_and_the_last_of_a_name_counts() -> None:
    params = parse_params("v=%ff&%ff=1&optimisticmerge=true&v=1&v=2")
    assert params.version == 2


def test_fixed_28_a_v2_sender_says_v_2() -> None:
    assert format_params(Params()).startswith("v=2")


def test_a_rate_beyond_the_limit_is_not_written() -> None:
    assert format_rate(MAX_MIN_FEE_RATE) == "25000"
    with pytest.raises(WrongUsage):
        format_rate(FeeRate(MAX_MIN_FEE_RATE.sat_per_kwu + 1))


@given(
    st.builds(
        Params,
        version=st.sampled_from([1, 2]),
        output_substitution=st.booleans(),
        fee_output=st.none(),
        max_fee_contribution=st.none(),
        min_fee_rate=st.integers(1, 6_250_000).map(FeeRate),
    ),
    st.none() | st.tuples(st.integers(0, 300), st.integers(0, 2**63)),
)
@settings(max_examples=150, deadline=None)
def test_parameters_round_trip_exactly(params: Params, offer: tuple[int, int] | None) -> None:
    if offer:
        params = Params(params.version, params.output_substitution, *offer, params.min_fee_rate)
    assert parse_params(format_params(params)) == params


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_query_is_parameters_or_a_bad_original(query: str) -> None:
    for text in (
        query,
        f"minfeerate={query}",
        f"v={query}",
        f"additionalfeeoutputindex={query}&maxadditionalfeecontribution=1",
    ):
        try:
            outcome: object = parse_params(text)
        except BadOriginal as refusal:
            outcome = refusal.reply
        assert isinstance(outcome, Params | ReplyCode)
