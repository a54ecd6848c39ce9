"""The documentation's samples, commands, links and quoted lines work as they are printed.

Hidden comments in a page say how to run it:

- `env: NAME=VALUE`, `setup-first:` and `needs: PACKAGE` come before everything else;
- `setup:` is Python that runs at that place, `cleanup:` at the end of the page;
- `pytest:` is the `app.py` that the first two samples of a page are run beside, by pytest;
- `check:` is an expression that must be true there, `output:` what the last block printed;
- `exit:` is the exit status of the commands before it, `setup-sql:` SQL to run before the page's;
- `replace: TEXT = OTHER` is applied to the samples, like the address of the test's database.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dbpool.databases import settings_from_config
from dbpool.flask import DBPool
from dbpool.prometheus import PoolCollector
from dbpool.settings import COMMON

from .conftest import MakeApp
from .postgres import until

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
PIECE = re.compile(
    r"<!-- (?P<label>[a-z-]+):(?P<body>.*?)-->"
    r"|^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Piece:
    """A fenced block, with its language as the label, or a comment with a label."""

    label: str
    text: str
    is_code: bool


def pieces(path: Path) -> list[Piece]:
    found = []
    for match in PIECE.finditer(path.read_text()):
        if match["label"]:
            found.append(Piece(match["label"], match["body"].strip("\n"), is_code=False))
        else:
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            found.append(Piece(match["language"], code, is_code=True))
    return found


def blocks(language: str) -> list[Any]:
    """All blocks in a language, each with its page."""
    return [
        pytest.param(path, piece.text, id=f"{path.stem}-{number}")
        for path in PAGES
        for number, piece in enumerate(pieces(path))
        if piece.is_code and piece.label == language
    ]


def comment_after(path: Path, code: str, label: str) -> str | None:
    """The text of the comment right after a block, if it has that label."""
    found = pieces(path)
    at = next(n for n, piece in enumerate(found) if piece.text == code)
    following = found[at + 1 : at + 2]
    return following[0].text if following and following[0].label == label else None


def shape(text: str) -> str:
    """The text with every number replaced: a test's numbers differ from the page's."""
    return re.sub(r"\d+", "0", text.strip())


class Page:
    """Runs a page from top to bottom, in one namespace."""

    def __init__(self, path: Path, dsn: str) -> None:
        self.path, self.pieces = path, pieces(path)
        self.names: dict[str, Any] = {
            "__name__": "docs",
            "dbpool_settings": settings_from_config,
        }
        self.printed = ""
        self.environ = {"DATABASE_URL": dsn}
        for text in self.comments("env"):
            pairs = (pair.partition("=") for pair in shlex.split(text))
            self.environ |= {name: value.replace("$DATABASE_URL", dsn) for name, _, value in pairs}
        self.replaced = dict(text.strip().split(" = ") for text in self.comments("replace"))

    def comments(self, label: str) -> list[str]:
        return [each.text for each in self.pieces if each.label == label and not each.is_code]

    def run(self) -> None:
        try:
            for text in self.comments("setup-first"):
                self.execute(text)
            for piece in self.pieces:
                if piece in self.run_by_pytest():
                    continue
                if piece.label in {"python", "setup", "cleanup"}:
                    self.execute(piece.text)
                elif piece.label == "check":
                    assert eval(piece.text.strip(), self.names), piece.text
                elif piece.label == "output":
                    assert self.printed.strip() == piece.text.strip()
            if self.comments("pytest"):
                self.run_pytest()
        except BaseException:
            for text in reversed(self.comments("cleanup")):
                with contextlib.suppress(Exception):
                    self.execute(text)
            raise

    def run_by_pytest(self) -> list[Piece]:
        samples = [each for each in self.pieces if each.label == "python"]
        return samples[:2] if self.comments("pytest") else []

    def run_pytest(self) -> None:
        """Run the page's first two samples as `conftest.py` and a test, beside an `app.py`."""
        conftest, test = [each.text for each in self.run_by_pytest()]
        Path("app.py").write_text("\n".join(self.comments("pytest")))
        Path("conftest.py").write_text(conftest)
        Path("test_sample.py").write_text(test)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
            env={**os.environ, **self.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "1 passed" in done.stdout, done.stdout + done.stderr

    def execute(self, source: str) -> None:
        for text, other in self.replaced.items():
            source = source.replace(
                text, other.replace("$DATABASE_URL", self.environ["DATABASE_URL"])
            )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source.strip(), f"docs/{self.path.name}", "exec"), self.names)
        self.printed = printed.getvalue()


@pytest.fixture
def page(
    request: pytest.FixtureRequest, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Page:
    page = Page(request.param, dsn)
    for needed in page.comments("needs"):
        pytest.importorskip(needed.strip())
    monkeypatch.chdir(tmp_path)
    for name, value in page.environ.items():
        monkeypatch.setenv(name, value)
    return page


PYTHON = [path for path in PAGES if any(each.label == "python" for each in pieces(path))]


@pytest.mark.parametrize("page", PYTHON, indirect=True, ids=lambda path: path.stem)
def test_the_samples_of_a_page_run(page: Page) -> None:
    page.run()


@pytest.mark.parametrize(("path", "code"), blocks("yaml"))
def test_yaml_samples_parse_and_name_only_known_variables(path: Path, code: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(code), dict)
    assert set(re.findall(r"DBPOOL_[A-Z_]+", code)) <= COMMON


PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
FIELDS = {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}  # fields in use


def test_the_probes_use_existing_views_and_allow_enough_time(make_app: MakeApp, dsn: str) -> None:
    yaml = pytest.importorskip("yaml")
    client = make_app(dsn).test_client()
    (text,) = [each.text for each in pieces(DOCS / "probes.md") if each.label == "yaml"]
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    (port,) = [port["name"] for port in container["ports"]]
    for name in PROBES:
        probe = container[name]
        assert probe.keys() <= FIELDS
        assert probe["httpGet"]["port"] == port
        path = probe["httpGet"]["path"]
        until(lambda path=path: client.get(path).status_code == 200)  # type: ignore[misc]
    liveness = container["livenessProbe"]
    assert liveness["httpGet"]["path"].endswith("/live")
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


METRIC = re.compile(r"\b(?:db_client_connection|dbpool)(?:_[a-z]+)+\b")


def test_every_metric_that_a_page_names_is_exposed() -> None:
    known = {family.name for family in PoolCollector(dict).describe()}
    suffixes = re.compile("_(total|bucket|sum|count)$")
    fixtures = {"dbpool_dsn", "dbpool_isolated"}
    for path in PAGES:
        visible = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
        named = {suffixes.sub("", name) for name in METRIC.findall(visible)}
        assert named - fixtures - {"dbpool_token"} <= known, path.name


@pytest.mark.parametrize(("path", "code"), blocks("sql"))
def test_sql_runs(path: Path, code: str, dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute((comment_after(path, code, "setup-sql") or "").encode())
        conn.execute(code.encode())
        conn.rollback()


# What the documentation says about the code


def test_generated_parts_are_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        tool = importlib.import_module("write_docs")
    finally:
        sys.path.pop(0)
    stale = [path.name for path in PAGES if tool.written(path.read_text()) != path.read_text()]
    assert stale == [], "run python tools/write_docs.py"
    assert (DOCS / "llms.txt").read_text() == tool.llms()


def test_the_page_on_metrics_names_every_field_of_stats(make_app: MakeApp, dsn: str) -> None:
    app = make_app(dsn, DBPOOL_DETAILS="always")
    report = app.test_client().get("/db/stats").json
    assert report is not None
    page = (DOCS / "observability.md").read_text()
    table = page.partition("## What /stats holds")[2].partition("\n\n`?scope")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert report.keys() <= named
    (pool,) = report["pools"].values()
    assert named >= {*pool} - {"max_size", "min_size"}


def test_every_setting_and_variable_is_documented() -> None:
    page = (DOCS / "settings.md").read_text()
    assert {name for name in COMMON if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_variable_that_a_page_names_exists(path: Path) -> None:
    text = path.read_text() if path.name != "changes.md" else ""
    named = set(re.findall(r"`(DBPOOL_[A-Z_]+)[`=]", text))
    own = re.compile("DBPOOL_(REPLICA|REPORTS)_")
    unknown = {name for name in named - COMMON if not own.match(name)}
    assert unknown <= {"DBPOOL_PORT"}  # Kubernetes' own


def slug(heading: str) -> str:
    """The anchor that a forge makes from a heading."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_and_anchors_exist_on_a_forge_too(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_runbooks_of_the_alert_rules_exist() -> None:
    runbooks = re.findall(r'runbook: "([\w-]+)\.html#?([\w-]*)"', (DOCS / "alerts.md").read_text())
    assert runbooks
    for name, anchor in runbooks:
        assert not anchor or anchor in anchors(DOCS / f"{name}.md")


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^   ([\w-]+)$", (DOCS / "index.rst").read_text(), re.MULTILINE))
    start = (DOCS / "README.md").read_text()
    assert {path.stem for path in PAGES} - {"README"} == listed
    assert {name for name in listed if f"({name}.md)" not in start} == set()


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) < 900


def test_what_the_runbook_quotes_of_the_log_is_in_the_code() -> None:
    page = (DOCS / "runbook.md").read_text()
    table = page.partition("| the log says |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `(.*?)`", table, re.MULTILINE)
    search = page.partition("Search it for ")[2].partition("`/db/stats")[0]
    quoted += re.findall(r"`(.*?)`", search)
    assert len(quoted) == 6
    code = " ".join(
        str(node.value)
        for path in (ROOT / "dbpool").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
    )
    assert [each for each in quoted if each not in code] == []


def test_the_page_on_flask_quotes_a_real_log_line(
    make_app: MakeApp, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    failures: list[Exception] = []

    @app.get("/", endpoint="orders.index")
    def list_orders() -> Any:
        conn = db.pool.getconn()

        def lines() -> Iterator[str]:
            try:
                yield str(conn.execute("select 1").fetchone())
            except psycopg.Error as ex:
                failures.append(ex)

        return lines()

    app.test_client().get("/").get_data()
    assert len(failures) == 1
    (quote,) = [each.text.strip() for each in pieces(DOCS / "flask.md") if each.label == "text"]
    (logged,) = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    location = r"[\w/.]+:\d+ \w+"
    assert re.sub(location, "PLACE", logged) == re.sub(location, "PLACE", quote)
