"""Taking a connection and giving it back, nothing in between, in one thread."""

from __future__ import annotations

from bench._measure import against, interleaved, one_cpu
from bench._peers import ALL_PEERS, PsycopgPool
from bench._report import Table
from tests.postgres import served


def run(quick: bool) -> Table:
    """Measure every peer's own way of lending a connection."""
    times, rounds = (50, 20) if quick else (100, 400)
    table = Table("checkout", "Checkout and return", [cls.name for cls in ALL_PEERS])
    with served() as server:
        peers = {cls.name: cls(server.conninfo, 4) for cls in ALL_PEERS}
        with one_cpu():
            figures = interleaved(
                {name: peer.checkout for name, peer in peers.items()}, times, rounds
            )
        for name, cell in against(figures, PsycopgPool.name).items():
            table.put("checkout and return", name, cell)
        for peer in peers.values():
            peer.close()
    return table
