"""The river of docs/design.md: a module may import what stands left of it, never what stands right."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "pjv2"
RIVER = [
    "errors", "units", "qr", "wire", "psbt", "session", "ports", "errands", "driver", "start", "schedule", "poller",
    "sections", "config", "opening", "app",
    "accounts", "doctor", "cli",
]  # fmt: skip
RANK = {name: place for place, name in enumerate(RIVER)}
APART = {("wire", "psbt"), ("psbt", "wire")}
WORLD = {
    "time", "random", "secrets", "os", "socket", "asyncio", "datetime", "sqlite3", "httpx", "logging", "ssl",
    "threading", "subprocess", "sqlalchemy", "pyreqwest", "uuid", "select", "tempfile", "pathlib",
}  # fmt: skip
PURE = {"errors", "units", "wire", "psbt", "session"}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "facade" if parts == ("__init__",) else parts[0]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = path.relative_to(ROOT.parent).with_suffix("").parts
                module = ".".join([*base[: len(base) - node.level], *([module] if module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "pjv2" else {module}
    return names


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("pjv2.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_data_flows_one_way_through_the_packages(path: Path) -> None:
    here = room(path)
    for there in rooms(path) - {here}:
        if here in {"testing", "lab"}:
            assert there != "cli", f"{here} must not import cli"
        elif here == "backends":
            assert there in RANK, f"a backend must not import {there}"
            assert RANK[there] <= RANK["ports"], f"a backend must not import {there}"
        elif here in RANK:
            if there in {"lab", "testing"}:
                assert here == "cli", f"{here} must not import {there}"
            elif there == "backends":
                assert RANK[here] >= RANK["opening"], f"{here} must not import a backend"
            else:
                assert there in RANK, f"unknown room {there}"
                assert RANK[there] < RANK[here], f"{here} must not import {there}, which stands right of it"
                assert (here, there) not in APART


@pytest.mark.parametrize(
    "path", [f for f in FILES if room(f) in PURE], ids=lambda path: str(path.relative_to(ROOT.parent))
)
def test_the_pure_layers_take_time_and_the_world_as_arguments(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & WORLD


def test_only_one_module_knows_bitcointx() -> None:
    users = {
        str(path.relative_to(ROOT)) for path in FILES if any(n.split(".")[0] == "bitcointx" for n in imported(path))
    }
    assert users <= {"psbt/tx/encoding.py"}


def test_only_one_module_knows_the_curve() -> None:
    users = {
        str(path.relative_to(ROOT)) for path in FILES if any(n.split(".")[0] == "coincurve" for n in imported(path))
    }
    assert users <= {
        "wire/secp.py",
        "testing/paper_wallet.py",
        "backends/channel/rehearsal_commitment.py",
        "backends/wallet/signature.py",
        "lab/miner.py",
    }
