"""A transaction that is repeated where that is safe: DATABASE_URL=… python examples/transfer.py"""

from typing import Any

from psycopg import Connection, IsolationLevel

import dbpool


def transfer(conn: Connection[Any], key: str, source: int, target: int, amount: int) -> bool:
    """Move money once for each *key*. Do nothing else here: this may run more than once."""
    done = conn.execute("insert into transfers values (%s) on conflict do nothing", [key])
    if done.rowcount == 0:
        return False
    conn.execute("update accounts set balance = balance - %s where id = %s", [amount, source])
    conn.execute("update accounts set balance = balance + %s where id = %s", [amount, target])
    return True


with dbpool.Pool() as pool:
    pool.execute("create table if not exists accounts (id int primary key, balance int)")
    pool.execute("create table if not exists transfers (key text primary key)")
    pool.execute("insert into accounts values (1, 100), (2, 0) on conflict do nothing")
    for _ in range(2):
        # Safe to repeat even if the answer to COMMIT is lost: the key makes it idempotent.
        moved = pool.run(
            transfer, "order-17", 1, 2, 30, idempotent=True, isolation=IsolationLevel.SERIALIZABLE
        )
        print("moved" if moved else "already done")
    print(pool.fetch_all("select id, balance from accounts order by id"))
