"""No configuration, data or environment of whoever runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PJV2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("pjv2.config.default_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr("pjv2.config.data_directory", lambda: tmp_path / "data")
