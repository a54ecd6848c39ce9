"""Steps as fixed binary rows with a checksum, and the layout of a file of them. No I/O here.

A file has a header of `HEADER` bytes and then a ring of rows for each pool. A row is at the place
that its step's number gives, so that a write is one row, and a row that is damaged or old is a gap.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final
from zlib import crc32

from dbpool.diagnosis.history import STEPS, TIMES, Buckets, History, Step

__all__ = ["HEADER", "LARGEST", "ROW", "capacity", "decode", "encode", "header", "place"]

_MAGIC: Final = b"DBPH\x01"
HEADER: Final = 1024
LARGEST: Final = 48 * 1024  # bytes of a file
_POOLS: Final = 16
_NAME: Final = 40  # characters of a pool's name
# Counts of a bucket are kept in 16 bits beside a shift, as a percentile needs no more.
_FIELDS: Final = (
    ("in_use", "f"), ("size", "f"), ("checkouts", "I"), ("refused", "I"),
    ("settled_checkouts", "I"), ("waiting", "H"), ("connects", "H"), ("connect_failures", "H"),
    ("retries", "H"), ("forgotten", "H"), ("settled_connects", "H"),
)  # fmt: skip
_LIMITS: Final = {"I": (1 << 32) - 1, "H": (1 << 16) - 1, "f": 1e9}
_STEP: Final = struct.Struct("<I" + "".join(code for _, code in _FIELDS) + "fB12H" * len(TIMES))
_CHECK: Final = struct.Struct("<I")
ROW: Final = _STEP.size + _CHECK.size


def capacity(pools: int) -> int:
    """Return how many steps of each pool a file keeps: a quarter of an hour, of many pools less."""
    return min(STEPS, (LARGEST - HEADER) // ROW // max(1, pools))


def place(pool: int, pools: int, slot: int) -> int:
    """Return where in the file the row of a step is."""
    rows = capacity(pools)
    return HEADER + (pool * rows + slot % rows) * ROW


def header(names: Sequence[str], **more: Any) -> bytes:
    """Return a file's header: the pools' names, 16 at most, and *more* as JSON."""
    shown = [name[:_NAME] for name in names[:_POOLS]]
    body = json.dumps({"pools": shown, **more}).encode()[: HEADER - len(_MAGIC) - _CHECK.size]
    return (_MAGIC + _CHECK.pack(crc32(body)) + body).ljust(HEADER, b"\0")


def encode(slot: int, step: Step) -> bytes:
    """Return a step's row; what is too large for its field is as large as fits."""
    values: list[Any] = [min(max(slot, 0), _LIMITS["I"])]
    for name, code in _FIELDS:
        value = min(max(getattr(step, name), 0), _LIMITS[code])
        values.append(value if code == "f" else int(value))
    for name in TIMES:
        values += _packed(getattr(step, name))
    row = _STEP.pack(*values)
    return row + _CHECK.pack(crc32(row))


def _packed(buckets: Buckets) -> list[Any]:
    shift = max(0, max(buckets.counts).bit_length() - 16)
    return [
        min(buckets.seconds, _LIMITS["f"]),
        min(shift, 255),
        *(n >> shift for n in buckets.counts),
    ]


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, History]]:
    """Return a file's header and histories, by pool; raise `ValueError` if it is no such file."""
    known = _read_header(data[:HEADER])
    names = known["pools"]
    pools = {name: History(dict(_rows(data, n, len(names)))) for n, name in enumerate(names)}
    return known, pools


def _read_header(data: bytes) -> dict[str, Any]:
    body = data[len(_MAGIC) + _CHECK.size :].rstrip(b"\0")
    check = data[len(_MAGIC) : len(_MAGIC) + _CHECK.size]
    if not data.startswith(_MAGIC) or check != _CHECK.pack(crc32(body)):
        raise ValueError("this is no history")
    found: Any = json.loads(body)
    names = found.get("pools") if isinstance(found, dict) else None
    if (
        not isinstance(names, list)
        or len(names) > _POOLS
        or not all(isinstance(n, str) for n in names)
    ):
        raise ValueError("this is no history")
    known: dict[str, Any] = found
    return known


def _rows(data: bytes, pool: int, pools: int) -> Iterator[tuple[int, Step]]:
    begin = place(pool, pools, 0)
    for at in range(begin, begin + capacity(pools) * ROW, ROW):
        row, check = data[at : at + _STEP.size], data[at + _STEP.size : at + ROW]
        if len(check) == _CHECK.size and check == _CHECK.pack(crc32(row)):
            slot, step = _unpacked(row)
            if place(pool, pools, slot) == at:
                yield slot, step


def _unpacked(row: bytes) -> tuple[int, Step]:
    slot, *values = _STEP.unpack(row)
    fields = {name: value for (name, _), value in zip(_FIELDS, values, strict=False)}
    for n, name in enumerate(TIMES):
        seconds, shift, *counts = values[len(_FIELDS) + 14 * n : len(_FIELDS) + 14 * (n + 1)]
        fields[name] = Buckets(tuple(count << shift for count in counts), seconds)
    return slot, Step(**fields)
