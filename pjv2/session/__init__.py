"""What has happened in a payjoin, and what follows: receiver and sender as event logs, without any I/O.

```
evolve(state, event) -> state              the only way a state changes; live use and replay share it
decide(state, input, now, rng, memory)     the events that follow from an answer, a command, or time
needs(state, now, memory)                  what the session wants from the world
```

It refuses to know a socket, a clock, a database or a logger: time, randomness and the world are arguments.

Law: record, then act. The tables `TRANSITIONS` are the whole of what can happen; an event that is not listed is an error and changes
nothing. `events`, `needs` and `facts` are the room's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from pjv2.session import receive, send
from pjv2.session.create import create_receiver as create_receiver
from pjv2.session.create import create_sender as create_sender
from pjv2.session.create import new_session_id as new_session_id
from pjv2.session.create import payment_uri as payment_uri
from pjv2.session.effects import Effects as Effects
from pjv2.session.effects import RowFacts as RowFacts
from pjv2.session.effects import effects as effects
from pjv2.session.effects import needs as needs
from pjv2.session.effects import row_facts as row_facts
from pjv2.session.events import Event
from pjv2.session.log import State as State
from pjv2.session.log import decode as decode
from pjv2.session.log import encode as encode
from pjv2.session.log import event_name as event_name
from pjv2.session.log import evolve as evolve
from pjv2.session.log import replay as replay
from pjv2.session.needs import Input as Input
from pjv2.session.needs import Memory as Memory
from pjv2.session.needs import Needs as Needs
from pjv2.session.public import diagram as diagram
from pjv2.session.public import explain as explain
from pjv2.session.public import public_event as public_event
from pjv2.session.public import public_session as public_session
from pjv2.session.public import status as status
from pjv2.session.receive import Receiver as Receiver
from pjv2.session.receive import Stage as ReceiverStage
from pjv2.session.send import Sender as Sender
from pjv2.session.send import Stage as SenderStage
from pjv2.units import Entropy, Instant

Stage: TypeAlias = ReceiverStage | SenderStage

TRANSITIONS: Final[
    Mapping[
        str,
        Mapping[tuple[ReceiverStage, type[Event]], tuple[ReceiverStage, ...]]
        | Mapping[tuple[SenderStage, type[Event]], tuple[SenderStage, ...]],
    ]
] = {"receiver": receive.TRANSITIONS, "sender": send.TRANSITIONS}
"""Both roles' tables: session-model.md 2.2 and 5. Keyed by role first, for some states of the two share a name."""


def decide(state: State, input: Input, now: Instant, rng: Entropy, memory: Memory) -> list[Event]:
    """The events that follow from one input; [] when nothing does, for an answer that no longer fits too.

    Raises WrongUsage for a command that cannot be followed, and NotNow where the wallet's answer means "later".
    """
    if isinstance(state, Receiver):
        return receive.decide(state, input, now, rng, memory)
    return send.decide(state, input, now, rng, memory)


def is_closed(state: State) -> bool:
    """The session has ended; a receiver's address is watched for a while yet."""
    return state.closed is not None
