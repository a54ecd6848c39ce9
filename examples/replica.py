"""Two databases, one for writes and one for reads:

DATABASE_URL=postgresql://…/app DBPOOL_DATABASES=replica \
DBPOOL_REPLICA_URL='postgresql://…/app?target_session_attrs=prefer-standby' python examples/replica.py
"""

import dbpool

with dbpool.Databases.from_env() as databases:
    databases.default.execute("create table if not exists visits (path text)")
    databases.default.execute("insert into visits values (%s)", ["/"])

    # A replica is behind by its replication lag: what was just written may not be there yet.
    standby = databases["replica"].fetch_value("select pg_is_in_recovery()")
    print("reading from", "a standby" if standby else "the primary")

    for name, pool in databases.items():
        print(name, pool.state)
