"""Steps as fixed binary rows with a checksum, and the layout of a file of them. No I/O here.

A file has a header of `HEADER` bytes and then a ring of rows for each pool. A row is at the place
that its step's number gives, so that a write is one row, and a row that is damaged or old is a gap.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from zlib import crc32

from dbpool.diagnosis.history import STEPS, TIMES, Buckets, History, Step

__all__ = ["HEADER", "LARGEST", "ROW", "Layout", "decode", "encode", "header", "known_names"]

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


@dataclass(frozen=True)
class Layout:
    """Where a file keeps *rows* steps of each of *pools* pools, fewer if they would not fit."""

    pools: int
    rows: int

    @property
    def ring(self) -> int:
        """How many steps of each pool fit."""
        return max(1, min(self.rows, STEPS, (LARGEST - HEADER) // ROW // max(1, self.pools)))

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return HEADER + self.pools * self.ring * ROW

    def place(self, pool: int, slot: int) -> int:
        """Return where the row of a step is."""
        return HEADER + (pool * self.ring + slot % self.ring) * ROW


def header(names: Sequence[str], rows: int, **more: Any) -> bytes:
    """Return a file's header: the pools' names as `known_names` cuts them, and *more* as JSON."""
    body = json.dumps({"pools": known_names(names), "rows": rows, **more}).encode()
    body = body[: HEADER - len(_MAGIC) - _CHECK.size]
    return (_MAGIC + _CHECK.pack(crc32(body)) + body).ljust(HEADER, b"\0")


def known_names(names: Sequence[str]) -> list[str]:
    """Return the names as a file knows them: 16 at most, cut to 40 characters, each once."""
    return list(dict.fromkeys(name[:_NAME] for name in names))[:_POOLS]


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
    layout = Layout(len(names), known["rows"])
    return known, {name: History(dict(_rows(data, n, layout))) for n, name in enumerate(names)}


def _read_header(data: bytes) -> dict[str, Any]:
    body = data[len(_MAGIC) + _CHECK.size :].rstrip(b"\0")
    check = data[len(_MAGIC) : len(_MAGIC) + _CHECK.size]
    if not data.startswith(_MAGIC) or check != _CHECK.pack(crc32(body)):
        raise ValueError("this is not a history")
    known: dict[str, Any] = json.loads(body)  # it is as it was written
    return known


def _rows(data: bytes, pool: int, layout: Layout) -> Iterator[tuple[int, Step]]:
    begin = layout.place(pool, 0)
    for n in range(layout.ring):
        found = _read_row(data[begin + n * ROW : begin + (n + 1) * ROW])
        if found is not None and found[0] % layout.ring == n:
            yield found


@lru_cache(maxsize=1024)  # most rows are read again unchanged
def _read_row(row: bytes) -> tuple[int, Step] | None:
    """Return a step and its number, None if the row is damaged."""
    if len(row) < ROW or row[_STEP.size :] != _CHECK.pack(crc32(row[: _STEP.size])):
        return None
    slot, *values = _STEP.unpack_from(row)
    fields = {name: value for (name, _), value in zip(_FIELDS, values, strict=False)}
    for n, name in enumerate(TIMES):
        seconds, shift, *counts = values[len(_FIELDS) + 14 * n : len(_FIELDS) + 14 * (n + 1)]
        fields[name] = Buckets(tuple(count << shift for count in counts), seconds)
    return slot, Step(**fields)
