"""Back-offs double, end, heal, and survive a restart."""

from __future__ import annotations

import json

import pytest

from pjv2.backends.mailroom.health import LONGEST_BACK_OFF, LONGEST_RETRY_AFTER, Health
from pjv2.errors import CannotRead


class Middle:
    """Jitter in the middle: the back-off is exactly its nominal length."""

    def token(self, size: int) -> bytes:
        return bytes(size)

    def below(self, limit: int) -> int:
        return limit // 2


class Edge(Middle):
    def below(self, limit: int) -> int:
        return limit - 1


def test_back_offs_double_to_ten_minutes():
    health = Health(Middle())
    assert [health.failed("a", 1000.0) for _ in range(4)] == [2.0, 4.0, 8.0, 16.0]
    for _ in range(40):
        longest = health.failed("a", 1000.0)
    assert longest == LONGEST_BACK_OFF


def test_a_back_off_ends_by_itself_and_success_forgets_it():
    health = Health(Middle())
    health.failed("a", 1000.0)
    assert health.wait(1000.0, "a", "b") == 2.0
    assert health.wait(1002.0, "a") == 0.0
    assert health.failed("a", 1002.0) == 4.0
    assert health.worked("a", "b")
    assert not health.worked("a")
    assert health.wait(1002.0, "a") == 0.0
    assert health.failed("a", 1003.0) == 2.0


def test_a_day_without_failure_forgets_the_count():
    health = Health(Middle())
    for _ in range(5):
        health.failed("a", 1000.0)
    assert health.failed("a", 1000.0 + 86_401) == 2.0


def test_retry_after_is_honoured_up_to_an_hour():
    health = Health(Middle())
    assert health.failed("a", 0.0, 30.0) == 30.0
    assert health.failed("b", 0.0, 1e9) == LONGEST_RETRY_AFTER


def test_jitter_stays_within_a_quarter():
    assert Health(Edge()).failed("a", 0.0) == 2.5


def test_a_clock_that_went_back_does_not_lock_anybody_out():
    health = Health(Middle())
    health.failed("a", 1_000_000.0, 3600.0)
    assert health.wait(0.0, "a") == 0.0


def test_health_survives_as_json():
    health = Health(Middle())
    health.failed("relay https://r.example for https://d.example", 1000.0)
    again = Health.from_dict(json.loads(json.dumps(health.to_dict())), Middle())
    assert again.back_offs(1001.0) == {"relay https://r.example for https://d.example": 1.0}


@pytest.mark.parametrize("data", [[], {"a": 1}, {"a": [0, 1.0, 2.0]}, {"a": ["x", 1.0, 2.0]}, {"a": [1, 2.0]}, None])
def test_what_is_no_health_is_not_read(data):
    with pytest.raises(CannotRead):
        Health.from_dict(data, Middle())


def test_memory_is_bounded():
    health = Health(Middle())
    for number in range(1500):
        health.failed(str(number), 0.0)
    assert len(health.to_dict()) == 1000
