"""The image: how it is built, and how it runs in unusual environments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import free_port

from .conftest import BASE
from .engine import Project, attempt, docker, inspect, logs, request, until_true


def build(checkout: Path, target: str, tag: str, **environ: str) -> list[str]:
    """Return the layers."""
    command = ["build", "--build-arg", f"BASE={BASE}", "--target", target, "--tag", tag, "."]
    docker(*command, cwd=checkout, **environ)
    layers: list[str] = inspect(tag)["RootFS"]["Layers"]
    return layers


@pytest.mark.parametrize("target", ["production", "dev"])
def test_both_targets_are_built(checkout: Path, target: str) -> None:
    build(checkout, target, f"dbpool-test:{target}")
    config = inspect(f"dbpool-test:{target}")["Config"]
    assert config["User"] == "10001"
    assert config["Healthcheck"]["Test"][0] == "CMD"


def test_a_change_of_the_sources_installs_nothing_again(checkout: Path) -> None:
    before = build(checkout, "production", "dbpool-test")
    path = checkout / "webapp/notes.py"
    text = path.read_text()
    try:
        path.write_text(text + "\n# changed\n")
        after = build(checkout, "production", "dbpool-test")
        (checkout / "README.md").write_text("changed")
        assert build(checkout, "production", "dbpool-test") == after
    finally:
        path.write_text(text)
    assert before[:-1] == after[:-1], "only the layer of the sources may change"
    assert before != after


def test_the_content_of_the_image(checkout: Path) -> None:
    (checkout / "webapp/.env").write_text("DBPOOL_TOKEN=x")
    (checkout / "dbpool/notes.py~").write_text("")
    build(checkout, "production", "dbpool-test")
    script = """
        ls -A /app /app/webapp
        find /app ! -perm -o=r
        find /app /venv -perm /o=w ! -type l
        ls /venv/bin
    """
    output = docker("run", "--rm", "dbpool-test", "sh", "-c", script)
    assert {"dbpool", "webapp", "healthcheck.py"} <= set(output.split())
    assert not re.search(
        r"\.env|~|\bpip|^/", output.replace("/app:", "").replace("/app/webapp:", ""), re.MULTILINE
    )


@contextmanager
def run_container(stack: Project, *options: str, image: str = "dbpool-webapp") -> Iterator[str]:
    """A container of the image in the stack's network."""
    project = stack.environ["COMPOSE_PROJECT_NAME"]
    command = ["run", "--detach", "--health-interval", "1s", "--cap-drop", "ALL"]
    if not any("container:" in option for option in options):
        command += ["--network", f"{project}_default"]
    command += ["--volume", f"{project}_app-secrets:/run/secrets/app:ro"]
    command += ["--env", "DATABASE_URL=postgresql://webapp@db/webapp"]
    command += ["--env", "PGPASSWORD_FILE=/run/secrets/app/webapp_password"]
    command += ["--env", "DBPOOL_TOKEN=a-token"]
    container = docker(*command, *options, image).strip()
    try:
        yield container
    finally:
        docker("rm", "--force", "--volumes", container)


def is_healthy(container: str) -> bool:
    state = inspect(container)["State"]
    assert state["Status"] == "running", logs(container)
    return bool(state["Health"]["Status"] == "healthy")


PROXY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--env=http_proxy=" + PROXY, "--env=HTTP_PROXY=" + PROXY], id="proxies"),
        pytest.param(
            ["--env=PORT=", "--env=WEB_CONCURRENCY=", "--env=DBPOOL_MAX_SIZE="],
            id="empty variables",
        ),
        pytest.param(
            ["--env=PORT=9001", "--env=DBPOOL_PORT=tcp://10.0.0.1:80"], id="a service called dbpool"
        ),
        pytest.param(["--env=WEBAPP_HOST=::"], id="all addresses of IPv6"),
        pytest.param(["--read-only"], id="read-only and no /tmp"),
        pytest.param(["--read-only", "--user=12345:0", "--env=PORT="], id="another user"),
        pytest.param(["--user=0"], id="root"),
    ],
)
def test_it_serves_in_unusual_environments(stack: Project, options: list[str]) -> None:
    with run_container(stack, *options) as container:
        until_true(lambda: is_healthy(container))
        ready = """
            import os, http.client
            connection = http.client.HTTPConnection("127.0.0.1", os.environ["PORT"] or 8000)
            connection.request("GET", "/db/health/ready")
            print(connection.getresponse().status)
        """
        script = "\n".join(line.strip() for line in ready.splitlines())
        output = ""

        def is_ready() -> bool:
            nonlocal output
            output = docker("exec", container, "python", "-c", script)
            return output == "200\n"

        until_true(is_ready)


@pytest.mark.parametrize("target", ["production", "dev"])
def test_the_classic_builder_can_build_it(checkout: Path, target: str) -> None:
    build(checkout, target, "dbpool-test:classic", DOCKER_BUILDKIT="0")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("PORT=eighty", "webapp: PORT must be a number from 1 to 65535, not 'eighty'"),
        ("WEB_CONCURRENCY=0", "webapp: WEB_CONCURRENCY must be a number from 1 to 1000, not '0'"),
        ("DBPOOL_MAX_SIZE=many", "DBPOOL_MAX_SIZE"),
    ],
)
def test_a_wrong_setting_is_logged_and_ends_the_container(
    stack: Project, variable: str, message: str
) -> None:
    with run_container(stack, f"--env={variable}") as container:
        until_true(lambda: inspect(container)["State"]["Status"] == "exited")
        assert inspect(container)["State"]["ExitCode"] != 0
        assert message in logs(container)


def processes(port: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request(port, "/db/stats", token="a-token").json()["processes"]
    return found


def test_two_containers_of_a_pod_keep_their_statistics_apart(stack: Project) -> None:
    """They share network and /dev/shm, but do not see each other's processes."""
    first, second = free_port(), free_port()
    published = [f"--publish=127.0.0.1:{first}:8000", f"--publish=127.0.0.1:{second}:9001"]
    with run_container(stack, "--ipc=shareable", *published) as one:
        until_true(lambda: is_healthy(one))
        pod = [f"--network=container:{one}", f"--ipc=container:{one}", "--env=PORT=9001"]
        with run_container(stack, *pod) as two:
            until_true(lambda: is_healthy(two))
            for port in (first, second):
                assert request(port, "/notes").status == 200
                until_true(lambda port=port: len(processes(port)) == 2)  # type: ignore[misc]
        assert request(first, "/notes").status == 200
        assert len(processes(first)) == 2, "the other's end removed a file"


def test_the_health_check_costs_little(
    stack: Project, record_property: Callable[[str, object], None]
) -> None:
    """One check in ten seconds: 50 ms of processor time would be half a percent."""
    script = """
import os, subprocess, sys
for _ in range(5):
    subprocess.run([sys.executable, "-I", "-S", "webapp/healthcheck.py"], check=True)
print(os.times().children_user + os.times().children_system)
"""
    seconds = float(docker("exec", stack.container("web"), "python", "-c", script)) / 5
    record_property("health check, ms of a processor", round(seconds * 1000))
    assert seconds < 0.1


def test_a_liveness_probe_does_not_ask_the_database(stack: Project) -> None:
    with run_container(stack, "--env=DATABASE_URL=postgresql://webapp@nowhere/webapp") as container:
        until_true(lambda: is_healthy(container))
    assert attempt("inspect", container).returncode != 0
