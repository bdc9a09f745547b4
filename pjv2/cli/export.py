"""`pjv2 export`: the books."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pjv2.cli.command import Cli


class Format(StrEnum):
    """How the books are written."""

    CSV = "csv"
    JSON = "json"
    BIP329 = "bip329"


async def run(
    cli: Cli,
    format: Annotated[
        Format, typer.Option("--format", help="A table, one JSON document, or labels for other wallets (BIP329).")
    ] = Format.CSV,
    closed: Annotated[bool, typer.Option("--closed", help="Only sessions that have ended.")] = False,
) -> None:
    """Write the accounting: who contributed what, fees, channel capacities; or labels for other wallets."""
    import json

    from pjv2.accounts import accounts, as_csv, as_facts, labels
    from pjv2.cli.sessions import reading

    async with reading(cli.config) as store:
        found = [entry for entry in await accounts(store) if entry.outcome is not None or not closed]
    match format:
        case Format.BIP329 if cli.json:
            for label in labels(found):
                cli.out.result("Label", type=label.type, ref=label.ref, label=label.label)
        case Format.BIP329:
            _lines(cli, [label.line() for label in labels(found)])
        case _ if cli.json:
            for entry in found:
                facts = as_facts(entry)
                cli.out.result("Account", session=facts.pop("session"), **facts)
        case Format.JSON:
            _lines(cli, [json.dumps([as_facts(entry) for entry in found], indent=2)])
        case Format.CSV:
            _lines(cli, as_csv(found).splitlines())


def _lines(cli: Cli, lines: list[str]) -> None:
    if lines:
        cli.out.show("\n".join(lines))
