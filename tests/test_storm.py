"""Many pools after an outage: a small run of the simulation in `bench/storm.py`."""

from __future__ import annotations

import math
import random

import pytest

from bench.storm import CONNECTIONS, NOTICE_SECONDS, OUTAGE, PEERS, peak

WORKERS = 500
MOST_WORKERS = 10_000


def connects(peer: str, workers: int) -> list[float]:
    """Return the times at which the pools of all workers connect."""
    random.seed(1)
    return [moment for _ in range(workers) for moment in PEERS[peer]()]


def reconnects(peer: str) -> list[float]:
    """Return the times at which some workers' pools connect after the server is back."""
    return [moment for moment in connects(peer, WORKERS) if moment >= OUTAGE]


@pytest.mark.parametrize("peer", PEERS)
def test_every_connection_comes_back(peer: str) -> None:
    assert len(reconnects(peer)) == WORKERS * CONNECTIONS


def test_jitter_keeps_the_peak_ten_times_lower() -> None:
    jittered, lockstep = (
        connects("dbpool", MOST_WORKERS),
        connects("no jitter", MOST_WORKERS // 100),
    )
    for since, until in ((2 * NOTICE_SECONDS, OUTAGE), (OUTAGE, math.inf)):  # during and after it
        peaks = [
            peak([t for t in times if since < t < until], 0.01) for times in (jittered, lockstep)
        ]
        assert 10 * peaks[0] <= 100 * peaks[1], "pools without jitter connect at the same times"


def test_all_pools_are_back_a_second_after_the_server() -> None:
    assert max(reconnects("dbpool")) < OUTAGE + 1.1
    assert max(reconnects("psycopg_pool")) > OUTAGE + 10
