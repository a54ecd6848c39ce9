"""The pages of the codes: each code has one, and it quotes what the code really prints."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import dbpool
from dbpool import Pool
from dbpool.cli import main
from dbpool.codes import as_text, find, pages, title
from dbpool.diagnosis import CODES, diagnose
from dbpool.errors import FailureKind, is_permanent
from dbpool.settings import Settings

from .postgres import Server, until
from .proxy import Cut, Proxy
from .test_diagnosis import MORE_TROUBLES, QUIET, TROUBLES
from .threads import Task

ERRORS = {
    "DBE01": "PoolExhausted",
    "DBE02": "DatabaseUnavailable",
    "DBE03": "DatabaseMisconfigured",
    "DBE04": "CommitUncertain",
    "DBE05": "TooManyRequests",
    "DBE06": "PoolClosed",
    "DBE07": "ConfigError",
}


def quotes(code: str) -> list[str]:
    """The log lines and errors that a page quotes, line by line."""
    blocks = re.findall(r"```text\n(.*?)```", pages()[code], re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def shape(text: object) -> str:
    """The text with every number replaced, except those in codes, and without its duration.

    The text of an outage shorter than a tenth of a second has no duration.
    """
    text = re.sub(r" for \d+\.\d s(?= \()", "", str(text))
    return re.sub(r"(?<!DBE0)\b\d+(\.\d+)?", "0", text).replace("\n\t", " ")


def run_as(filename: str, source: str, **names: Any) -> None:
    """Run *source* under that file name."""
    exec(compile(source, filename, "exec"), names)


# The pages


def test_every_error_and_every_diagnosis_has_a_page() -> None:
    assert list(pages()) == [*ERRORS, *(f"DB{number:02}" for number in range(19))]


@pytest.mark.parametrize("code", pages())
def test_a_page_begins_with_its_code_and_has_all_parts(code: str) -> None:
    page = pages()[code]
    assert page.startswith(f"## {code} ")
    for part in ("**What it means.**", "**Look at**", "**Do**"):
        assert page.count(part) == 1, part
    assert ("**Reported**" in page) == (code not in ERRORS)


@pytest.mark.parametrize(("code", "name"), ERRORS.items())
def test_an_errors_page_is_titled_with_its_class(code: str, name: str) -> None:
    assert title(pages()[code]).startswith(f"{code} {name}: ")
    assert issubclass(getattr(dbpool, name), Exception)


def test_every_failure_kind_is_explained_on_a_page() -> None:
    pages_of_outages = pages()["DBE02"] + pages()["DBE03"]
    assert {kind for kind in FailureKind if f"`{kind}`" not in pages_of_outages} == set()
    assert {kind for kind in FailureKind if is_permanent(kind)} == {
        kind for kind in FailureKind if f"`{kind}`" in pages()["DBE03"]
    }


# What the pages quote


def test_an_exhausted_pool_says_what_its_page_quotes(dsn: str) -> None:
    source = (
        "def list_orders():\n"
        "    with pool.connection(), pool.connection(): held.set(); done.wait(30)\n"
        "list_orders()"
    )
    held, done = threading.Event(), threading.Event()
    with Pool(dsn, max_size=2, timeout=30) as pool:
        task = partial(run_as, "app/views.py", source, pool=pool, held=held, done=done)
        holder = Task(task, name="ThreadPoolExecutor-0_3")
        assert held.wait(30)
        with pytest.raises(dbpool.PoolExhausted) as caught:
            pool.getconn(timeout=0.05)
        done.set()
        holder.result()
    assert [shape(caught.value)] == [shape(line) for line in quotes("DBE01")]


def test_a_nested_checkout_and_slow_statements_say_what_the_page_quotes(dsn: str) -> None:
    with Pool(dsn, max_size=1, timeout=30) as pool:
        with pool.connection(), pytest.raises(dbpool.PoolExhausted) as nested:
            pool.getconn(timeout=0.05)
        slow_query = Task(pool.fetch_one, "select pg_sleep(0.5)")
        until(lambda: [each.status for each in pool.holders()] == ["query"])
        with pytest.raises(dbpool.PoolExhausted) as slow:
            pool.getconn(timeout=0.05)
        slow_query.result()
    italics = re.findall(r"^- \*(.*?)\*", pages()["DBE01"], re.MULTILINE)
    assert italics[1] in shape(nested.value).replace("holds 0", "holds 1")
    assert italics[2] in str(slow.value)


def test_an_outage_says_what_its_page_quotes() -> None:
    with (
        Pool("host=127.0.0.1 port=1 dbname=app", outage_grace=0.3) as pool,
        pytest.raises(dbpool.DatabaseUnavailable) as caught,
    ):
        pool.fetch_one("select 1")
    assert [shape(caught.value)] == [shape(line) for line in quotes("DBE02")]
    assert caught.value.kind == "refused"


def test_the_end_of_an_outage_logs_what_its_page_quotes(
    own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    own_server.stop("immediate")
    with Pool(own_server.conninfo, outage_grace=0.05) as pool:
        with pytest.raises(dbpool.DatabaseUnavailable):
            pool.fetch_one("select 1")
        own_server.start()
        assert pool.run(lambda conn: 1, timeout=30) == 1
    (quoted,) = re.findall(r'says "(.*?)"', pages()["DBE02"])
    assert quoted in caplog.text


def test_a_wrong_password_says_what_its_page_quotes(server: Server) -> None:
    conninfo = server.conninfo_for(user="app", password="wrong")
    with Pool(conninfo) as pool, pytest.raises(dbpool.DatabaseMisconfigured) as caught:
        pool.fetch_one("select 1")
    assert [shape(caught.value)] == [shape(line) for line in quotes("DBE03")]


def test_a_lost_commit_says_what_its_page_quotes(proxy: Proxy) -> None:
    with Pool(proxy.conninfo) as pool:
        pool.execute("create table t (id int)")
        proxy.cut(b"COMMIT", Cut.DURING)
        with pytest.raises(dbpool.CommitUncertain) as caught:
            pool.run(lambda conn: conn.execute("insert into t values (1)"), attempts=1)
    assert [str(caught.value)] == quotes("DBE04")


def test_a_full_queue_says_what_its_page_quotes(dsn: str) -> None:
    with Pool(dsn, max_size=1, max_waiting=1, timeout=5) as pool:
        with pool.connection():
            waiting = Task(pool.fetch_one, "select 1")
            until(lambda: pool.stats().waiting == 1)
            with pytest.raises(dbpool.TooManyRequests) as caught:
                pool.fetch_one("select 1")
        waiting.result()
    assert [shape(caught.value)] == [shape(line) for line in quotes("DBE05")]


def test_a_closed_pool_says_what_its_page_quotes(dsn: str) -> None:
    with Pool(dsn) as pool:
        pass
    with pytest.raises(dbpool.PoolClosed) as caught:
        pool.fetch_one("select 1")
    assert [str(caught.value)] == quotes("DBE06")


WRONG: list[Callable[[], object]] = [
    lambda: Settings.from_env(environ={"DBPOOL_MAX_SIZE": "0"}),
    lambda: Settings.from_env(environ={"DBPOOL_MIN_SIZE": "8", "DBPOOL_MAX_SIZE": "4"}),
    lambda: Settings.from_env(environ={"DATABASE_URL": "mysql://db/app"}),
    lambda: Settings.from_env(environ={"DATABASE_URI": "postgresql://db/app"}),
    lambda: Pool("dbname=app", maxsize=3),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("wrong", "quote"), [*zip(WRONG, quotes("DBE07"), strict=True)])
def test_wrong_settings_say_what_their_page_quotes(wrong: Callable[[], object], quote: str) -> None:
    with pytest.raises(dbpool.ConfigError) as caught:
        wrong()
    assert str(caught.value) == quote


def test_every_diagnosis_says_what_its_page_quotes() -> None:
    cases = [*TROUBLES.values(), *MORE_TROUBLES.values(), *QUIET.values()]
    produced = {(each.code, shape(each.text)) for case in cases for each in diagnose(case.scene())}
    quoted = {(code, shape(line)) for code in CODES for line in quotes(code)}
    assert quoted - produced == set()
    assert {code for code, _ in quoted} == CODES.keys()


def test_a_page_names_every_field_of_the_evidence() -> None:
    cases = [*TROUBLES.values(), *MORE_TROUBLES.values(), *QUIET.values()]
    found = [each for case in cases for each in diagnose(case.scene())]
    missing = {
        (each.code, key)
        for each in found
        for key in each.evidence
        if f"`{key}`" not in pages()[each.code].partition("**Evidence**")[2]
    }
    assert missing == set()
    assert {each.code for each in found} == CODES.keys()


# The command


def test_explain_shows_the_page_of_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "db04"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("DB04 Waiting for a lock\n")
    assert "pg_blocking_pids" in output


@pytest.mark.parametrize("code", pages())
def test_a_terminal_shows_a_page_without_markup(code: str) -> None:
    text = as_text(pages()[code])
    prose = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not re.search(r"\*\*|\]\(|^#", "\n".join(prose), re.MULTILINE)
    quoted = [f"    {line}" for line in quotes(code)]
    assert [line for line in text.splitlines() if line in quoted] == quoted


def test_a_terminal_names_the_page_that_a_link_leads_to() -> None:
    linked = as_text("## X\n**Do** use `a`: see [sizes](sizing.md#top), [DB03](#db03-server-full).")
    assert linked == "X\nDo: use `a`: see sizes (docs/sizing.md), DB03."


def test_explain_finds_words_of_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    assert find("PoolExhausted") == ["DBE01"]
    assert find("too many clients") == ["DB03"]
    assert find("pool 'default': no connection within 5.00 s [DBE01]") == ["DBE01"]
    assert find("db04/default") == ["DB04"]  # the id of a finding
    assert main(["explain", "lock"]) == 0
    assert capsys.readouterr().out.splitlines() == [title(pages()[c]) for c in ("DB04", "DB14")]


def test_explain_without_a_code_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert capsys.readouterr().out.splitlines() == [title(page) for page in pages().values()]


def test_explain_of_an_unknown_code_fails_and_lists_the_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explain", "DB99"]) == 1
    assert capsys.readouterr().err == (
        "dbpool: no page has that code or those words; to list all, leave them out\n"
    )
