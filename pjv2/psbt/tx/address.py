"""Addresses: the text form of an output script on one network.

It refuses an address of another network, and scripts that have no address.
"""

from __future__ import annotations

from pjv2.errors import BadUri, WrongUsage
from pjv2.psbt.tx.encoding import hash256, library
from pjv2.psbt.tx.script import ScriptKind, is_witness_program, kind_of
from pjv2.units import Network

_BASE58_VERSIONS = {Network.BITCOIN: (0x00, 0x05)}
_BASE58_TEST_VERSIONS = (0x6F, 0xC4)


def address_to_script(address: str, network: Network) -> bytes:
    """The output script of an address on `network`. Raises BadUri when it is no address, or one of another network."""
    lib = library()
    try:
        version, program = lib.decode_segwit(network.hrp, address)
        if version is not None and program is not None:
            return bytes([version + 0x50 if version else 0, len(program)]) + program
        if len(address) > 60:
            raise BadUri(f"{address[:90]!r} is not an address of {network}")
        data = lib.decode_base58(address)
    except lib.faults as exc:
        raise BadUri(f"{address[:90]!r} is not an address of {network}") from exc
    body, checksum = data[:-4], data[-4:]
    pay_to_key, pay_to_script = _BASE58_VERSIONS.get(network, _BASE58_TEST_VERSIONS)
    if len(body) == 21 and hash256(body)[:4] == checksum:
        if body[0] == pay_to_key:
            return b"\x76\xa9\x14" + body[1:] + b"\x88\xac"
        if body[0] == pay_to_script:
            return b"\xa9\x14" + body[1:] + b"\x87"
    raise BadUri(f"{address[:90]!r} is not an address of {network}")


def script_to_address(script: bytes, network: Network) -> str:
    """The address of an output script on `network`. Raises WrongUsage when the script has none."""
    lib = library()
    kind = kind_of(script)
    versions = _BASE58_VERSIONS.get(network, _BASE58_TEST_VERSIONS)
    if kind in (ScriptKind.P2PKH, ScriptKind.P2SH):
        body = bytes([versions[0]]) + script[3:23] if kind is ScriptKind.P2PKH else bytes([versions[1]]) + script[2:22]
        return lib.encode_base58(body + hash256(body)[:4])
    if is_witness_program(script):
        version = script[0] - 0x50 if script[0] else 0
        address = lib.encode_segwit(network.hrp, version, script[2:])
        if address is not None:
            return address
    raise WrongUsage("this output script has no address")
