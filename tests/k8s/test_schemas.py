"""Every manifest obeys its schema with unknown fields forbidden, and planted typos are caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import render, schemas
from tests.k8s.render import K8S, KUSTOMIZATIONS, Manifest

BY_HAND = (K8S / "secret.example.yaml", K8S / "toolbox.yaml")
"""Applied by people, not by the kustomizations."""


def named(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    assert len(found) == len(manifests), "two manifests of one kind and name"
    return found


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_manifest_is_valid(name: str) -> None:
    manifests = render.render(KUSTOMIZATIONS[name]) + [m for path in BY_HAND for m in render.load(path)]
    kinds = {manifest["kind"] for manifest in manifests}
    assert kinds == {
        "Namespace", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Secret", "PersistentVolumeClaim",
        "RayService", "Service", "NetworkPolicy", "PodDisruptionBudget", "CronJob", "Pod",
    }  # fmt: skip
    for manifest in manifests:
        schemas.check(manifest)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_plain_loader_agrees_with_kubectl(name: str) -> None:
    plain = named(render.with_yaml(KUSTOMIZATIONS[name]))
    assert ("RayService", "titanmem") in plain
    if shutil.which("kubectl"):
        assert plain == named(render.with_kubectl(KUSTOMIZATIONS[name]))


def test_every_file_is_used() -> None:
    listed: set[Path] = set(BY_HAND)
    for folder in KUSTOMIZATIONS.values():
        kustomization = render.yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        names = kustomization["resources"] + [patch["path"] for patch in kustomization.get("patches", [])]
        listed |= {folder / "kustomization.yaml", *(folder / name for name in names)}
    assert {path for path in listed if path.is_file()} == set(K8S.rglob("*.yaml"))


def rename(*path: str | int, to: str) -> Callable[[Manifest], None]:
    """A typo: the last key of `path` is called `to`."""

    def plant(manifest: Manifest) -> None:
        place: Any = manifest
        for part in path[:-1]:
            place = place[part]
        place[to] = place.pop(path[-1])

    return plant


def put(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    """A wrong value at `path`."""

    def plant(manifest: Manifest) -> None:
        place: Any = manifest
        for part in path[:-1]:
            place = place[part]
        assert path[-1] in place
        place[path[-1]] = value

    return plant


RAY = ("spec", "rayClusterConfig")
WORKER = (*RAY, "workerGroupSpecs", 0)
POD = (*WORKER, "template", "spec")
CONTAINER = (*POD, "containers", 0)
STARTUP = (*CONTAINER, "startupProbe")
HEAD = (*RAY, "headGroupSpec", "template", "spec", "containers", 0)
JOB = ("spec", "jobTemplate", "spec")
PLANTED: list[tuple[str, str, Callable[[Manifest], None]]] = [
    ("RayService", "serveConfigV3", rename("spec", "serveConfigV2", to="serveConfigV3")),
    ("RayService", "lables", rename("metadata", "labels", to="lables")),
    ("RayService", "raystartParams", rename(*WORKER, "rayStartParams", to="raystartParams")),
    ("RayService", "replica", rename(*WORKER, "replicas", to="replica")),
    ("RayService", "enviroment", rename(*HEAD, "env", to="enviroment")),
    ("RayService", "resource", rename(*CONTAINER, "resources", to="resource")),
    ("RayService", "readynessProbe", rename(*CONTAINER, "readinessProbe", to="readynessProbe")),
    ("RayService", "failureTreshold", rename(*STARTUP, "failureThreshold", to="failureTreshold")),
    ("RayService", "serviceAccount_name", rename(*POD, "serviceAccountName", to="serviceAccount_name")),
    ("RayService", "anotations", put(*WORKER, "template", "metadata", value={"anotations": {}})),
    ("RayService", "Rolling", put("spec", "upgradeStrategy", "type", value="Rolling")),
    ("RayService", "num-gpus", put(*RAY, "headGroupSpec", "rayStartParams", "num-gpus", value=1)),
    ("RayService", "replicas", put(*WORKER, "replicas", value="one")),
    ("CronJob", "shedule", rename("spec", "schedule", to="shedule")),
    ("CronJob", "backofflimit", rename(*JOB, "backoffLimit", to="backofflimit")),
    ("CronJob", "commands", rename(*JOB, "template", "spec", "containers", 0, "command", to="commands")),
    ("Service", "selectors", rename("spec", "selector", to="selectors")),
    ("PersistentVolumeClaim", "storageClass", rename("spec", "storageClassName", to="storageClass")),
    ("PodDisruptionBudget", "minAvailabe", rename("spec", "minAvailable", to="minAvailabe")),
    ("NetworkPolicy", "podSelectors", rename("spec", "podSelector", to="podSelectors")),
    ("Role", "resource", rename("rules", 0, "resources", to="resource")),
    ("RoleBinding", "roleReference", rename("roleRef", to="roleReference")),
    ("ConfigMap", "TITANMEM_PORT", put("data", "TITANMEM_PORT", value=8000)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "word", "plant"), PLANTED, ids=[f"{kind}-{word}" for kind, word, _ in PLANTED]
)
def test_a_planted_typo_is_caught(kind: str, word: str, plant: Callable[[Manifest], None]) -> None:
    manifest = next(m for m in render.with_yaml(KUSTOMIZATIONS["base"]) if m["kind"] == kind)
    schemas.check(manifest)
    plant(manifest)
    with pytest.raises(schemas.Invalid):
        schemas.check(manifest)


def test_missing_definitions_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERAY_CRDS", str(tmp_path))
    assert schemas.crd_folder() == tmp_path
    with pytest.raises(FileNotFoundError, match=r"copy ray-operator/config/crd/bases.*KUBERAY_CRDS"):
        schemas.kuberay_validator("RayService", schemas.crd_folder())


def test_a_patch_without_its_place_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nothing to replace"):
        render.apply_patch({"spec": {}}, [{"op": "replace", "path": "/spec/replicas", "value": 1}])
