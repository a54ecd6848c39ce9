"""A listener, called for each event: DATABASE_URL=postgresql://… python examples/listener.py"""

import dbpool
from dbpool import events


class Connections(events.Listener):
    """Prints what happens to connections; each method is named after its event."""

    def connected(self, event: events.Connected) -> None:
        print(f"{event.pool}: connected in {event.seconds * 1000:.0f} ms")

    def circuit_opened(self, event: events.CircuitOpened) -> None:
        print(f"{event.pool}: the database is unavailable ({event.kind}): {event.error}")

    def closed(self, event: events.Closed) -> None:
        print(f"{event.pool}: closed")


with dbpool.Pool(listeners=[Connections()]) as pool:  # called in a separate thread
    pool.fetch_value("select 1")
