"""A finding: what is wrong, since when, and what to do; their codes, their order, their words."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from dbpool._secrets import mask

CODES: Final[Mapping[str, str]] = MappingProxyType({
    "DB00": "the pool is not the cause",
    "DB01": "the database is down",
    "DB02": "the connection settings are wrong",
    "DB03": "the server has no free connection slot",
    "DB04": "connections wait for a lock",
    "DB05": "connections are idle in a transaction",
    "DB06": "connections were forgotten",
    "DB07": "slow statements hold the pool",
    "DB08": "the pool is too small",
    "DB09": "checkouts are nested",
    "DB10": "connections are replaced too often",
    "DB11": "more connections are configured than the server allows",
    "DB12": "a worker is silent",
    "DB13": "the replica lags, or its role changed",
    "DB14": "many transactions conflict",
    "DB15": "the application holds connections without using them",
    "DB16": "workers keep dying",
    "DB17": "a connection limit is reached",
    "DB18": "the database is slower than usual",
})  # fmt: skip


class Severity(StrEnum):
    """How bad a finding is; `critical` alone is worth waking somebody up."""

    OK = "ok"
    NOTICE = "notice"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """The higher, the worse."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `since` is Unix time; `pool` is None if it concerns a whole host.

    `text` says what is wrong, with the current numbers, and `do` what to do about it. `evidence` is
    plain JSON; an unknown value is None. If a pool has several findings with the same code,
    `subject` tells them apart.
    """

    code: str
    severity: Severity
    text: str
    do: str
    since: float
    pool: str | None = None
    subject: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict, hash=False)
    brief: str = ""  # what errors and logs say in place of the text
    is_minor: bool = False  # whether it is too little to explain that callers wait

    @property
    def id(self) -> str:
        """The same for as long as the same thing is wrong: `DB04/default`."""
        return "/".join(filter(None, (self.code, self.pool, self.subject)))

    @property
    def title(self) -> str:
        """What the code means, without numbers."""
        return CODES[self.code]

    def to_json(self) -> dict[str, Any]:
        """Return it as `/stats` shows it, without a secret and on one line each."""
        return {
            "id": mask(self.id),
            "code": self.code,
            "severity": str(self.severity),
            "pool": None if self.pool is None else mask(self.pool),
            "since": round(self.since, 3),
            "text": mask(self.text),
            "do": mask(self.do),
            "evidence": _masked(dict(self.evidence)),
        }


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the worst first, of equally bad ones the one that has lasted longest.

    Of several with one id, as of pools whose names look alike once printed, the first.
    """
    ranked = sorted(findings, key=lambda f: (-f.severity.rank, f.since, f.code, f.id))
    unique: dict[str, Finding] = {}
    for finding in ranked:
        unique.setdefault(finding.id, finding)
    return tuple(unique.values())


def suspicions(findings: Iterable[Finding]) -> dict[str, str]:
    """Return by pool what the errors of callers who get no connection say of the worst finding.

    Of sessions that are not ours it names pid and application_name alone.
    """
    found: dict[str, str] = {}
    for each in findings:
        if each.pool is not None and each.severity in (Severity.WARNING, Severity.CRITICAL):
            found.setdefault(each.pool, mask(f"; {each.code}: {each.brief or each.text}"))
    return found


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {str(key): _masked(each) for key, each in value.items()}
    return [_masked(each) for each in value] if isinstance(value, (list, tuple)) else value


def are_few(connections: int, max_size: int) -> bool:
    """Whether a pool of *max_size* that lacks so many connections still has most of them."""
    return 4 * connections < max_size


def count(number: float, word: str, plural: str = "") -> str:
    """Return `1 caller` or `3 callers`."""
    return f"{number:g} {word if number == 1 else plural or f'{word}s'}"


def duration(seconds: float) -> str:
    """Return a time as one reads it: `40 ms`, `3.2 s`, `14 s`, `5 min`, `3 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def ending(code: int) -> str:
    """Say how a process ended, by its exit code, or by a signal's number below 0."""
    if code >= 0:
        return f"with exit code {code}"
    known = {int(each): each.name for each in signal.Signals}
    return f"by {known.get(-code, f'signal {-code}')}"
