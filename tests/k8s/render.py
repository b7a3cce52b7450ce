"""What `kubectl apply -k` would send: by kubectl where it is there, else by the little that our files use."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

REPO = Path(__file__).resolve().parents[2]
K8S = REPO / "k8s"
KUSTOMIZATIONS = {"base": K8S / "base", "gpu": K8S / "overlays" / "gpu"}
UNDERSTOOD = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
"""Fields of a kustomization that the plain loader knows; another one is an error, not an oversight."""


def render(folder: Path) -> list[Manifest]:
    return with_kubectl(folder) if shutil.which("kubectl") else with_yaml(folder)


def with_kubectl(folder: Path) -> list[Manifest]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def with_yaml(folder: Path) -> list[Manifest]:
    """The same without kubectl: resources, JSON 6902 patches, image names and the namespace."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(kustomization) <= UNDERSTOOD, f"{folder}: {set(kustomization) - UNDERSTOOD} is not understood"
    found: list[Manifest] = []
    for name in kustomization["resources"]:
        path = (folder / name).resolve()
        found += with_yaml(path) if path.is_dir() else load(path)
    for patch in kustomization.get("patches", []):
        targets = [manifest for manifest in found if _is_target(manifest, patch["target"])]
        assert targets, f"{folder}: the patch {patch['path']} has no target"
        for manifest in targets:
            apply_patch(manifest, yaml.safe_load((folder / patch["path"]).read_text(encoding="utf-8")))
    for manifest in found:
        if (namespace := kustomization.get("namespace")) and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = namespace
        for container in containers(manifest):
            for image in kustomization.get("images", []):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def load(path: Path) -> list[Manifest]:
    # Anchors make two places one object; a patch of one must not change the other.
    documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return [unshared(document) for document in documents if document]


def unshared(value: Any) -> Any:
    """A copy in which no part is the same object as another part (`copy.deepcopy` keeps them the same)."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value


def apply_patch(manifest: Manifest, operations: list[dict[str, Any]]) -> None:
    """JSON 6902 in place: add, replace, remove."""
    for operation in operations:
        *parents, last = (
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
        )
        place: Any = manifest
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        last = int(last) if isinstance(place, list) else last
        if operation["op"] == "remove":
            del place[last]
            continue
        assert operation["op"] in {"add", "replace"}, operation
        assert operation["op"] == "add" or last in place, f"nothing to replace at {operation['path']}"
        place[last] = copy.deepcopy(operation["value"])


def pod_templates(manifest: Manifest) -> dict[str, Manifest]:
    """Name → pod template (`metadata`, `spec`) of everything in `manifest` that starts pods."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "RayService":
        ray = spec["rayClusterConfig"]
        groups = {group["groupName"]: group["template"] for group in ray["workerGroupSpecs"]}
        return {"head": ray["headGroupSpec"]["template"], **groups}
    if manifest["kind"] == "Pod":
        return {manifest["metadata"]["name"]: manifest}
    if manifest["kind"] == "CronJob":
        return {manifest["metadata"]["name"]: spec["jobTemplate"]["spec"]["template"]}
    assert "template" not in spec, f"{manifest['kind']} starts pods, and the tests do not look at them"
    return {}


def containers(manifest: Manifest) -> list[Manifest]:
    found = []
    for template in pod_templates(manifest).values():
        found += template["spec"]["containers"] + template["spec"].get("initContainers", [])
    return found


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    group, _, version = manifest["apiVersion"].rpartition("/")
    return (
        manifest["kind"] == target["kind"]
        and manifest["metadata"]["name"] == target["name"]
        and target.get("group", group) == group
        and target.get("version", version) == version
    )
