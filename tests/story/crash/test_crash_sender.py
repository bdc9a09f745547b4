"""A sender's process ends before or after any event or effect, and starts again: the payment ends as it would have."""

from __future__ import annotations

import pytest

from tests.story.crash.stories import SENDERS, Story, stopped_once, stops, undisturbed


@pytest.mark.parametrize("story", SENDERS, ids=lambda story: story.name)
async def test_undisturbed_it_passes_exactly_the_points_that_it_is_stopped_at(story: Story) -> None:
    await undisturbed(story)


@pytest.mark.parametrize(("story", "stop"), stops(*SENDERS))
async def test_stopped_anywhere_the_payment_ends_as_it_would_have(story: Story, stop: str) -> None:
    await stopped_once(story, stop)
