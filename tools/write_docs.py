"""Write the generated parts of the documentation: `python tools/write_docs.py`, run by `make docs`.

In a page, such a part is between `<!-- generated: NAME -->` and `<!-- end -->`, so that the page is
complete on a forge too.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dbpool import events  # noqa: E402  # from this checkout
from dbpool.codes import pages  # noqa: E402
from dbpool.events import Event  # noqa: E402
from dbpool.prometheus import PoolCollector  # noqa: E402
from dbpool.settings import COMMON, Settings, variable  # noqa: E402

DOCS = ROOT / "docs"
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FACTS = """\
- The distribution is psycopg-dbpool, the package dbpool. It needs Python 3.11 and psycopg 3.3, and does not support asyncio.
- `dbpool.Pool` takes what `psycopg_pool.ConnectionPool` takes. `pool.connection()` is a transaction; `pool.fetch_all`,
  `fetch_one`, `fetch_value` and `execute` run one statement in one round trip; `pool.run(fn)` runs a transaction, and
  repeats it where that is safe.
- Settings come from `DATABASE_URL` and `DBPOOL_…` variables. The page Settings lists them.
- Errors and diagnoses have codes: `python -m dbpool explain DB04` needs no network."""
SUMMARY = (
    "A PostgreSQL connection pool for threaded Python applications, a subclass of psycopg_pool's."
)


def main() -> None:
    """Write all pages and llms.txt."""
    for path in DOCS.glob("*.md"):
        path.write_text(written(path.read_text()))
    (DOCS / "llms.txt").write_text(llms())


def written(page: str) -> str:
    """Return a page with its generated parts up to date."""
    return GENERATED.sub(lambda found: found[1] + "\n" + PARTS[found[2]]() + "\n" + found[3], page)


def settings() -> str:
    """Return the tables of all settings that a pool has."""
    known = {field.name: field.default for field in fields(Settings)}
    parts = []
    for group, entries in tomllib.loads((DOCS / "settings.toml").read_text()).items():
        rows = [f"### {group.capitalize()}\n", "| setting | variable | default | what it is |",
                "|---|---|---|---|"]  # fmt: skip
        for name, entry in entries.items():
            about = entry if isinstance(entry, str) else f"{entry['about']} Since {entry['since']}."
            named = f"`{variable(name)}`" if variable(name) in COMMON else ""
            rows.append(f"| `{name}` | {named} | {shown(name, known[name])} | {about} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


COUNTS = ("min_size", "max_size", "max_waiting", "keepalives_count")


def shown(name: str, default: object) -> str:
    """Return a default with its unit."""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, int | float) and name not in COUNTS:
        minutes, seconds = divmod(default, 60)
        return f"{minutes:g} min" if default > 60 and not seconds else f"{default:g} s"
    return str(default) if isinstance(default, int) else f"`{default}`" if default else ""


def metrics() -> str:
    """Return the table of all metrics."""
    rows = ["| metric | type | labels | what it is |", "|---|---|---|---|"]
    labels = {
        "db_client_connections": "`state`: `idle`, `used`",
        "dbpool_discarded": "`reason`",
        "dbpool_finding": "`code`",
        "dbpool_endpoint_checkouts": "`endpoint`",
        "dbpool_endpoint_gave_up": "`endpoint`",
        "dbpool_endpoint_use_seconds": "`endpoint`",
        "dbpool_process_age_seconds": "`pid`",
    }
    for family in PoolCollector(dict).describe():
        name = family.name + ("_total" if family.type == "counter" else "")
        more = labels.get(family.name, "")
        rows.append(f"| `{name}` | {family.type} | {more} | {family.documentation} |")
    return "\n".join(rows) + "\n"


def event_table() -> str:
    """Return the table of all events."""
    rows = ["| method | fields | when |", "|---|---|---|"]
    for event in Event.__subclasses__():
        if event.__module__ != events.__name__:
            continue
        names = [f"`{field.name}`" for field in fields(event) if field.name != "pool"]
        about = " ".join((event.__doc__ or "").split())
        rows.append(f"| `{method(event)}` | {', '.join(names)} | {about} |")
    return "\n".join(rows) + "\n"


def method(event: type[Event]) -> str:
    """Return the name of a listener's method for *event*."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", event.__name__).lower()


def rules() -> str:
    """Return the alert rules, without the comment at their top."""
    text = (ROOT / "ops" / "prometheus" / "rules.yml").read_text()
    return f"```yaml\n{text[text.index('groups:') :]}```\n"


def codes() -> str:
    """Return the sections of all codes."""
    return "\n".join(page.replace("](errors.md#", "](#") for page in pages().values())


def llms() -> str:
    """Return the list of pages for language models, after llmstxt.org."""
    return "\n".join([f"# dbpool\n\n> {SUMMARY}\n\n{FACTS}\n\n## Pages\n", *llms_pages(), ""])


def llms_pages() -> Iterator[str]:
    """Yield a line for each page, in the order of the table of contents."""
    for name in re.findall(r"^   ([\w-]+)$", (DOCS / "index.rst").read_text(), re.MULTILINE):
        heading = (DOCS / f"{name}.md").read_text().partition("\n")[0]
        yield f"- [{heading.removeprefix('# ')}](_sources/{name}.md.txt)"


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "events": event_table,
    "rules": rules,
    "codes": codes,
}

if __name__ == "__main__":
    main()
