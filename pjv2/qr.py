"""QR codes of payment URIs: in characters, two modules a line by half blocks, and as a picture in a file.

It refuses nothing: a text too wide for a terminal is the caller's to keep off it (`draw` is as wide as its lines are long).

Law: the quiet zone is part of the code; without it cameras guess.
"""

from __future__ import annotations

from pathlib import Path

import segno

_BLOCKS = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}


def draw(text: str) -> str:
    """The QR code of `text` for a dark terminal, quiet zone included; one character is one module wide."""
    code = segno.make(text, error="l", boost_error=False, micro=False)
    rows = [tuple(row) for row in code.matrix_iter(border=2)]
    if len(rows) % 2:
        rows.append((0,) * len(rows[0]))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return "\n".join("".join(_BLOCKS[bool(up), bool(down)] for up, down in zip(a, b, strict=True)) for a, b in pairs)


def save_png(text: str, path: Path) -> None:
    """The QR code of `text` as a PNG picture, 8 pixels a module. Raises OSError when the file cannot be written."""
    segno.make(text, error="m", micro=False).save(str(path), kind="png", scale=8, border=4)
