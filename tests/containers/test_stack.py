"""The sample application and its PostgreSQL as `docker compose up` runs them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from .conftest import SETTINGS
from .engine import Load, Project, answers, docker, inspect, logs, request, until_true


def counters(port: int, token: str) -> dict[str, int]:
    stats = request(port, "/db/stats", token=token).json()
    pool: dict[str, int] = stats["pools"]["default"]["counters"]
    return pool


def test_the_first_up_serves_notes_and_health(port: int) -> None:
    made = request(port, "/notes", "POST", {"title": "first"})
    assert made.status == 201
    path = f"/notes/{made.json()['id']}"
    assert request(port, path).json()["title"] == "first"
    assert request(port, path, "DELETE").status == 204
    assert request(port, "/db/health/live").json() == {"status": "up"}
    assert request(port, "/db/health/ready").json()["status"] == "up"


def test_the_printed_token_opens_the_live_page(stack: Project, port: int, token: str) -> None:
    assert request(port, "/db/").status == 401
    assert request(port, "/db/", token="0" * 48).status == 401
    assert request(port, "/db/", token=token).status == 200
    assert f"http://127.0.0.1:{port}/db/" in stack.logs("schema")
    for service, published in (("web", port), ("db", None)):
        bound = inspect(stack.container(service))["NetworkSettings"]["Ports"]
        hosts = {one["HostIp"] for ones in bound.values() for one in ones or ()}
        assert hosts == ({"127.0.0.1"} if published else set())


def test_the_statistics_include_both_workers(port: int, token: str) -> None:
    before = counters(port, token)["checkouts"]
    for _ in range(40):
        assert request(port, "/notes").status == 200
    until_true(lambda: counters(port, token)["checkouts"] >= before + 40)
    assert len(request(port, "/db/stats", token=token).json()["processes"]) == 2


def test_no_secret_is_in_an_environment_or_an_image(stack: Project, token: str) -> None:
    script = "cat /run/secrets/*/*"
    secrets = stack("exec", "-T", "web", "sh", "-c", f"{script} | fold -w 48").split()
    assert len(secrets) == 2
    assert token in secrets
    secrets += stack("exec", "-T", "db", "sh", "-c", f"{script} | fold -w 48").split()
    assert len(secrets) == 4
    for service in ("web", "dev", "db", "role", "schema", "secrets"):
        description = json.dumps(inspect(stack.container(service)))
        assert not any(secret in description for secret in secrets)
        assert service == "schema" or not any(
            secret in logs(stack.container(service)) for secret in secrets
        )


def test_the_applications_role_owns_only_its_database(stack: Project) -> None:
    question = """
        select rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,
            (select pg_get_userbyid(datdba) from pg_database where datname = current_database())
        from pg_roles where rolname = current_user
    """
    script = f"import dbpool\nwith dbpool.Pool() as pool: print(pool.fetch_one({question!r}))"
    output = stack("exec", "-T", "web", "python", "-c", script)
    assert output.strip() == "(False, False, False, False, False, 'webapp')"


def test_the_process_is_confined(stack: Project) -> None:
    script = """
        exec 2>&1
        id -u
        touch /app/x /venv/x /run/secrets/token/x
        cat /proc/1/status
    """
    output = stack("exec", "-T", "web", "sh", "-c", script)
    assert output.splitlines()[0] == "10001"
    assert output.count("Read-only file system") == 3
    assert "CapEff:\t0000000000000000" in output
    assert "NoNewPrivs:\t1" in output


def test_dotenv_reaches_the_application_and_its_database_stays(stack: Project) -> None:
    stack.set(
        DBPOOL_MAX_SIZE="3",
        DBPOOL_STATEMENT_TIMEOUT="7s",
        DATABASE_URL="postgresql://nobody@elsewhere/nothing",
        PGPASSWORD="another",
        PORT=stack.environ["PORT"],
    )
    try:
        output = stack("run", "--rm", "--no-deps", "web", "python", "-m", "dbpool", "check")
    finally:
        stack.set(**SETTINGS)
    assert "max_size = 3" in output
    assert "statement_timeout = 7.0" in output
    assert "user: webapp" in output


def test_a_restarted_database_costs_at_most_the_statements_in_flight(
    stack: Project, port: int, record_property: Callable[[str, object], None]
) -> None:
    with Load(port, clients=4).running() as load:
        load.await_requests()
        stack("restart", "db")
        load.await_requests()
    record_property("database restarted under load, written", load.written)
    record_property("database restarted under load, failed", load.kinds())
    assert len(load.failed) <= load.clients, load.failed


def test_a_new_password_fails_no_request(stack: Project, port: int, token: str) -> None:
    before = stack("exec", "-T", "web", "cat", "/run/secrets/app/webapp_password")
    with Load(port, clients=4).running() as load:
        load.await_requests()
        stack("run", "--rm", "secrets", "rotate")
        stack("run", "--rm", "--no-deps", "role")
        load.await_requests()
    assert load.failed == []
    assert stack("exec", "-T", "web", "cat", "/run/secrets/app/webapp_password") != before
    # New connections use the new password.
    connects = counters(port, token)["connects"]
    end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'webapp'"
    stack("exec", "-T", "db", "psql", "-U", "postgres", "-c", end)
    until_true(lambda: answers(port, "/notes"))
    until_true(lambda: counters(port, token)["connects"] > connects)


def test_it_stops_within_its_grace_period(stack: Project, port: int) -> None:
    with Load(port, clients=2).running() as load:
        load.await_requests()
        stack("stop", "web")
    state = inspect(stack.container("web"))["State"]
    # It would be 137 after a kill at the end of the grace period.
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    stack("up", "--detach", "--wait", "web")
    assert answers(port, "/notes")


def test_the_development_service_runs_what_is_saved(stack: Project) -> None:
    port = int(stack.environ["DEV_PORT"])
    assert f"http://127.0.0.1:{port}/db/ " in stack.logs("dev")
    sources = [
        "dbpool/__init__.py",
        "dbpool/gunicorn.py",
        "webapp/notes.py",
        "webapp/gunicorn.conf.py",
    ]
    original = {name: (stack.checkout / name).read_text() for name in sources}
    (page,) = stack.checkout.glob("dbpool/**/live.html")
    original[str(page.relative_to(stack.checkout))] = page.read_text()
    token = stack("exec", "-T", "dev", "cat", "/run/secrets/token/dbpool_token").strip()
    try:
        for name in sources:
            with (stack.checkout / name).open("a") as file:
                file.write(f"\nprint('MARK {name}', flush=True)\n")
        until_true(lambda: all(f"MARK {name}" in stack.logs("dev") for name in sources))
        page.write_text(page.read_text() + "<!-- MARKED -->")
        until_true(lambda: "<!-- MARKED -->" in request(port, "/db/", token=token).body)
        assert request(port, "/notes").status == 200
    finally:
        for name, text in original.items():
            (stack.checkout / name).write_text(text)


def test_a_user_who_may_not_read_the_checkout_gets_the_setting(stack: Project) -> None:
    container = f"{stack.environ['COMPOSE_PROJECT_NAME']}-unreadable"
    user = str(os.getuid() + 12345)
    stack("run", "--detach", "--no-deps", "--user", user, "--name", container, "dev")
    try:
        until_true(lambda: inspect(container)["State"]["Status"] == "exited")
        assert "set DEV_USER=$(id -u)" in logs(container)
    finally:
        docker("rm", "--force", container)
