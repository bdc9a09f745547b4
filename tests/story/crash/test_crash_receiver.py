"""A receiver's process ends before or after any event or effect, and starts again: the payment ends as it would have."""

from __future__ import annotations

import pytest

from tests.story.crash.stories import RECEIVERS, Story, stopped_once, stops, undisturbed, whole_tales
from tests.story.lab.kit import Pair


@pytest.mark.parametrize(("story", "pair"), whole_tales(*RECEIVERS))
async def test_undisturbed_it_passes_exactly_the_points_that_it_is_stopped_at(story: Story, pair: Pair) -> None:
    await undisturbed(story, pair)


@pytest.mark.parametrize(("story", "stop", "pair"), stops(*RECEIVERS))
async def test_stopped_anywhere_the_payment_ends_as_it_would_have(story: Story, stop: str, pair: Pair) -> None:
    await stopped_once(story, stop, pair)
