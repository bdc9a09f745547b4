"""Guards taken away one at a time: for each the suite must go red. `python -m tests.mutants` runs them all; see README.md."""
