"""What a payjoin means in Bitcoin: the receiver's checks, the plan, the proposal, the sender's checks; pure.

It refuses to fetch anything: whoever calls brings the facts of wallet and chain, the time and the randomness.

Law: a check returns a stronger type or raises; it never returns a bool.
"""
