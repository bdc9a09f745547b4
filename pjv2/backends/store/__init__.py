"""The durable memory: `sql.SqlStore`, on SQLite by default and on PostgreSQL for several workers.

* `sql` is the store itself: one statement set for both databases.
* `schema` holds the tables, and the migrations that lead to them.
* `databases` holds what the two databases do differently: opening, durability, the writer's lock, the clock, error codes.
* `change` holds what every store, the shipped fake included, demands of its caller.

How a payment could be lost here, and what prevents it: a step taken but forgotten after a power cut (commits reach the disk before
they are answered, and a database that does not promise it is refused); two workers that both take the step (`(session, seq)` is
compare-and-swap, one writer at a time); one coin pledged in two sessions (unique over all sessions, in the event's own transaction).
"""
