"""Check the manifests of a folder against the schemas of Kubernetes and the Prometheus operator.

Usage: python tools/check_manifests.py ops/kubernetes docs/probes.md

Fields that no schema knows are errors: a cluster drops them without a word.
"""

import re
import sys
from pathlib import Path

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

VERSIONS = ("1.30", "1.37")  # the oldest and the newest that they are to work with
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
    """Return the number of problems of the manifests that a page of the documentation shows."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    manifests = [yaml.safe_load(block) for block in blocks]
    problems = [f"{page}: {problem}" for manifest in manifests for problem in check(manifest)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{page}: {len(manifests)} manifests, {len(problems)} problems")
    return len(problems) or not manifests


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
    problems = sum(main(path) if path.is_dir() else check_page(path) for path in paths)
    sys.exit(min(problems, 1))
