"""The manifests agree with each other, with the configuration, with the command line and with Ray itself."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster.config import Config, load
from cluster.ray_settings import CLUSTER, EVERYWHERE, of_server
from storage.journal import JOURNAL_BYTES_MAX
from tests.k8s import cli
from tests.k8s.render import K8S, KUSTOMIZATIONS, REPO, Manifest, containers, pod_templates, render
from tests.k8s.render import load as load_yaml

FROZEN_NODE_S_MAX = 3.0
"""Longest time until a frozen node is declared dead; its users wait that long."""


@pytest.fixture(scope="module", params=list(KUSTOMIZATIONS))
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(KUSTOMIZATIONS[request.param]) + load_yaml(K8S / "toolbox.yaml")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    found = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    assert len(found) == 1
    return found[0]


def config_data(manifests: list[Manifest]) -> dict[str, str]:
    return one(manifests, "ConfigMap")["data"]


def example_secret() -> dict[str, str]:
    return one(load_yaml(K8S / "secret.example.yaml"), "Secret")["stringData"]


def serve_config(manifests: list[Manifest]) -> dict[str, Any]:
    return yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])


def ray_pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    return pod_templates(one(manifests, "RayService"))


def workers(manifests: list[Manifest]) -> list[Manifest]:
    return one(manifests, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]


# what the configuration says


def test_the_configuration_is_one_that_the_server_takes(manifests: list[Manifest]) -> None:
    keys = {"TITANMEM_API_KEYS": "acme=0123456789abcdef", "TITANMEM_ADMIN_KEY": "fedcba9876543210"}
    config = load(env=config_data(manifests) | keys)
    assert not config.loopback
    assert config.store.startswith("s3://")
    assert config.snapshots.startswith("s3://")


def test_every_variable_is_a_field(manifests: list[Manifest]) -> None:
    fields = {f"TITANMEM_{name.upper()}" for name in Config.__dataclass_fields__}
    ours = {name for name in config_data(manifests) | example_secret() if name.startswith("TITANMEM_")}
    assert ours <= fields


def test_the_placeholders_are_refused(manifests: list[Manifest]) -> None:
    with pytest.raises(ValueError, match="without spaces"):
        load(env=config_data(manifests) | example_secret())


def test_only_one_job_makes_the_backups(manifests: list[Manifest]) -> None:
    backup = one(manifests, "CronJob", "titanmem-snapshot")
    assert containers(backup)[0]["command"][:3] == ["titanmem", "snapshot", "create"]
    assert backup["spec"]["concurrencyPolicy"] == "Forbid"
    assert float(config_data(manifests)["TITANMEM_SNAPSHOT_INTERVAL_S"]) == 0


def test_every_shard_finds_a_gpu(manifests: list[Manifest]) -> None:
    gpus = 0
    for group in workers(manifests):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["minReplicas"] * int(
            group["rayStartParams"].get("num-gpus") or limits.get("nvidia.com/gpu", 0)
        )
    assert gpus >= int(config_data(manifests)["TITANMEM_SHARDS"])


def test_the_journal_lies_on_the_claimed_volume(manifests: list[Manifest]) -> None:
    claim = one(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert [group["maxReplicas"] for group in workers(manifests)] == [1], "two pods would wait for one disk"
    journal = Path(config_data(manifests)["TITANMEM_JOURNAL_DIR"])
    for template in ray_pods(manifests).values():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {
            m["mountPath"]: volumes[m["name"]] for m in template["spec"]["containers"][0]["volumeMounts"]
        }
        holding = [mounts[str(folder)] for folder in journal.parents if str(folder) in mounts]
        assert [v["persistentVolumeClaim"]["claimName"] for v in holding] == [claim["metadata"]["name"]]


def test_the_disk_holds_every_journal(manifests: list[Manifest]) -> None:
    size = one(manifests, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"]
    needed = int(config_data(manifests)["TITANMEM_SHARDS"]) * JOURNAL_BYTES_MAX
    # SQLite's write-ahead log may be as large as the journal itself.
    assert int(size.removesuffix("Gi")) * 2**30 >= 2 * needed
    assert JOURNAL_BYTES_MAX == 2**30, "docs/operations.md alarms at 0.7 * 2^30"


def test_the_head_is_on_the_node_of_the_disk(manifests: list[Manifest]) -> None:
    pods = ray_pods(manifests)
    head = pods.pop("head")["spec"]
    (rule,) = head["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    for worker in pods.values():
        assert rule["labelSelector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
        assert head.get("tolerations") == worker["spec"].get("tolerations"), "it could not follow"


# ports, names and labels


def test_one_port_everywhere(manifests: list[Manifest]) -> None:
    port = int(config_data(manifests)["TITANMEM_PORT"])
    assert serve_config(manifests)["http_options"] == {
        "host": config_data(manifests)["TITANMEM_HOST"],
        "port": port,
    }
    for template in ray_pods(manifests).values():
        ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == port
    service = one(manifests, "Service")
    assert service["spec"]["ports"] == [{"name": "http", "port": port, "targetPort": "serve"}]
    url = f"http://{service['metadata']['name']}:{port}"
    for caller in (one(manifests, "CronJob", "titanmem-snapshot"), one(manifests, "Pod")):
        assert {"name": "TITANMEM_URL", "value": url} in containers(caller)[0]["env"]
    rules = one(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert {"from": [{"namespaceSelector": {}}], "ports": [{"port": port}]} in rules
    assert f"EXPOSE {port}\n" in (REPO / "Dockerfile").read_text(encoding="utf-8")


def test_probes_ask_what_is_there(manifests: list[Manifest]) -> None:
    asked = set()
    for name, template in ray_pods(manifests).items():
        container = template["spec"]["containers"][0]
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = container[probe]["httpGet"]
            assert get["port"] in ports
            asked.add((name == "head", probe, get["path"]))
    routes = (REPO / "cluster").rglob("*.py")
    source = "\n".join(path.read_text(encoding="utf-8") for path in routes)
    for path in ("/livez", "/readyz"):
        assert any(found == path for _, _, found in asked)
        assert f'"{path}"' in source
    assert (False, "readinessProbe", "/readyz") in asked
    assert (False, "startupProbe", "/livez") in asked
    assert not any(head and path in ("/livez", "/readyz") for head, _, path in asked), "no application there"


def test_selectors_find_pods(manifests: list[Manifest]) -> None:
    pods = ray_pods(manifests)
    # What KubeRay adds to every pod of a cluster.
    labels = {name: pod["metadata"]["labels"] | {"ray.io/is-ray-node": "yes"} for name, pod in pods.items()}

    def found(selector: dict[str, str]) -> set[str]:
        return {name for name, have in labels.items() if selector.items() <= have.items()}

    assert found(one(manifests, "Service")["spec"]["selector"]) == set(pods) - {"head"}
    assert found(one(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]) == set(pods)
    assert found(one(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]) == set(pods)


def test_names_that_are_referred_to_exist(manifests: list[Manifest]) -> None:
    account = one(manifests, "ServiceAccount")["metadata"]["name"]
    secret = one(load_yaml(K8S / "secret.example.yaml"), "Secret")
    config = one(manifests, "ConfigMap")["metadata"]["name"]
    for manifest in manifests:
        for template in pod_templates(manifest).values():
            assert template["spec"]["serviceAccountName"] == account
            volumes = {volume["name"] for volume in template["spec"]["volumes"]}
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for container in containers(manifest):
            for source in container.get("envFrom", []):
                reference = source.get("configMapRef") or source["secretRef"]
                assert reference["name"] in (config, secret["metadata"]["name"])
            for variable in container.get("env", []):
                if (reference := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                    assert reference["name"] == secret["metadata"]["name"]
                    assert reference["key"] in secret["stringData"]
    binding = one(manifests, "RoleBinding")
    assert binding["roleRef"]["name"] == one(manifests, "Role")["metadata"]["name"]


# images, versions, commands


def test_one_image_of_this_release(manifests: list[Manifest], project: dict[str, Any]) -> None:
    images = {c["image"] for m in manifests if m["kind"] != "Pod" for c in containers(m)}
    assert [c["image"] for c in containers(one(manifests, "Pod"))] == [f"titanmem:{project['version']}"]
    gpu = any("nvidia.com/gpu" in c["resources"]["limits"] for m in manifests for c in containers(m))
    assert images == {f"titanmem:{project['version']}{'-cuda' if gpu else ''}"}
    assert f"-t {images.pop()} " in (REPO / "Dockerfile").read_text(encoding="utf-8")


def test_the_ray_version_is_the_pinned_one(manifests: list[Manifest], project: dict[str, Any]) -> None:
    pinned = next(d.split("==")[1] for d in project["dependencies"] if d.startswith("ray["))
    assert one(manifests, "RayService")["spec"]["rayClusterConfig"]["rayVersion"] == pinned


def test_the_image_runs_as_the_user_of_the_pods(manifests: list[Manifest]) -> None:
    dockerfile = (REPO / "Dockerfile").read_text(encoding="utf-8")
    for manifest in manifests:
        for template in pod_templates(manifest).values():
            security = template["spec"]["securityContext"]
            assert security["runAsNonRoot"] is True
            assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
            assert template["spec"]["enableServiceLinks"] is False, "TITANMEM_PORT=tcp://… would be our port"
            assert template["spec"]["automountServiceAccountToken"] is False
        for container in containers(manifest):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert set(container["resources"]["requests"]) == set(container["resources"]["limits"])
    entry = re.findall(r'^ENTRYPOINT \["(\w+)"\]\nCMD \["(\w+)"\]$', dockerfile, re.MULTILINE)
    assert [list(words) for words in entry] == [["titanmem", "serve"]]
    cli.check(list(entry[0]))


def test_the_image_holds_every_room() -> None:
    dockerfile = (REPO / "Dockerfile").read_text(encoding="utf-8")
    ignored = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for room in ("kernels", "storage", "titanmem", "actors", "cluster"):
        assert f"COPY {room} {room}\n" in dockerfile
        assert f"!{room}" in ignored


def test_commands_exist(manifests: list[Manifest]) -> None:
    started = [c for m in manifests if m["kind"] != "Pod" for c in containers(m)]
    commands = [container["command"] for container in started if "command" in container]
    assert len(commands) == 2
    for command in commands:
        cli.check(command)


@pytest.mark.parametrize(
    "words",
    [["titanmem", "snapshots", "create"], ["titanmem", "snapshot", "create", "--jsn"], ["titan", "serve"]],
)
def test_a_command_that_does_not_exist_is_caught(words: list[str]) -> None:
    with pytest.raises(AssertionError):
        cli.check(words)


# what Ray understands


def test_serve_takes_its_configuration(manifests: list[Manifest]) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_config(manifests))
    module, _, name = schema.applications[0].import_path.partition(":")
    tree = ast.parse((REPO / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(functions) == 1
    required = len(functions[0].args.args) - len(functions[0].args.defaults)
    assert required <= 1, "Serve calls a builder with the application's args alone"


def test_start_parameters_are_options_of_ray_start(manifests: list[Manifest]) -> None:
    from ray.scripts.scripts import start

    options = {name.removeprefix("--") for option in start.params for name in option.opts}
    cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= options
    assert "num-gpu" not in options


def test_the_only_node_of_a_machine_is_not_given_up_in_seconds() -> None:
    alone = of_server(joined=False)
    assert (
        int(alone["RAY_health_check_failure_threshold"]) * int(alone["RAY_health_check_timeout_ms"]) >= 60_000
    )
    assert of_server(joined=True).items() >= CLUSTER.items()


def test_a_frozen_node_is_noticed_in_seconds(manifests: list[Manifest]) -> None:
    core = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    known = core.read_bytes()
    for template in ray_pods(manifests).values():
        env = {e["name"]: e["value"] for e in template["spec"]["containers"][0]["env"]}
        for name in env:
            # Ray ignores variables that it does not know, so the names are looked up in the program itself.
            assert re.search(rb"\0" + name.encode() + rb"\0", known), f"Ray {ray.__version__} knows no {name}"
        period, timeout = env["RAY_health_check_period_ms"], env["RAY_health_check_timeout_ms"]
        attempts = int(env["RAY_health_check_failure_threshold"])
        assert env.items() >= {**EVERYWHERE, **CLUSTER}.items(), "cluster/ray_settings.py says the same"
        assert attempts * (int(period) + int(timeout)) / 1000 <= FROZEN_NODE_S_MAX
        assert attempts > 1, "one lost packet would take a node away"
    assert not re.search(rb"\0RAY_health_check_period_s\0", known)
