"""Every rendered object has only fields that the Kubernetes API knows, of the types it wants, and those it requires.

The API is that of the `kubernetes` client, which is generated from Kubernetes' own OpenAPI documents. Objects of operators
(Strimzi, Prometheus, KEDA) are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import models

from tidegate import codec

Object = dict[str, Any]
ELEMENTS = re.compile(r"^([Ll]ist|[Dd]ict)[\[\(](?:str, )?(.+)[\]\)]$")
SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
FOREIGN = {"KafkaTopic", "KafkaUser", "PodMonitor", "PrometheusRule", "ScaledObject", "TriggerAuthentication"}


def model_of(document: Object) -> Any:
    group, _, version = document["apiVersion"].rpartition("/")
    return getattr(models, f"{version.capitalize()}{document['kind']}"), group


def problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """Yield what the API would not take."""
    if found := ELEMENTS.match(kind):
        container: type = list if found[1].lower() == "list" else dict
        if not isinstance(value, container):
            yield f"{path}: not a {found[1].lower()}: {value!r}"
            return
        items = enumerate(value) if isinstance(value, list) else value.items()
        for key, item in items:
            yield from problems(item, found[2], f"{path}.{key}")
    elif kind in SCALARS:
        if not isinstance(value, SCALARS[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{path}: not {kind}: {value!r}"
    elif kind not in {"object", "datetime"}:
        yield from model_problems(value, getattr(models, kind), path)


def model_problems(value: Any, model: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: not an object: {value!r}"
        return
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    for key, item in value.items():
        if key not in names:
            yield f"{path}.{key}: no such field"
        elif item is None:
            yield f"{path}.{key}: null"
        else:
            yield from problems(item, model.openapi_types[names[key]], f"{path}.{key}")
    for name, field in model.model_fields.items():
        json_name = model.attribute_map.get(name, name)
        if field.is_required() and json_name not in value:
            yield f"{path}.{json_name}: is missing"


@pytest.mark.feature("K1")
@pytest.mark.parametrize("name", ["dev", "managed-kafka", "production", "staging", "strimzi"])
def test_the_api_knows_every_field(
    render: Callable[..., list[Object]], values_files: dict[str, Object], name: str
) -> None:
    seen = 0
    for document in render(values_files[f"values-{name}.yaml"]):
        if document["kind"] in FOREIGN:
            continue
        model, _ = model_of(document)
        found = list(model_problems(document, model, f"{document['kind']}/{document['metadata']['name']}"))
        assert found == []
        seen += 1
    assert seen > 8


def test_what_the_api_does_not_know_is_noticed() -> None:
    good: Object = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]}}
    assert list(model_problems(good, models.V1Service, "")) == []
    for spec, said in (
        ({"port": []}, ".spec.port: no such field"),
        ({"ports": [{"port": "http"}]}, ".spec.ports.0.port: not int: 'http'"),
        ({"ports": [{}]}, ".spec.ports.0.port: is missing"),
        ({"ports": None}, ".spec.ports: null"),
    ):
        assert list(model_problems(good | {"spec": spec}, models.V1Service, "")) == [said]


def test_foreign_objects_are_of_the_versions_that_are_documented(
    render: Callable[..., list[Object]], values_files: dict[str, Object]
) -> None:
    versions = {o["kind"]: o["apiVersion"] for values in values_files.values() for o in render(values)}
    assert {kind: versions[kind] for kind in FOREIGN & versions.keys()} == {
        "KafkaTopic": "kafka.strimzi.io/v1",
        "KafkaUser": "kafka.strimzi.io/v1",
        "PodMonitor": "monitoring.coreos.com/v1",
        "PrometheusRule": "monitoring.coreos.com/v1",
    }


def test_no_pod_may_ask_the_cluster_anything(
    render: Callable[..., list[Object]], values_files: dict[str, Object]
) -> None:
    for values in values_files.values():
        kinds = {o["kind"] for o in render(values)}
        assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ServiceAccount", "Secret"}


def test_the_charts_topics_are_the_declared_ones(root: Any) -> None:
    shipped = yaml.safe_load((root / "charts/tidegate/files/topics.yaml").read_text())
    declared = {path.stem for path in (codec.schemas_dir() / "topics").glob("*.yaml")}
    assert {topic["name"].partition(".")[0] for topic in shipped["topics"]} == declared


def test_the_clickhouse_for_those_who_have_none_is_what_the_charts_values_name(root: Path) -> None:
    """No image of it is at hand in tests: what is written is checked as far as the API, Pod Security and the chart go."""
    service, workload = yaml.safe_load_all((root / "k8s/clickhouse/clickhouse.yaml").read_text())
    for document in (service, workload):
        assert list(model_problems(document, model_of(document)[0], document["kind"])) == []
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    assert {port["name"] for port in container["ports"]} == {port["targetPort"] for port in service["spec"]["ports"]}
    asked = {entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"]}
    production = yaml.safe_load((root / "helm/values-production.yaml").read_text())
    assert asked == {production["clickhouse"]["existingSecret"]}
    keys = yaml.safe_load((root / "charts/tidegate/values.yaml").read_text())["clickhouse"]
    assert [entry["valueFrom"]["secretKeyRef"]["key"] for entry in container["env"]] == [
        keys["userKey"],
        keys["passwordKey"],
    ]
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]}
    assert mounted == claims | {volume["name"] for volume in pod["volumes"]}
