"""A whole Bitcoin and payjoin world on loopback, for the demo, the tutorial and the tests. Its coins are worth nothing."""
