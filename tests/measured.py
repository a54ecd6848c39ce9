"""Write the measurements of the diagnosis' slow tests into bench/README.md.

They are left in `bench/results/troubles.tmp`; `python -m tests.measured` keeps them as
`troubles.json` and writes the tables.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_RESULTS: Final = Path(__file__).parent.parent / "bench" / "results"
LATEST: Final = _RESULTS / "troubles.tmp"
SAVED: Final = _RESULTS / "troubles.json"
README: Final = _RESULTS.parent / "README.md"
_BEGIN, _END = "<!-- troubles -->\n", "<!-- /troubles -->"
_lock = threading.Lock()

Results = dict[str, dict[str, Any]]


def record(
    name: str, privilege: str, *, fixed: Mapping[str, Any], measured: Mapping[str, Any]
) -> None:
    """Record what a role *with* pg_read_all_stats, or *without*, measured in a situation."""
    with _lock:
        results = read(LATEST)
        results.setdefault(name, {}).update({**fixed, privilege: dict(measured)})
        LATEST.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"\n{name}, {privilege} pg_read_all_stats: {dict(measured)}\n")


def read(path: Path) -> Results:
    """Return the results by situation, none if there is no such file."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def tables(results: Results) -> str:
    """Return the tables of the troubles and of the quiet situations."""
    troubles = [(name, row) for name, row in results.items() if row["code"]]
    troubles.sort(key=lambda each: (each[1]["code"], each[0]))
    quiet = sorted((name, row) for name, row in results.items() if not row["code"])
    lines = [
        "| Trouble | Code | Due after | With pg_read_all_stats | Without | Who it is |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in troubles:
        times = " | ".join(_seconds(row.get(privilege, {})) for privilege in ("with", "without"))
        lines.append(f"| {name} | {row['code']} | {row['due']:g} s | {times} | {_culprit(row)} |")
    lines += ["", "| Quiet, or merely busy | With pg_read_all_stats | Without |", "|---|---|---|"]
    for name, row in quiet:
        seen = " | ".join(_worst(row.get(privilege, {})) for privilege in ("with", "without"))
        lines.append(f"| {name} | {seen} |")
    return "\n".join(lines) + "\n"


def _seconds(measured: Mapping[str, Any]) -> str:
    after = measured.get("after")
    return "not in time" if after is None else f"{after:.1f} s"


def _culprit(row: Mapping[str, Any]) -> str:
    wrong = [
        each
        for privilege in ("with", "without")
        for each in row.get(privilege, {}).get("wrong", ())
    ]
    return "; ".join(wrong) or ("right: " + ", ".join(row["known"]) if row["known"] else "")


def _worst(measured: Mapping[str, Any]) -> str:
    return ", ".join(each for each in measured.get("seen", ()) if each != "ok DB00") or "nothing"


def written(text: str, results: Results) -> str:
    """Return the page with the tables of these results."""
    found = re.escape(_BEGIN) + ".*?" + re.escape(_END)
    return re.sub(found, lambda _: _BEGIN + tables(results) + _END, text, flags=re.DOTALL)


if __name__ == "__main__":
    SAVED.write_text(LATEST.read_text())
    README.write_text(written(README.read_text(), read(SAVED)))
