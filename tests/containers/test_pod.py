"""The pod of ops/kubernetes as its manifest describes it, run by Docker instead of a kubelet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.waiting import free_port

from .engine import Project, answers, docker, inspect, request, until_true


def manifest(stack: Project, name: str) -> dict[str, Any]:
    text = (stack.checkout / "ops/kubernetes" / name).read_text()
    spec: dict[str, Any] = yaml.safe_load(text)["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def secret(stack: Project, tmp_path: Path) -> Path:
    """The files of the secret, readable as with fsGroup."""
    password = stack("exec", "-T", "web", "cat", "/run/secrets/app/webapp_password")
    tmp_path.chmod(0o755)
    files = {
        "database_url": f"postgresql://webapp:{password}@db/webapp\n",
        "dbpool_token": "a-token\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o444)
    return tmp_path


def as_described(stack: Project, pod: dict[str, Any], secret: Path) -> list[str]:
    """The options of `docker run` that correspond to the manifest."""
    (container,) = pod["containers"]
    context = pod["securityContext"]
    options = [f"--network={stack.environ['COMPOSE_PROJECT_NAME']}_default"]
    options += [f"--user={context['runAsUser']}:{context['runAsGroup']}"]
    options += ["--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--read-only"]
    options += [f"--memory={container['resources']['limits']['memory'].removesuffix('i')}"]
    options += [f"--env={one['name']}={one['value']}" for one in container["env"]]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "secret" in volume:
            options += [f"--volume={secret}:{mount['mountPath']}:ro"]
        else:
            size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
            options += ["--ipc=none"] if mount["mountPath"] == "/dev/shm" else []
            options += [f"--tmpfs={mount['mountPath']}:mode=1777,size={size}"]
    return options


def test_the_job_makes_the_tables(stack: Project, secret: Path) -> None:
    pod = manifest(stack, "schema.yaml")
    command = pod["containers"][0]["command"]
    options = as_described(stack, pod, secret)
    assert docker("run", "--rm", *options, "dbpool-webapp", *command) == ""


def test_the_pod_serves_and_ends_as_described(stack: Project, secret: Path) -> None:
    pod = manifest(stack, "deployment.yaml")
    (web,) = pod["containers"]
    port = free_port()
    published = f"--publish=127.0.0.1:{port}:{web['ports'][0]['containerPort']}"
    options = as_described(stack, pod, secret)
    container = docker("run", "--detach", published, *options, "dbpool-webapp").strip()
    try:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = web[probe]["httpGet"]["path"]
            until_true(lambda path=path: answers(port, path))  # type: ignore[misc]
        assert request(port, "/notes").status == 200
        until_true(
            lambda: len(request(port, "/db/stats", token="a-token").json()["processes"]) == 2
        )
        docker("exec", container, *web["lifecycle"]["preStop"]["exec"]["command"])
        docker("stop", container)
        assert inspect(container)["State"]["ExitCode"] == 0
    finally:
        docker("rm", "--force", container)
