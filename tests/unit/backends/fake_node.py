"""A JSON-RPC server on loopback that says what a test wants of it, bad HTTP included. Not a bitcoind."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pjv2.backends.bitcoind_rpc import BitcoindRpc, Login, password_login
from pjv2.units import Network

GENESIS = Network.REGTEST.genesis_hash


@dataclass(frozen=True)
class Http:
    """A whole response instead of JSON-RPC answers."""

    status: int
    body: bytes = b""
    headers: str = ""


@dataclass(frozen=True)
class Error:
    code: int
    message: str = "no"


CUT, SILENCE = object(), object()
"""The connection ends before an answer; no answer ever comes."""


@dataclass
class FakeNode:
    """`results` by method (a value, an `Error`, or a function of the parameters); `next` is used up first, a request each."""

    results: dict[str, Any] = field(default_factory=dict)
    next: list[Any] = field(default_factory=list)
    requests: list[list[dict[str, Any]]] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    accepts: Callable[[str], bool] = lambda login: True
    connections: int = 0
    serving: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    def __post_init__(self) -> None:
        self.results = {
            "getblockhash": lambda params: GENESIS if params[0] == 0 else Error(-8, "Block height out of range"),
            "getnetworkinfo": {"version": 290100},
            "getindexinfo": {},
        } | self.results

    def rpc(self, wallet: str | None = None, *, login: Login | None = None, **more: Any) -> BitcoindRpc:
        path = f"/wallet/{wallet}" if wallet is not None else ""
        more = {"network": Network.REGTEST, "timeout": 5.0} | more
        return BitcoindRpc(
            f"http://127.0.0.1:{self.port}{path}", login or password_login("u", lambda: "hush-hush"), **more
        )

    @property
    def methods(self) -> list[list[str]]:
        return [[call["method"] for call in request] for request in self.requests]

    def answer(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = []
        for call in calls:
            found = self.results.get(call["method"], Error(-32601, "Method not found"))
            told = found(call["params"]) if callable(found) else found
            one = {"jsonrpc": "2.0", "id": call["id"]}
            if isinstance(told, Error):
                answers.append(one | {"error": {"code": told.code, "message": told.message}})
            else:
                answers.append(one | {"result": told})
        return answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.serving[task] = writer
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = await reader.readexactly(int(fields["content-length"]))
                authorization = next(line for line in head.split("\r\n") if line.lower().startswith("authorization"))
                login = base64.b64decode(authorization.rpartition(" ")[2]).decode()
                self.logins.append(login)
                self.paths.append(head.split(" ")[1])
                calls = json.loads(body)
                self.requests.append(calls)
                self.asked.set()
                told = self.next.pop(0) if self.next else None
                if told is CUT:
                    return
                if told is SILENCE:
                    await reader.read()
                    return
                if not self.accepts(login):
                    told = Http(401)
                if told is None:
                    told = self.answer(calls)
                elif isinstance(told, Error):
                    told = [
                        {"jsonrpc": "2.0", "id": call["id"], "error": {"code": told.code, "message": told.message}}
                        for call in calls
                    ]
                if not isinstance(told, Http):
                    told = Http(200, json.dumps(told).encode())
                writer.write(
                    f"HTTP/1.1 {told.status} X\r\nContent-Length: {len(told.body)}\r\n{told.headers}\r\n".encode()
                    + told.body
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            del self.serving[task]


@asynccontextmanager
async def fake_node(**more: Any) -> AsyncIterator[FakeNode]:
    node = FakeNode(**more)
    server = await asyncio.start_server(node.serve, "127.0.0.1", 0)
    node.port = server.sockets[0].getsockname()[1]
    try:
        yield node
    finally:
        server.close()
        serving = dict(node.serving)
        for writer in serving.values():
            writer.close()
        await asyncio.gather(*serving)
