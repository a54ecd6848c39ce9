"""A report as text for a terminal: what is wrong first, then each pool, then what happened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from textwrap import wrap
from typing import Any, Final

from dbpool.cli._output import line
from dbpool.diagnosis._finding import count, duration
from dbpool.diagnosis._scene import PoolScene, Scene, mapping, number, rows, text

_BARS: Final = " ▁▂▃▄▅▆▇█"
_STRIPS: Final = ("in_use", "waiting", "wait_p95", "refused")
_HOLDERS: Final = 8
_LINES: Final = 10
_ENDPOINTS: Final = 5
_WORKERS: Final = 16


def as_text(report: Mapping[str, Any], width: int = 100) -> str:
    """Return a report as `/stats` shows it on lines of at most *width* characters."""
    scene = Scene.read(report)
    lines = [
        each
        for finding in rows(report.get("findings"))
        for each in _finding(finding, scene.now, width)
    ]
    lines.append("")
    history = mapping(report.get("history"))
    for pool in scene.pools:
        lines += _pool(pool, mapping(mapping(history.get("pools")).get(pool.name)), width)
        lines += _server(mapping(mapping(report.get("servers")).get(pool.name)))
        lines += _minute(mapping(mapping(history.get("minute")).get(pool.name)))
        lines += _endpoints(rows(mapping(report.get("endpoints")).get(pool.name)))
        lines += _workers(rows(mapping(report.get("workers")).get(pool.name)))
        lines.append("")
    lines.append(
        f"{count(len(scene.processes), 'process', 'processes')}"
        + "".join(f"  {each.pid} ({duration(each.age)} ago)" for each in scene.processes)
    )
    lines += _journal(rows(report.get("journal")))
    return "\n".join(_cut(each, width) for each in lines)


def _finding(finding: Mapping[str, Any], now: float, width: int) -> Iterator[str]:
    severity, code = text(finding.get("severity")) or "?", text(finding.get("code")) or "?"
    lasted = (
        "" if severity == "ok" else f" for {duration(max(0.0, now - number(finding.get('since'))))}"
    )
    yield from wrap(
        f"{severity.upper()} {code}{lasted}: {line(finding.get('text'))}",
        width,
        subsequent_indent="  ",
    )
    yield from wrap(line(finding.get("do")), width, initial_indent="    ", subsequent_indent="    ")


def _pool(pool: PoolScene, series: Mapping[str, Any], width: int) -> Iterator[str]:
    is_full = pool.state == "up" and pool.waiting and pool.active >= pool.max_size
    yield (
        f"{pool.name}: {'full' if is_full else pool.state or 'no process'},"
        f" {pool.active} of {pool.max_size} in use, {pool.idle} idle, {pool.waiting} waiting"
    )
    if error := text(pool.breaker.get("last_error")):
        yield f"    {error}"
    for name in _STRIPS:
        values = series.get(name)
        if isinstance(values, list) and any(number(value) for value in values):
            most = max(number(value) for value in values)
            top = duration(most) if name == "wait_p95" else f"{most:g}"
            yield f"    {name.replace('_', ' '):<9} {_strip(values, most, width - 40)}  peak {top}"
    for holder in pool.holders[:_HOLDERS]:
        status = "" if holder.status == "unknown" else f"  {holder.status}"
        yield f"    {duration(holder.seconds):>7}  {holder.place}{status}  {holder.thread or ''}"
    if len(pool.holders) > _HOLDERS:
        yield f"    and {len(pool.holders) - _HOLDERS} more"


def _server(server: Mapping[str, Any]) -> Iterator[str]:
    if server:
        lag = server.get("lag")
        yield (
            f"    server     PostgreSQL {text(server.get('version')) or '?'}"
            f" {text(server.get('role')) or ''}, {number(server.get('used')):g} of"
            f" {number(server.get('max')):g} connections used, {number(server.get('ours')):g} ours,"
            f" latency {number(server.get('latency')) * 1000:.1f} ms"
            + ("" if lag is None else f", lag {duration(number(lag))}")
            + (", TLS" if server.get("tls") is True else "")
        )


def _minute(minute: Mapping[str, Any]) -> Iterator[str]:
    """Yield the percentiles of the last minute, except of times without a value."""
    times = {name: mapping(minute.get(name)) for name in ("wait", "use", "connect")}
    said = [
        f"{name} p95 {duration(number(each.get('p95')))}"
        for name, each in times.items()
        if number(each.get("count"))
    ]
    if said:
        yield f"    last minute  {', '.join(said)}"


def _endpoints(used: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in used[:_ENDPOINTS]:
        more = "".join(
            f", {number(each.get(key)):g} {key.replace('_', ' ')}"
            for key in ("gave_up", "forgotten")
            if number(each.get(key))
        )
        p95 = (
            "" if each.get("use_p95") is None else f", use p95 {duration(number(each['use_p95']))}"
        )
        yield (
            f"    {number(each.get('in_use')):>7.1f}  {text(each.get('endpoint')) or '?'}:"
            f" {number(each.get('checkouts')):g} checkouts{p95},"
            f" longest {duration(number(each.get('longest')))}{more}"
        )


def _workers(workers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in workers[:_WORKERS]:
        yield (
            f"    worker {number(each.get('pid')):.0f}  {number(each.get('in_use')):g} of"
            f" {number(each.get('max_size')):g} in use, {number(each.get('waiting')):g} waiting,"
            f" {number(each.get('checkouts')):.0f} checkouts, {number(each.get('refused')):.0f} refused"
        )
    if len(workers) > _WORKERS:
        yield f"    and {count(len(workers) - _WORKERS, 'other worker')}"


def _strip(values: Sequence[object], most: float, width: int) -> str:
    """Return the last values as bars; a dot stands for a step without a known value."""
    return "".join(
        "·" if value is None else _BARS[ceil(8 * number(value) / most)]
        for value in values[-max(10, min(width, 90)) :]
    )


def _journal(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if lines:
        yield ""
    for each in lines[:_LINES]:
        at = time.strftime("%H:%M:%S", time.localtime(number(each.get("time"))))
        yield f"{at}  {text(each.get('pool')) or '-'}  {line(each.get('text'))}"


def _cut(words: str, width: int) -> str:
    return words if len(words) <= width else f"{words[: width - 1]}…"
