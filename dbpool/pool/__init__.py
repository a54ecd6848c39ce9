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

What happens where:

- A checkout: `Lease.__enter__`, `Pool._acquire`. If no connection is idle, or if it needs more than
  a look: `_lending.acquire`, `_lending._wait`, `Store.join`, `Waiter.wait`.
- A return: `Lease.__exit__`, `Pool._release`, and for a waiter `WaitQueue.serve`. If the connection
  is not as it was set up: `_returning.take_back`, `_returning.finish`.
- A connect: `Store._refill`, `Breaker.reserve`; in a worker `Maintenance.connect`,
  `Connector.connect`, `Store.connected`.
- An outage: `Store.failed`, `Breaker.failed`, `Breaker.trip_if_due`, `WaitQueue.reject_all`,
  `Notices.down`. Its end: `Breaker.succeeded`, `Notices.back`.
- An exception at any of these points: `Pool._recover`, `Store.recover`; at the latest `Store.heal`,
  which the watchdog calls by `Maintenance.run`.
"""

from dbpool.pool._compatible import insist_on_compatible_versions

insist_on_compatible_versions()  # before anything needs what may be missing

from dbpool.pool._fork import close_all  # noqa: E402
from dbpool.pool._pool import Pool  # noqa: E402

__all__ = ["Pool", "close_all"]
