"""A pool in a script: DATABASE_URL=postgresql://… python examples/script.py"""

import dbpool

with dbpool.Pool() as pool:
    with pool.connection() as conn:  # commits at the end, or rolls back on an exception
        conn.execute("create temporary table greeting (words text)")
        conn.execute("insert into greeting values (%s)", ["hello"])
        print(conn.execute("select words from greeting").fetchone())

    print(pool.fetch_value("select 6 * 7"))  # one statement, one round trip
    print(pool.stats().counters.checkouts, "checkouts")
