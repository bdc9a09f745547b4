"""Transactions, PSBTs, scripts and addresses as frozen values.

```
encoding (the border to python-bitcointx) -> script -> transaction -> maps -> psbt
                                                   `-> address
```

It refuses what BIP174 calls invalid, PSBT version 2, and amounts outside 0..21e14 sat.

Law: what was parsed comes out again byte for byte in canonical order; nothing is dropped in silence. `encoding` alone knows
python-bitcointx.
"""

from pjv2.psbt.tx.address import address_to_script as address_to_script
from pjv2.psbt.tx.address import script_to_address as script_to_address
from pjv2.psbt.tx.encoding import hash160 as hash160
from pjv2.psbt.tx.encoding import hash256 as hash256
from pjv2.psbt.tx.encoding import varint as varint
from pjv2.psbt.tx.maps import KeyValue as KeyValue
from pjv2.psbt.tx.maps import PsbtInput as PsbtInput
from pjv2.psbt.tx.maps import PsbtOutput as PsbtOutput
from pjv2.psbt.tx.psbt import MAGIC as MAGIC
from pjv2.psbt.tx.psbt import Psbt as Psbt
from pjv2.psbt.tx.psbt import build_psbt as build_psbt
from pjv2.psbt.tx.script import DUST_RATE_SAT_PER_VB as DUST_RATE_SAT_PER_VB
from pjv2.psbt.tx.script import ScriptKind as ScriptKind
from pjv2.psbt.tx.script import dust_limit as dust_limit
from pjv2.psbt.tx.script import is_witness_program as is_witness_program
from pjv2.psbt.tx.script import kind_of as kind_of
from pjv2.psbt.tx.script import output_weight as output_weight
from pjv2.psbt.tx.transaction import Tx as Tx
from pjv2.psbt.tx.transaction import TxIn as TxIn
from pjv2.psbt.tx.transaction import TxOut as TxOut
from pjv2.psbt.tx.transaction import input_weight_of as input_weight_of
from pjv2.psbt.tx.transaction import witness_stack as witness_stack

SIGHASH_DEFAULT = 0x00
SIGHASH_ALL = 0x01
