"""Strict, offline validation: a field that Kubernetes or KubeRay does not know is an error.

Core kinds go through kubernetes-validate, KubeRay's through the schemas of its own resource definitions with
`additionalProperties: false` wherever properties stand (the API server would drop such fields in silence).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.render import REPO, Manifest, pod_templates

KUBERNETES = "1.34"
"""Version whose schemas the core kinds are held against."""
UPGRADE_TYPES = {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}
"""KubeRay's, from rayservice_types.go; the definition has no enumeration for them."""
HOW_TO_GET_THEM = (
    "no KubeRay definitions in {folder}: copy ray-operator/config/crd/bases/ray.io_*.yaml of github.com/"
    "ray-project/kuberay there, or set KUBERAY_CRDS to the folder that has them"
)


class Invalid(Exception):
    """A manifest that breaks its schema; the message says where."""


def crd_folder() -> Path:
    return Path(os.environ.get("KUBERAY_CRDS") or REPO.parent / "shared" / "schemas" / "kuberay")


@cache
def kuberay_validator(kind: str, folder: Path) -> jsonschema.Draft202012Validator:
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        raise FileNotFoundError(HOW_TO_GET_THEM.format(folder=folder))
    versions = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
    """`schema` with unknown fields forbidden wherever it names any."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


def check(manifest: Manifest) -> None:
    """Raises `Invalid`."""
    if manifest["apiVersion"].startswith("ray.io/"):
        _check_kuberay(manifest)
    else:
        _check_core(manifest)


def _check_kuberay(manifest: Manifest) -> None:
    errors = list(kuberay_validator(manifest["kind"], crd_folder()).iter_errors(manifest))
    if errors:
        raise Invalid("; ".join(f"{e.json_path}: {e.message[:200]}" for e in errors))
    kind = manifest["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
    if kind not in UPGRADE_TYPES:
        raise Invalid(f"$.spec.upgradeStrategy.type: {kind!r} is not one of {sorted(UPGRADE_TYPES)}")
    # The definitions leave all metadata open, so it is held against the core schemas, and so are the pods.
    _check_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})
    for template in pod_templates(manifest).values():
        _check_core({"apiVersion": "v1", "kind": "Pod", **template})


def _check_core(manifest: Manifest) -> None:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Invalid(f"{'.'.join(map(str, error.path))}: {error.message[:200]}") from None
    except kubernetes_validate.SchemaNotFoundError as error:
        raise Invalid(error.message) from None


def _loader() -> Any:
    """libyaml's loader where PyYAML has it: the definitions are 3 MB."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
