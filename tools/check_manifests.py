"""Check manifests against the schemas of Kubernetes, the Prometheus operator and Grafana.

Usage: python tools/check_manifests.py ops/kubernetes docs/probes.md ops/grafana/dashboards/dbpool.json

The command of `probes.md` that checks its manifest is run too, in an empty directory.

Unknown fields are errors: a cluster drops them silently, and so does Grafana.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

VERSIONS = ("1.30", "1.37")  # the oldest and the newest version that they have to work with
KUSTOMIZATION = "kustomization.yaml"


def main(folder):
    """Return the number of problems, and print each."""
    listed = yaml.safe_load((folder / KUSTOMIZATION).read_text())["resources"]
    found = sorted(path.name for path in folder.glob("*.yaml") if path.name != KUSTOMIZATION)
    problems = [] if sorted(listed) == found else [f"{KUSTOMIZATION}: lists {listed}, not {found}"]
    for name in found:
        for manifest in yaml.safe_load_all((folder / name).read_text()):
            problems += [f"{name}: {problem}" for problem in check(manifest)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(found)} manifests, {len(problems)} problems")
    return len(problems)


def check_page(page):
    """Return the number of problems in the manifests on a page of the documentation."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    manifests = [yaml.safe_load(block) for block in blocks]
    problems = [f"{page}: {problem}" for manifest in manifests for problem in check(manifest)]
    problems += [f"{page}: {problem}" for problem in run_command(page, blocks[0])]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{page}: {len(manifests)} manifests, {len(problems)} problems")
    return len(problems) or not manifests


def run_command(page, manifest):
    """Run the command with which a page checks its manifest, and yield what fails."""
    [(command, name)] = re.findall(
        r"^(kubernetes-validate .*?(\S+\.yaml))$", page.read_text(), re.MULTILINE
    )
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, name).write_text(manifest)
        program, *arguments = shlex.split(command)
        program = str(Path(sys.executable).parent / program)
        done = subprocess.run(
            [program, *arguments], cwd=directory, capture_output=True, text=True, check=False
        )
    if done.returncode != 0 or "passed" not in done.stdout + done.stderr:
        yield f"{command}: {done.stdout}{done.stderr}"


def check_dashboard(path):
    """Return the number of problems in a Grafana dashboard."""
    register_default_plugins()  # the models of panels and of Prometheus's queries
    dashboard = json.loads(path.read_text())
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    problems = [f"{path}: {problem}" for problem in lost(dashboard, understood)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{path}: {len(dashboard['panels'])} panels, {len(problems)} problems")
    return len(problems) or not dashboard["panels"]


def lost(given, understood, where=""):
    """Yield what a model left out or changed; it may add defaults."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for name, value in given.items():
            yield from lost(value, understood.get(name), f"{where}.{name}")
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for number, (value, known) in enumerate(zip(given, understood, strict=True)):
            yield from lost(value, known, f"{where}[{number}]")
    elif given != understood:
        yield f"{where}: {given!r} is understood as {understood!r}"


def check(manifest):
    """Yield what is wrong with one manifest."""
    if manifest["kind"] == "PodMonitor":
        yield from check_pod_monitor(manifest)
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as ex:
            yield f"Kubernetes {version}: {'.'.join(map(str, ex.path))}: {ex.message}"


def check_pod_monitor(manifest):
    try:
        known = PodMonitor.model_validate(manifest)
    except ValueError as ex:
        yield str(ex)
        return
    # The model leaves out what it does not know.
    understood = known.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if understood != manifest:
        yield f"some fields are unknown: understood as {understood}"


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    checks = {"": main, ".md": check_page, ".json": check_dashboard}
    sys.exit(min(sum(checks[path.suffix](path) for path in paths), 1))
