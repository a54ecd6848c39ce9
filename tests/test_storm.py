"""Many pools after an outage: the simulation of `bench/storm.py`, in small."""

from __future__ import annotations

import random

import pytest

from bench.storm import CONNECTIONS, OUTAGE, PEERS, peak

WORKERS = 500


def reconnects(peer: str) -> list[float]:
    """Return when the pools of all workers connect once the server is back."""
    random.seed(1)
    times = (moment for _ in range(WORKERS) for moment in PEERS[peer]())
    return [moment for moment in times if moment >= OUTAGE]


@pytest.mark.parametrize("peer", PEERS)
def test_every_connection_comes_back(peer: str) -> None:
    assert len(reconnects(peer)) == WORKERS * CONNECTIONS


def test_jitter_keeps_the_peak_ten_times_lower() -> None:
    assert 10 * peak(reconnects("dbpool"), 0.01) <= peak(reconnects("no jitter"), 0.01)


def test_all_are_back_a_second_after_the_server() -> None:
    assert max(reconnects("dbpool")) < OUTAGE + 1.1
    assert max(reconnects("psycopg_pool")) > OUTAGE + 10
