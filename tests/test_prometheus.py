"""The collector in an application's own registry."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dbpool import Databases, Pool
from dbpool.processes import Processes
from dbpool.prometheus import PoolCollector
from dbpool.settings import Settings
from tests.fake import FakeServer


def test_each_scrape_shows_the_current_numbers(fake: FakeServer) -> None:
    with Databases(
        {"default": Settings(conninfo=fake.conninfo)}, connection_class=fake.connection_class
    ) as databases:
        processes = Processes(databases)
        registry = CollectorRegistry()
        registry.register(PoolCollector(processes.report))
        assert registry.get_sample_value("dbpool_checkouts_total", {"pool_name": "default"}) == 0
        databases.default.fetch_value("select 1")
        databases.default.fetch_value("select 2")
        assert b'dbpool_checkouts_total{pool_name="default"} 2.0' in generate_latest(registry)
        databases.default.fetch_value("select 3")
        assert registry.get_sample_value("dbpool_checkouts_total", {"pool_name": "default"}) == 3
        processes.close()


def test_registering_describes_every_metric_without_a_report() -> None:
    def report() -> dict[str, Any]:
        raise AssertionError("nobody scraped")

    registry = CollectorRegistry(auto_describe=True)
    collector = PoolCollector(report)
    registry.register(collector)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(PoolCollector(report))
    registry.unregister(collector)
    registry.register(collector)


def test_the_described_metrics_are_the_collected_ones() -> None:
    pool: Pool[Any] = Pool("host=127.0.0.1 port=1")
    collector = PoolCollector(
        lambda: {"pools": {"default": pool.stats().to_json()}, "processes": [{"pid": 1, "age": 2}]}
    )
    described = [(family.name, family.type) for family in collector.describe()]
    assert described == [(family.name, family.type) for family in collector.collect()]


@pytest.mark.parametrize("report", [{}, {"pools": {}, "processes": []}, None, "report"])
def test_report_must_be_callable(report: Any) -> None:
    with pytest.raises(TypeError, match="report must be callable"):
        PoolCollector(report)
