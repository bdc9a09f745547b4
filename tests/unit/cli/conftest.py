"""What tests of commands share: nobody's configuration, data or environment, and the command line as a call."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pjv2.cli.app import run
from pjv2.cli.command import Cli

Call = Callable[..., tuple[int, str, str]]
"""Words to exit code, stdout and stderr."""


def lines(text: str) -> list[dict[str, Any]]:
    """The objects of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where configuration and data are looked for; whoever runs the tests has neither, and no PJV2_ variable."""
    for name in [name for name in os.environ if name.startswith("PJV2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("pjv2.config.default_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr("pjv2.config.data_directory", lambda: tmp_path / "data")
    return tmp_path


@pytest.fixture
def database(home: Path) -> Path:
    """Where the sessions would be stored."""
    return home / "data" / "pjv2.sqlite"


@pytest.fixture
def pjv2(home: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str, cli: Cli | None = None) -> tuple[int, str, str]:
        code = run(list(words), cli=cli)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call
