"""The demo tells the truth: it runs, and with any one of its facts falsified it fails."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from pjv2.cli.output import Output
from pjv2.config import Config
from pjv2.lab import demo, up
from pjv2.lab.demo import NotTrue
from pjv2.qr import draw
from pjv2.testing import SeededEntropy


class Silence:
    """An `Out` that keeps what it is told."""

    json = False

    def __init__(self) -> None:
        self.text: list[str] = []
        self.results: list[tuple[str, dict[str, Any]]] = []

    def say(self, *what: Any) -> None:
        self.text += map(str, what)

    def result(self, event: str, view: Any = None, /, **fields: Any) -> None:
        self.results.append((event, fields))


SHARDS = 4
"""The falsified runs are spread over the test workers."""


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """The names of every fact that the demo shows."""
    return asyncio.run(demo.run(Silence()))


def test_the_demo_shows_both_acts_and_checks_what_it_shows(shown: list[str]) -> None:
    out = Silence()
    assert asyncio.run(demo.run(out)) == shown
    assert len(shown) >= 30
    event, fields = out.results[-1]
    assert event == "DemoDone"
    assert len(fields["channels"]) == 2
    assert sum(channel["capacity"] for channel in fields["channels"]) == demo.PAYMENT
    assert fields["receiver_inputs"] == 1
    assert fields["relay_bytes_with_mailbox_id"] == 0
    assert fields["relay_requests"] > 0
    assert not set(fields["directory_peers"]) & {"127.0.0.10", "127.0.0.11"}


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_falsified_fact_ends_the_demo(shard: int, shown: list[str]) -> None:
    for name in sorted(set(shown))[shard::SHARDS]:
        with pytest.raises(NotTrue, match=f"the demo shows {name} as"):
            asyncio.run(demo.run(Silence(), falsify=name))


def test_the_command_ends_with_one_json_line_and_a_falsified_one_exits_non_zero() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pjv2.cli", "--json", "demo"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["event"] == "DemoDone"
    assert {"txid", "channels", "receiver_inputs", "relay_requests", "directory_peers", "seconds"} <= set(lines[-1])
    assert all({"event", "at"} <= set(line) for line in lines)
    program = (
        "import sys; from pjv2.lab import demo; import functools; demo.run = functools.partial(demo.run, falsify='fees'); "
        "from pjv2.cli import main; sys.exit(main(['demo']))"
    )
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr


def test_the_qr_code_of_a_payment_uri_fits_a_terminal() -> None:
    rng = SeededEntropy(b"qr")
    uri = f"bitcoin:bcrt1q{'w' * 38}?amount=0.01&pjos=0&pj=HTTPS://PAYJO.IN/{rng.token(120).hex().upper()}"
    assert max(map(len, draw(uri).splitlines())) <= 80


async def test_lab_up_prints_a_configuration_that_loads() -> None:
    stop = asyncio.Event()
    out = Silence()
    serving = asyncio.create_task(up.run(out, stop=stop))
    while not out.results:
        await asyncio.wait({serving}, timeout=0.01)
        assert not serving.done() or serving.exception() is None
    event, fields = out.results[0]
    assert event == "LabUp"
    written = fields["config"]
    assert Config.load(written).network == "regtest"
    stop.set()
    await serving
    assert not os.path.exists(written)  # noqa: ASYNC240  nothing else runs in this test


def test_output_is_the_demos_out() -> None:
    out: demo.Out = Output(json=True)
    assert out.json
