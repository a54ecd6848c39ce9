"""The pool, from the outside inwards:

- `_pool`: `Pool`, what users call, and the two hot halves of a checkout; `_options` its keywords.
- `_lending`: the lease, single statements, and the slow side of a checkout: wait, check, evict.
  `_returning`: a connection that did not come back as it was set up. `_transaction`: `run()`.
- `_seam`: `PoolBase`, opening and closing, psycopg_pool's protected members.
- `_maintenance`: what a pool's own threads do: workers connect and retry, the watchdog heals.
- `_connector`: one attempt to connect, with the server's default timeouts; `_session`: its reset.
- `_store`: what the lock protects, and what is decided under it. In it `_bag` the connections,
  `_waiting` the callers who wait, `dbpool.breaker` the outage, `dbpool.metrics` the numbers.
- `_notices`: each happening with its log line and its event.
- `_psycopg`, `_pipelining`: psycopg's protected members; `_compatible`: what is needed of both.
- `_fork`: what the pools of a process share: the watchdog, and surviving a fork.
"""

from dbpool.pool._compatible import insist_on_compatible_versions

insist_on_compatible_versions()  # before anything needs what may be missing

from dbpool.pool._fork import close_all  # noqa: E402
from dbpool.pool._pool import Pool  # noqa: E402

__all__ = ["Pool", "close_all"]
