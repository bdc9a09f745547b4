"""The real programs as fixtures. A test that asks for one whose program is missing is skipped by name, or fails with
PJV2_PEERS=required; one that fails shows what the programs printed, and their logs stay in pytest's directory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.peers.desk import Post
from tests.peers.peers import need
from tests.peers.programs import (
    RUNNING,
    Bitcoind,
    Certificates,
    NodeWallet,
    PayjoinCli,
    bitcoind,
    certificates,
    forget_ended,
    mailroom,
)


def pytest_runtest_setup() -> None:
    forget_ended()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"{program.name}, whole in {program.log}", program.tail()) for program in RUNNING]
    return report


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bitcoind]:
    with bitcoind(need("bitcoind"), tmp_path_factory.mktemp("bitcoind")) as node:
        yield node


def _post(directory: Path, tls: Certificates | None) -> Iterator[Post]:
    program = need("payjoin-mailroom" if tls is None else "payjoin-mailroom-tls")
    with ExitStack() as stack:
        rooms = {
            name: stack.enter_context(mailroom(program, directory / name, name=name, tls=tls))
            for name in ("directory", "relay")
        }
        yield Post(**rooms, tls=tls)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    """Directory and relay over plain HTTP."""
    yield from _post(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, certs: Certificates) -> Iterator[Post]:
    """Directory and relay over TLS, with a root that only they and their clients trust."""
    yield from _post(tmp_path_factory.mktemp("secure"), certs)


@pytest.fixture
def person(tmp_path: Path) -> Callable[[str, NodeWallet, Post], PayjoinCli]:
    """A person with payjoin-cli: `person("alice", wallet, secure)`. Without TLS the keys come in a file, as they have to."""
    program = need("payjoin-cli")

    def make(name: str, wallet: NodeWallet, post: Post) -> PayjoinCli:
        return PayjoinCli(
            program,
            tmp_path / name,
            wallet,
            relays=[post.relay],
            directories=[post.directory],
            tls=post.tls,
            keys=None if post.tls else post.directory.keys_file(),
        )

    return make
