"""The pool.

Who does what, from the outside inwards:

- `_pool`: `Pool`, what users call, with the two hot halves, acquire and release; `Lease`.
- `_transaction`: `run()`. `_returning`: what is done with a connection that came back unfit.
- `_maintenance`: what the watchdog does. `_supply`: when to connect and retry, what to evict.
- `_connector`: one attempt to connect, with `_server_defaults` and `_session`. `_inspect`: may it
  be lent?
- `_store`: what the lock protects, every step under it. Inside it `_bag`: the connections,
  `_waiting`: the waiters, `dbpool.breaker`, `dbpool.metrics`; read by `_statistics` and `_explain`.
- `_notices`: each happening with its line of the log and its event.
- `_compatible`: what is needed of psycopg and psycopg_pool, checked at import.
- `_seam`: all of psycopg_pool's protected members. `_psycopg` and `_pipelining`: psycopg's.
- `_fork`: what the pools of a process share. `_options`: the keywords. `_outcomes`: may a lost
  statement have been done?
"""

from dbpool.pool._compatible import insist_on_compatible_versions

insist_on_compatible_versions()  # before anything needs what may be missing

from dbpool.pool._fork import close_all  # noqa: E402
from dbpool.pool._pool import Pool  # noqa: E402

__all__ = ["Pool", "close_all"]
