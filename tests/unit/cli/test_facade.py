"""The facade has the names an app needs, and costs next to nothing before one is used."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pjv2

FACADE = Path(pjv2.__file__)


def test_every_name_of_the_facade_is_there_and_is_the_one_of_its_home() -> None:
    for name in pjv2.__all__:
        value = getattr(pjv2, name)
        assert value is getattr(sys.modules[pjv2._HOME[name]], name)
    assert set(pjv2.__all__) <= set(dir(pjv2))
    assert isinstance(pjv2.__version__, str)


def test_the_names_for_type_checkers_are_the_names_for_python() -> None:
    typed: dict[str, str] = {}
    for node in ast.walk(ast.parse(FACADE.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pjv2."):
            typed |= {alias.name: node.module for alias in node.names}
    assert typed == pjv2._HOME
    assert sorted(typed) == pjv2.__all__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        pjv2.Nonsense  # noqa: B018  looking is the point


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, pjv2; print([name for name in sys.modules if name.startswith('pjv2.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_help_is_told_without_the_database_the_kernel_or_the_configuration() -> None:
    code = (
        "import sys; from pjv2.cli.app import run; run(['--help']);"
        "heavy = 'sqlalchemy pydantic bitcointx coincurve asyncio rich.console httpx pyreqwest pbk'.split();"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "[]\n"


def best_of_five(*words: str) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True, timeout=60)
        times.append(time.perf_counter() - started)
    return min(times)


@pytest.mark.parametrize(
    ("what", "words", "bar"),
    [
        ("import pjv2", ("-c", "import pjv2"), 0.150),
        ("pjv2 --help", ("-m", "pjv2.cli", "--help"), 0.250),
    ],
)
def test_the_start_is_quick(what: str, words: tuple[str, ...], bar: float, capsys: pytest.CaptureFixture[str]) -> None:
    taken = best_of_five(*words)
    with capsys.disabled():
        print(f"\n{what}: {taken * 1000:.0f} ms (bar {bar * 1000:.0f} ms)")
    assert taken < 3 * bar  # three times: the machine that runs the tests may be busy
