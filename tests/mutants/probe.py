"""A pytest plugin for the mutated tree: the suite must import that tree's pjv2, and not the installed one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

WRONG_TREE = 77


def pytest_configure() -> None:
    import pjv2

    tree = Path(os.environ["PJV2_MUTANT_TREE"]).resolve()
    if tree not in Path(pjv2.__file__).resolve().parents:
        pytest.exit(f"pjv2 was imported from {pjv2.__file__}, not from the mutated tree", returncode=WRONG_TREE)
