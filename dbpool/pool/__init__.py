"""The pool, from the outside inwards:

- `_pool`: `Pool`, what users call, and the two hot halves of a checkout; `_lease` its context
  manager, `_statement` single statements, `_transaction` `run()`, `_options` the keywords.
- `_lending`, `_returning`: the slow sides of a checkout and of a return; `_inspect`: may it be lent?
- `_seam`: `PoolBase`, opening and closing, psycopg_pool's protected members; `_workers` its threads.
- `_maintenance`: what the watchdog does. `_supply`: when to connect and retry, what to evict.
- `_connector`: one attempt to connect, with `_server_defaults` and `_session`.
- `_store`: what the lock protects. In it `_bag` the connections, `_waiting` the waiters,
  `dbpool.breaker` the outage; `_growth` its rules for connecting, `_statistics` its numbers.
- `_notices`: each happening with its log line and its event; `_explain`: the exceptions.
- `_psycopg`, `_pipelining`: psycopg's protected members; `_compatible`: what is needed of both.
- `_fork`: what the pools of a process share. `_outcomes`: may a lost statement have been done?
"""

from dbpool.pool._compatible import insist_on_compatible_versions

insist_on_compatible_versions()  # before anything needs what may be missing

from dbpool.pool._fork import close_all  # noqa: E402
from dbpool.pool._pool import Pool  # noqa: E402

__all__ = ["Pool", "close_all"]
