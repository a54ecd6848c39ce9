"""The files that images and containers are made from, and the commands that run in them.

No engine is needed here; tests that need one are in `tests/containers`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from .namespaces import own_pids
from .waiting import free_port, until

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
STEPS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()


def steps(instruction: str) -> list[str]:
    return [step.removeprefix(f"{instruction} ") for step in STEPS if step.startswith(instruction)]


# -- the image -------------------------------------------------------------------------------


def test_building_needs_no_image_but_the_base() -> None:
    """A `# syntax=` line would fetch a frontend, from a registry that may be out of reach."""
    assert not re.search(
        r"^#\s*(syntax|escape|check)\s*=", DOCKERFILE, re.MULTILINE | re.IGNORECASE
    )
    assert steps("ARG") == ["BASE=python:3.13-slim"]
    made = {step.split()[2] for step in steps("FROM")}
    assert {step.split()[0] for step in steps("FROM")} - made == {"${BASE}"}


def test_the_default_target_is_the_serving_image() -> None:
    assert steps("FROM")[-1].split()[2] == "production"
    assert "dev" in {step.split()[2] for step in steps("FROM")}


def test_older_builders_understand_every_step() -> None:
    """No step uses what only BuildKit knows: RUN flags, COPY --chmod and --link, heredocs."""
    assert not re.search(r"RUN --|--chmod|--link|<<", DOCKERFILE)


def test_the_image_installs_what_the_lock_hashes_and_nothing_else() -> None:
    (installing,) = [step for step in steps("RUN") if "pip" in step]
    assert "--require-hashes" in installing
    copied = [step.split() for step in steps("COPY")]
    before = STEPS[: STEPS.index(f"RUN {installing}")]
    assert [step for step in before if step.startswith("COPY")] == [
        "COPY webapp/requirements.txt /tmp/"
    ], "a change of another file would reinstall all packages"
    for *sources, _ in copied:
        for source in sources:
            assert source.startswith(("--from=", "/")) or (ROOT / source).exists()


def test_the_user_is_a_number_and_not_root() -> None:
    """With runAsNonRoot a kubelet rejects user names, as it cannot tell which is root."""
    assert steps("USER")[-1].isdigit()
    assert int(steps("USER")[-1]) > 0


def test_modes_do_not_depend_on_the_checkout() -> None:
    assert any("chmod -R u=rwX,go=rX /app" in step for step in steps("RUN"))


def is_left_out(path: str) -> bool:
    """Whether `.dockerignore` keeps a path out, by Docker's rules: the last pattern wins."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.match(rf"{pattern}(/|$)", path):
            out = not line.startswith("!")
    return out


FOLDERS = st.sampled_from(["", "dbpool/", "webapp/", "dbpool/flask/static/", "webapp/a/b/"])
SECRETS = st.sampled_from([
    ".env", ".env.local", "prod.env", ".envrc", ".pgpass", ".pg_service.conf", ".netrc",
    ".git/config", ".vscode/settings.json", ".idea/workspace.xml", ".notes.py.swp", "notes.py~",
    ".DS_Store", "server.key", "server.pem", "id_rsa", "id_ed25519", "secrets/password",
    "client.p12", "dump.log", "app.dump", "#notes.py#", "notes.py.orig",
    "__pycache__/notes.cpython-313.pyc", ".venv/bin/python", ".hypothesis/x",
])  # fmt: skip


@given(FOLDERS, SECRETS)
def test_secrets_and_editors_files_stay_out_of_the_image(folder: str, name: str) -> None:
    assert is_left_out(folder + name)


def tracked_files() -> list[str]:
    """The files of the image's two folders, without caches; works without git too."""
    command = ["git", "ls-files", "dbpool", "webapp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [path for name in ("dbpool", "webapp") for path in (ROOT / name).rglob("*.py")]
    return done.stdout.split() or [str(path.relative_to(ROOT)) for path in found]


def test_the_sources_get_into_the_image() -> None:
    assert [path for path in tracked_files() if is_left_out(path)] == []
    assert all(is_left_out(path) for path in ("README.md", "tests/postgres.py", "pyproject.toml"))


# -- compose ---------------------------------------------------------------------------------

SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
APP_SERVICES = [name for name, service in SERVICES.items() if "webapp" in service.get("image", "")]


def test_every_setting_of_dotenv_reaches_the_application() -> None:
    """Compose passes `.env` as a whole, and names only the variables that it sets itself."""
    assert APP_SERVICES
    for name in APP_SERVICES:
        assert SERVICES[name]["env_file"] == [{"path": ".env", "required": False}]
    assert SERVICES["web"]["environment"].keys() == {
        "DATABASE_URL", "DATABASE_URL_FILE", "DBPOOL_TOKEN_FILE", "PGPASSWORD", "PGPASSWORD_FILE",
        "PORT",
    }  # fmt: skip


def test_every_secret_of_compose_is_a_file_that_compose_makes() -> None:
    made = set(re.findall(r"\b(?:server|app|token)/\w+", str(SERVICES["secrets"]["entrypoint"])))
    used = set(re.findall(r"/run/secrets/([\w/]+)", str({**SERVICES, "secrets": None})))
    assert used - {"server", "app", "token"} == made
    assert "secrets" not in COMPOSE
    assert not any(
        "POSTGRES_PASSWORD" in service.get("environment", {}) for service in SERVICES.values()
    )


def mounts(service: dict[str, Any]) -> dict[str, str]:
    return {target: name for name, target, *_ in (m.split(":") for m in service.get("volumes", []))}


@pytest.mark.parametrize("name", APP_SERVICES)
def test_the_application_sees_no_password_of_the_server(name: str) -> None:
    assert "server-secrets" not in mounts(SERVICES[name]).values()


def test_only_the_service_that_makes_secrets_writes_to_them() -> None:
    for name, service in SERVICES.items():
        writable = [m for m in service.get("volumes", []) if not m.endswith(":ro")]
        assert name == "secrets" or not re.search("secrets|token", str(writable))


def test_the_application_s_role_is_no_superuser() -> None:
    """The image makes POSTGRES_USER a superuser, so the application uses another role."""
    assert "POSTGRES_USER" not in str(SERVICES)
    for name in APP_SERVICES:
        assert SERVICES[name]["environment"]["DATABASE_URL"].startswith("postgresql://webapp@")
    assert "'create role webapp login'" in SERVICES["role"]["command"][0]


def test_compose_gives_one_image_one_name() -> None:
    names = {name: SERVICES[name]["image"] for name in APP_SERVICES}
    dev = names.pop("dev")
    assert set(names.values()) == {"dbpool-webapp"}
    assert dev == "dbpool-webapp:dev"
    assert [name for name in names if "build" in SERVICES[name]] == ["schema"]


def test_ports_are_published_on_localhost_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", APP_SERVICES)
def test_the_application_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", [*SERVICES])
def test_every_service_has_a_memory_limit(name: str) -> None:
    assert re.fullmatch("[0-9]+m", SERVICES[name]["mem_limit"])


def test_the_cluster_fits_into_a_gibibyte_and_a_half() -> None:
    """Counts the services that keep running."""
    running = [one for name, one in SERVICES.items() if one.get("restart") == "unless-stopped"]
    assert {"db", "standby", "pgbouncer", "web", "web-cluster", "prometheus", "grafana"} == {
        name for name, one in SERVICES.items() if one in running
    }
    assert sum(int(one["mem_limit"].removesuffix("m")) for one in running) <= 1536


def test_what_compose_reads_from_dotenv_is_in_its_example() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    defaults = dict(re.findall(r"(?<!\$)\$\{([A-Z_]+):-([^}]*)\}", text))
    example = dict(
        re.findall(r"^#([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    )
    assert {**defaults, "DEV_USER": "1000"}.items() <= example.items()


def test_no_replication_slot_keeps_what_a_stopped_standby_has_not_read() -> None:
    assert "slot" not in str(SERVICES["standby"]["command"])
    assert SERVICES["standby"]["profiles"] == ["cluster"]


def test_prometheus_keeps_a_day_and_200_megabytes() -> None:
    assert {"--storage.tsdb.retention.time=24h", "--storage.tsdb.retention.size=200MB"} <= set(
        SERVICES["prometheus"]["command"]
    )


@pytest.mark.parametrize(
    "path", [*ROOT.glob("ops/*/Dockerfile")], ids=lambda path: str(path.parent.name)
)
def test_every_base_image_can_be_pinned(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE=\S+:\S+\nFROM \$\{BASE\}$", text, re.MULTILINE)
    service = next(
        one
        for one in SERVICES.values()
        if (one.get("build") or {}).get("context") == f"ops/{path.parent.name}"
    )
    default = re.search(r"ARG BASE=(\S+)", text)
    assert default
    assert re.fullmatch(
        rf"\$\{{[A-Z]+_IMAGE:-{re.escape(default[1])}\}}", service["build"]["args"]["BASE"]
    )


# -- the health check ------------------------------------------------------------------------

Serve = Callable[[bytes], int]


@pytest.fixture
def answering() -> Iterator[Callable[[bytes | None], int]]:
    """Serve one connection: send *answer*, or nothing if it is None."""
    listeners: list[socket.socket] = []
    done = threading.Event()
    threads = []

    def serve(answer: bytes | None) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve_one() -> None:
            conn = listener.accept()[0]
            with conn:
                conn.recv(4096)
                if answer is None:
                    done.wait(10)
                else:
                    conn.sendall(answer)

        thread = threading.Thread(target=serve_one, daemon=True)
        thread.start()
        threads.append(thread)
        return int(listener.getsockname()[1])

    yield serve
    done.set()
    for thread in threads:
        thread.join(5)
    for listener in listeners:
        listener.close()


def healthcheck(**environ: str) -> subprocess.CompletedProcess[str]:
    """Run the image's own command."""
    (step,) = [step for step in STEPS if "HEALTHCHECK" in step]
    _, *options = re.findall(r'"([^"]+)"', step)
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, *options],
        cwd=ROOT,
        env={**proxies, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n{}", 0),
        (b"HTTP/1.0 200 OK\r\n\r\n", 0),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 1),
        (b"HTTP/1.1 404 200\r\n\r\n", 1),
        (b"", 1),
        (b"SSH-2.0-x\r\n", 1),
        (None, 1),
    ],
)
def test_the_health_check_uses_the_status_and_no_proxy(
    answering: Callable[[bytes | None], int], answer: bytes | None, status: int
) -> None:
    done = healthcheck(PORT=str(answering(answer)))
    assert done.returncode == status, done
    assert len(done.stderr.splitlines()) == status, "a failure prints one line"


@pytest.mark.parametrize("host", ["::", "[::1]", "127.0.0.2"])
def test_the_health_check_reaches_the_server_on_the_configured_address(
    tmp_path: Path, host: str
) -> None:
    environ = {"WEBAPP_HOST": host, "PORT": str(free_port()), "WEB_CONCURRENCY": "1"}
    unreachable = {"DATABASE_URL": "postgresql://app@127.0.0.1:1/app", "DBPOOL_DOTENV": "off"}
    command = [sys.executable, *shlex.split(steps("CMD")[-1].strip("[]").replace(",", " "))[1:]]
    log = (tmp_path / "log").open("w+")
    with (
        log,
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environ, **unreachable}, stdout=log, stderr=log
        ) as server,
    ):
        try:
            until(lambda: healthcheck(**environ).returncode == 0, 20.0, pause=0.1)
        finally:
            server.terminate()
            assert server.wait(20) == 0, (tmp_path / "log").read_text()


def test_process_1_loses_no_sigterm_while_it_starts() -> None:
    """The kernel drops signals to process 1 without a handler: it would be killed only later."""
    command = [*own_pids(), sys.executable, "-m", "webapp.serve"]
    environ = {"PORT": str(free_port()), "DATABASE_URL": "postgresql://app@127.0.0.1:1/app"}
    environ |= {"DBPOOL_DOTENV": "off"}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environ}) as outer:
        try:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            until(children.read_text)
            process = Path(f"/proc/{children.read_text().split()[0]}")
            # Not unshare, which blocks signals for a moment too; its arguments name Python as well.
            until(lambda: runs_python(process) and blocks_term(process))
            os.kill(int(process.name), signal.SIGTERM)
            assert outer.wait(10) == 0
        finally:
            outer.kill()


def runs_python(process: Path) -> bool:
    return (process / "cmdline").read_bytes().startswith(sys.executable.encode())


def blocks_term(process: Path) -> bool:
    (mask,) = re.findall(r"SigBlk:\t(\w+)", (process / "status").read_text())
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("port", ["", " ", "x", "-1", "70000", "8000 8001", "closed"])
def test_the_health_check_says_in_one_line_what_is_wrong(port: str) -> None:
    given = str(free_port()) if port == "closed" else port
    done = healthcheck(PORT=given)
    expected_port = given.strip() or "8000"
    if done.returncode == 0:
        assert expected_port == "8000"  # another server may use this port
    else:
        assert done.returncode == 1
        assert done.stderr.startswith(f"healthcheck: port {expected_port}: ")
        assert len(done.stderr.splitlines()) == 1


def test_the_health_check_imports_nothing_slow() -> None:
    """It runs every few seconds in each container."""
    options = re.findall(r'"([^"]+)"', next(step for step in STEPS if "HEALTHCHECK" in step))
    assert options[:3] == ["python", "-I", "-S"]
    script = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, options[3]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    costly = {"site", "ssl", "urllib.request", "http.client", "email", "asyncio", "logging"}
    assert costly.isdisjoint(done.stdout.split())


# -- starting --------------------------------------------------------------------------------


@contextmanager
def serving(**environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "webapp.serve", "--print-config"],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def configured(**environ: str) -> tuple[int, dict[str, str], str]:
    with serving(**environ) as process:
        output, errors = process.communicate(timeout=30)
    pairs = [line.partition("=") for line in output.splitlines()]
    return process.returncode, {k.strip(): v.strip() for k, _, v in pairs}, errors


@pytest.mark.parametrize(
    ("environ", "bind", "workers"),
    [
        ({}, "['127.0.0.1:8000']", "2"),
        ({"PORT": "", "WEB_CONCURRENCY": ""}, "['127.0.0.1:8000']", "2"),
        ({"PORT": " ", "WEB_CONCURRENCY": " "}, "['127.0.0.1:8000']", "2"),
        ({"PORT": "9001", "WEB_CONCURRENCY": "3"}, "['127.0.0.1:9001']", "3"),
        ({"PORT": "9001\n", "WEB_CONCURRENCY": " 1"}, "['127.0.0.1:9001']", "1"),
    ],
)
def test_the_container_s_numbers_may_be_empty(
    environ: dict[str, str], bind: str, workers: str
) -> None:
    status, config, errors = configured(**environ)
    assert (status, errors) == (0, "")
    assert (config["bind"], config["workers"]) == (bind, workers)


@given(
    st.sampled_from([("PORT", "65535"), ("WEB_CONCURRENCY", "1000")]),
    st.sampled_from(
        ["0", "-1", "many", "2.5", "1e3", "99999", "9" * 5000, "0x10", "\uff11", "true", "2;3"]
    ),
)
def test_invalid_numbers_of_the_container_are_rejected_in_one_line(
    numbers: tuple[str, str], value: str
) -> None:
    name, maximum = numbers
    script = "import sys, webapp.serve; sys.exit(webapp.serve.main())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=ROOT,
        env={name: value},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    expected = f"webapp: {name} must be a number from 1 to {maximum}, not {value[:20]!r}\n"
    assert done.stderr == expected
