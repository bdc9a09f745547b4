"""Lightning nodes that open channels with the money of an incoming payjoin.

How money can be lost here. The payment's transaction T pays a 2-of-2 script that we share with a peer. Whoever can broadcast
T (the payer, from the moment the proposal is posted) decides when the money goes into that script; what brings it back is
the peer's signature over our commitment transaction, and it is good for exactly one outpoint. So the money is gone, or at
the mercy of the peer,

1. when T is posted before the peer's signature for it is on our disk ("secured"): an answer "verified" is not that point;
2. when T confirms under another txid than the one that was signed for: a legacy or nested-segwit input does that, and so does
   a payer who re-makes T, which he can as long as no input of ours is in it;
3. when the channel was abandoned and T confirms all the same: our node has forgotten its commitment;
4. when a channel becomes pending after we looked and found none: cancelling does not stop a verify in flight, and a verify that
   answered an error can still succeed. Cancel, cut the peer off, wait until it left, and only then list.

What does not lose money but binds a peer: a channel that the peer stored and we did not, or that we abandoned, holds the peer's
only slot for 2,016 blocks.

Law: a back end reports what its node says, in the node's words; it never judges that a channel is safe. `secure` answers only
when the commitment signature is on disk for exactly the outpoint that was asked for.
"""
