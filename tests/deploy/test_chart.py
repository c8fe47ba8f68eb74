"""The chart lints and renders, refuses values it does not know, and every pod in it is restricted and runs what exists."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from typer.testing import CliRunner

from tidegate import metrics
from tidegate.cli.__main__ import app as cli
from tidegate.eventlog.settings import KafkaSettings
from tidegate.executor.settings import ExecutorSettings
from tidegate.gateway.settings import GatewaySettings
from tidegate.process import ProcessSettings
from tidegate.projection.service import TOPICS
from tidegate.projection.settings import ProjectionSettings
from tidegate.registry.process import STATEFUL_POD_VARIABLE
from tidegate.topics.settings import TopicsSettings

Render = Callable[..., list[dict[str, Any]]]
Object = dict[str, Any]

CHART = Path(__file__).resolve().parents[2] / "charts/tidegate"
UID = 10001
ERROR = 3  # of helm_python.lint

MINIMAL: Object = {"kafka": {"bootstrap": "kafka:9092"}}
POOL: Object = {
    "name": "orders",
    "app": "orders:app",
    "queue": "default",
    "slots": 4,
    "replicas": 2,
    "drainSeconds": 60,
    "resources": {"requests": {"cpu": 1, "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
}
JOBS: Object = {
    "namespace": "tools",
    "memoryMib": 1024,
    "cpuMillis": 100,
    "startSeconds": 300,
    "env": {"REGION": "eu"},
    "envFromSecrets": ["keys"],
    "pod": {"nodeSelector": {"pool": "tools"}},
}
SERVER: Object = {"clickhouse": {"url": "http://ch:8123", "existingSecret": "clickhouse"}}
SCALED: Object = SERVER | {"projection": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 8}}}
# Every branch of the templates, together with the environments' own values.
VARIANTS: dict[str, Object] = {
    "minimal": MINIMAL,
    "chdb in an emptyDir": MINIMAL | {"projection": {"persistence": {"enabled": False}}},
    "chdb on a named storage class": MINIMAL | {"projection": {"persistence": {"storageClass": "fast"}}},
    "ClickHouse server": MINIMAL | {"clickhouse": {"url": "http://ch:8123", "existingSecret": "clickhouse"}},
    "projections on a server": MINIMAL | SERVER | {"projection": {"replicas": 3}},
    "projections that are scaled": MINIMAL | SCALED | {"cli": {"enabled": True, "mayResetOffsets": True}},
    "topics made otherwise": MINIMAL | {"topics": {"mode": "external"}},
    "functions as Jobs": MINIMAL
    | {
        "executors": [
            POOL | {"jobs": JOBS},
            POOL | {"name": "plain"},
            POOL | {"name": "few", "jobs": {"namespace": "tools"}},
        ]
    },
    "functions as Jobs with an account that is there": MINIMAL
    | {"serviceAccountName": "ours", "executors": [POOL | {"jobs": JOBS}]},
    "Strimzi with certificates": {
        "kafka": {"bootstrap": "k:9093", "securityProtocol": "ssl", "topicPrefix": "Blue_"},
        "topics": {"mode": "strimzi", "strimzi": {"authentication": "tls"}},
        "executors": [POOL | {"queue": "gpu"}],
    },
    "everything about it": MINIMAL
    | {
        "topics": {"acls": True, "principals": ["gate=User:CN=gate"]},
        "health": {"enabled": False},
        "metrics": {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")},
        "networkPolicy": {
            "enabled": True,
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
            "gatewayFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        },
        "projection": {"sql": {"enabled": True}},
        "cli": {"enabled": True, "env": {"COLUMNS": "200"}},
        "podAnnotations": {"a": "b"},
        "scheduling": {
            "spread": "DoNotSchedule",
            "priorityClassName": "high",
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
        },
        "executors": [POOL | {"autoscaling": {"enabled": True, "maxReplicas": 9, "prometheus": "http://p:9090"}}],
        "extraObjects": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "{{ .Release.Name }}-tidegate-extra", "labels": {}},
            }
        ],
    },
    "all that is optional": {
        "topics": {"production": False, "partitions": {"run": 16}},
        "image": {"digest": "sha256:" + "0" * 64},
        "imagePullSecrets": ["registry"],
        "serviceAccountName": "tidegate",
        "env": {"TIDEGATE_LOG_LEVEL": "debug"},
        "kafka": {
            "bootstrap": "a:9092,b:9092",
            "securityProtocol": "sasl_ssl",
            "saslMechanism": "PLAIN",
            "existingSecret": "kafka",
            "secretKeys": {"SASL_USERNAME": "username", "SASL_PASSWORD": "password"},
            "caSecret": "kafka-ca",
        },
        "executors": [
            POOL,
            POOL | {"name": "other", "env": {"A": "1"}, "envFromSecrets": ["keys"], "kafkaSecret": "other-kafka"},
        ],
    },
}


ENVIRONMENTS = ["dev", "managed-kafka", "production", "staging", "strimzi"]


@pytest.fixture(params=[*VARIANTS, *(f"values-{name}.yaml" for name in ENVIRONMENTS)])
def values(request: pytest.FixtureRequest, values_files: dict[str, Object]) -> Object:
    """Values of every variant and of every environment."""
    return copy.deepcopy({**VARIANTS, **values_files}[request.param])


@pytest.fixture
def objects(render: Render, values: Object) -> list[Object]:
    """What the chart makes of them."""
    return render(values)


def pod_specs(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield `Kind/name` and the spec of the pods that each object makes."""
    for document in objects:
        name = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "Pod":
            yield name, document["spec"]
        elif "template" in document.get("spec", {}):
            yield name, document["spec"]["template"]["spec"]


def workloads(objects: list[Object]) -> list[Object]:
    return [document for document in objects if document["kind"] in {"StatefulSet", "Deployment"}]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def environment(spec: Object) -> Object:
    return {entry["name"]: entry for entry in spec["containers"][0]["env"]}


def image_of(objects: list[Object], kind: str, name: str) -> str:
    image = named(objects, kind, name)["spec"]["template"]["spec"]["containers"][0]["image"]
    assert isinstance(image, str)
    return image


# --- lint and schema ---------------------------------------------------------------------------------------------------


@pytest.mark.feature("K1")
def test_chart_lints_without_warnings(values: Object) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert report["errors"] == []
    # Informational only: the chart has no icon.
    assert [m for m in report["messages"] if m["severity"] > 1] == []


def test_every_environment_is_tested(values_files: dict[str, Object]) -> None:
    assert set(values_files) == {f"values-{name}.yaml" for name in ENVIRONMENTS}


REFUSED: dict[str, tuple[Object, str]] = {
    "no Kafka": ({}, "bootstrap"),
    "address without port": ({"kafka": {"bootstrap": "kafka"}}, "bootstrap"),
    "unknown key": (MINIMAL | {"schedulr": {}}, "schedulr"),
    "unknown key of a service": (MINIMAL | {"gate": {"replica": 3}}, "replica"),
    "unknown key of the connection": ({"kafka": {"bootstrap": "k:1", "password": "x"}}, "password"),
    "unknown resource": (MINIMAL | {"gate": {"resources": {"limits": {"cpus": 1}}}}, "cpus"),
    "more than one projection on chDB": (MINIMAL | {"projection": {"replicas": 2}}, "Set clickhouse.url"),
    "scaling of a projection on chDB": (MINIMAL | {"projection": SCALED["projection"]}, "Set clickhouse.url"),
    "more projections than partitions": (MINIMAL | SCALED | {"topics": {"partitions": {"run": 6}}}, "more than 6 part"),
    "fewer projections than fewest": (
        MINIMAL | SERVER | {"projection": {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}}},
        "minReplicas",
    ),
    "replicas as text": (MINIMAL | {"scheduler": {"replicas": "3"}}, "replicas"),
    "number in the environment": (MINIMAL | {"env": {"TIDEGATE_GATE_LEASE_S": 10}}, "TIDEGATE_GATE_LEASE_S"),
    "a variable that the chart sets": (MINIMAL | {"env": {"TIDEGATE_INSTANCE_ID": "x"}}, "TIDEGATE_INSTANCE_ID"),
    "SASL without a mechanism": ({"kafka": {"bootstrap": "k:1", "securityProtocol": "sasl_ssl"}}, "saslMechanism"),
    "secret without keys": ({"kafka": {"bootstrap": "k:1", "existingSecret": "s"}}, "secretKeys"),
    "keys without secret": ({"kafka": {"bootstrap": "k:1", "secretKeys": {"SASL_USERNAME": "u"}}}, "secretKeys"),
    "unknown variable from a secret": (
        {"kafka": {"bootstrap": "k:1", "existingSecret": "s", "secretKeys": {"SASL_USER": "u"}}},
        "SASL_USER",
    ),
    "no Kafka and a Kafka at once": (MINIMAL | {"dev": {"kafka": {"enabled": True}}}, "bootstrap"),
    "development on replicas": ({"dev": {"kafka": {"enabled": True}}, "topics": {"production": True}}, "production"),
    "a key without its certificate": (
        {"kafka": {"bootstrap": "k:1", "existingSecret": "s", "secretKeys": {"SSL_KEY": "k"}}},
        "SSL_CERTIFICATE",
    ),
    "a secret for no role": ({"kafka": {"bootstrap": "k:1", "secrets": {"boss": "s"}}}, "boss"),
    "topics by nobody known": (MINIMAL | {"topics": {"mode": "magic"}}, "mode"),
    "a principal without a role": (MINIMAL | {"topics": {"principals": ["User:x"]}}, "principals"),
    "scaling without a measure": (
        MINIMAL | {"executors": [POOL | {"autoscaling": {"enabled": True, "maxReplicas": 3}}]},
        "prometheus",
    ),
    "an object of no kind": (MINIMAL | {"extraObjects": [{"apiVersion": "v1"}]}, "kind"),
    "a peer that is none": (MINIMAL | {"networkPolicy": {"gatewayFrom": [{"host": "a"}]}}, "host"),
    "partitions of no group": (MINIMAL | {"topics": {"partitions": {"runs": 8}}}, "runs"),
    "pool without app": (MINIMAL | {"executors": [{k: v for k, v in POOL.items() if k != "app"}]}, "app"),
    "pool without slots": (MINIMAL | {"executors": [POOL | {"slots": 0}]}, "slots"),
    "pool with an image of no version": (MINIMAL | {"executors": [POOL | {"image": {"repository": "o"}}]}, "image"),
    "pool with an unknown key": (MINIMAL | {"executors": [POOL | {"queues": ["a"]}]}, "queues"),
    "pool name that is no label": (MINIMAL | {"executors": [POOL | {"name": "Orders"}]}, "name"),
    "jobs nowhere": (MINIMAL | {"executors": [POOL | {"jobs": {}}]}, "namespace"),
    "jobs with containers": (MINIMAL | {"executors": [POOL | {"jobs": JOBS | {"pod": {"containers": []}}}]}, "pod"),
    "jobs beside our secrets": (
        MINIMAL | {"executors": [POOL | {"jobs": {"namespace": "default"}}]},
        "another namespace",
    ),
    "commands with replicas": (MINIMAL | {"cli": {"enabled": True, "replicas": 2}}, "replicas"),
    "no time to drain": (MINIMAL | {"gate": {"terminationGracePeriodSeconds": 0}}, "terminationGracePeriodSeconds"),
    "credentials for no server": (MINIMAL | {"clickhouse": {"existingSecret": "s"}}, "url"),
    "a DSN for a server": (MINIMAL | {"clickhouse": {"url": "clickhouse://u:p@h"}}, "url"),
    "digest of another kind": (MINIMAL | {"image": {"digest": "md5:1"}}, "digest"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused(render: Render, case: str) -> None:
    values, offending = REFUSED[case]
    with pytest.raises(helm_python.HelmError, match=offending):
        render(values)


def test_two_pools_of_one_name_are_refused(render: Render) -> None:
    with pytest.raises(helm_python.HelmError, match='two pools of executors have the name "orders"'):
        render(MINIMAL | {"executors": [POOL, POOL]})


def test_too_long_names_are_refused_not_cut(render: Render) -> None:
    with pytest.raises(helm_python.HelmError, match="choose a shorter release name"):
        render(MINIMAL, release="r" * 50)


# What is Kubernetes' own, to be taken as it is.
OPEN = ("/properties/global", "Selector", "/ipBlock", "Affinity", "/extraObjects/items")


def test_schema_is_strict_at_every_level() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(node: Any, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and not path.endswith(OPEN):
                assert "additionalProperties" in node, path
                shut = node["additionalProperties"] is False or "propertyNames" in node
                assert shut or path == "/definitions/labelMap", path
            for key, child in node.items():
                check(child, f"{path}/{key}")
        elif isinstance(node, list):
            for child in node:
                check(child, path)

    check(schema, "")


def test_every_value_has_a_default_or_is_refused_without() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(defaults)
    for name in set(defaults) - {"executors", "scheduler", "gate", "gateway", "env", "podAnnotations", "extraObjects"}:
        if not isinstance(defaults[name], dict):
            continue
        assert set(schema["properties"][name]["properties"]) == set(defaults[name])
    for name in ("scheduler", "gate", "gateway"):
        assert set(schema["definitions"]["replicated"]["properties"]) == set(defaults[name])
    assert set(schema["properties"]["projection"]["properties"]) == set(defaults["projection"])


# --- what is rendered --------------------------------------------------------------------------------------------------


def test_names_are_unique(objects: list[Object]) -> None:
    names = [(document["kind"], document["metadata"]["name"]) for document in objects]
    assert len(names) == len(set(names))


@pytest.mark.feature("K1")
def test_every_pod_is_restricted(objects: list[Object]) -> None:
    seen = 0
    resets = [o["metadata"]["name"] for o in objects if o["kind"] == "Role" and o["metadata"]["name"].endswith("-cli")]
    for name, spec in pod_specs(objects):
        seen += 1
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == UID, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        may_ask = any(entry["name"] == "TIDEGATE_EXECUTOR_JOB_NAMESPACE" for entry in spec["containers"][0]["env"])
        assert spec["automountServiceAccountToken"] is (may_ask or name.partition("/")[2] in resets), name
        assert not any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")), name
        allowed = {"name", "emptyDir", "secret", "persistentVolumeClaim"}
        assert all(set(volume) <= allowed for volume in spec["volumes"]), name
        for container in spec["containers"] + spec.get("initContainers", []):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["readOnlyRootFilesystem"] is True, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert not own.get("privileged"), name
            assert not any(port.get("hostPort") for port in container.get("ports", [])), name
            assert "tmp" in {mount["name"] for mount in container["volumeMounts"]}, name
        assert {"name": "tmp", "emptyDir": {}} in spec["volumes"], name
    assert seen >= 5


def test_every_pod_says_what_it_needs_and_bounds_its_memory(objects: list[Object]) -> None:
    for name, spec in pod_specs(objects):
        resources = spec["containers"][0]["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert "memory" in resources["limits"], name


def test_every_pod_runs_tidegate_of_a_certain_version(objects: list[Object]) -> None:
    for name, spec in pod_specs(objects):
        (container,) = spec["containers"]
        # Only where people give commands nothing runs by itself.
        assert container["command"] == (["sleep", "infinity"] if name.endswith("-cli") else ["tidegate"]), name
        assert ("args" in container) == (container["command"] == ["tidegate"]), name
        repository, _, digest = container["image"].partition("@")
        tag = repository.rpartition("/")[2].partition(":")[2]
        assert digest or tag not in {"", "latest"}, name


@pytest.mark.feature("K1")
@pytest.mark.parametrize(
    "component",
    ["scheduler", "gate", "projection", "gateway", "executor-orders", "topics", "test-topics", "test-run"],
)
def test_the_command_of_every_pod_exists_with_its_options(render: Render, component: str) -> None:
    pods = {name.partition("/tidegate-")[2]: spec for name, spec in pod_specs(render(VARIANTS["all that is optional"]))}
    assert set(pods) == {
        "scheduler",
        "gate",
        "projection",
        "gateway",
        "executor-orders",
        "executor-other",
        "topics",
        "test-topics",
        "test-run",
    }
    arguments = pods[component]["containers"][0]["args"]
    # Options are parsed before the help is shown, so one that does not exist is an error.
    result = CliRunner().invoke(cli, [*arguments, "--help"])
    assert result.exit_code == 0, f"tidegate {' '.join(arguments)}: {result.output or result.exception}"


def test_every_variable_of_the_chart_is_a_setting(objects: list[Object], values: Object) -> None:
    known = {f"TIDEGATE_KAFKA_{field.upper()}" for field in KafkaSettings.model_fields}
    known |= {f"TIDEGATE_{field.upper()}" for field in ProcessSettings.model_fields}
    known |= {f"TIDEGATE_{field.upper()}" for field in ProjectionSettings.model_fields}
    known |= {f"TIDEGATE_EXECUTOR_{field.upper()}" for field in ExecutorSettings.model_fields}
    known |= {f"TIDEGATE_{field.upper()}" for field in GatewaySettings.model_fields}
    known |= {f"TIDEGATE_TOPICS_{field.upper()}" for field in TopicsSettings.model_fields}
    known |= {
        STATEFUL_POD_VARIABLE,
        "TIDEGATE_SQL_URL",
        "TIDEGATE_GATEWAY_URL",
        "TIDEGATE_HTTP_HOST",
        "TIDEGATE_HTTP_PORT",
    }
    given = {*values.get("env", {}), *values.get("cli", {}).get("env", {})}.union(
        *(pool.get("env", {}) for pool in values.get("executors", []))
    )
    for name, spec in pod_specs(objects):
        variables = [entry["name"] for entry in spec["containers"][0]["env"]]
        assert len(variables) == len(set(variables)), name
        assert set(variables) - known - given <= {"HOME", "POD_NAME", "POD_NAMESPACE", "POD_UID"}, name


def test_no_secret_is_in_the_chart(objects: list[Object]) -> None:
    assert not [document for document in objects if document["kind"] == "Secret"]
    for name, spec in pod_specs(objects):
        for variable, entry in environment(spec).items():
            if variable.startswith("TIDEGATE_KAFKA_") and variable.endswith(("_FILE", "_LOCATION")):
                assert entry["value"].startswith("/etc/tidegate/kafka"), name
            elif variable == "TIDEGATE_EXECUTOR_JOB_ENV_SECRETS":
                assert json.loads(entry["value"]) == ["keys"], name  # what they are called
            elif "PASSWORD" in variable or "SECRET" in variable:
                assert set(entry["valueFrom"]) == {"secretKeyRef"}, name


def test_selectors_pick_their_own_pods_and_no_others(objects: list[Object]) -> None:
    pods = {o["metadata"]["name"]: o["spec"]["template"]["metadata"]["labels"] for o in workloads(objects)}
    for workload in workloads(objects):
        wanted = workload["spec"]["selector"]["matchLabels"].items()
        assert [name for name, labels in pods.items() if wanted <= labels.items()] == [workload["metadata"]["name"]]
        for constraint in workload["spec"]["template"]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"].items() == wanted


def test_disruption_budgets_cover_what_has_replicas(objects: list[Object]) -> None:
    budgets = [document["spec"] for document in objects if document["kind"] == "PodDisruptionBudget"]
    assert all(budget["maxUnavailable"] == 1 for budget in budgets)
    covered = [budget["selector"]["matchLabels"] for budget in budgets]
    assert covered == [
        workload["spec"]["selector"]["matchLabels"]
        for workload in sorted(workloads(objects), key=lambda o: o["metadata"]["name"])
        if workload["spec"].get("replicas", 2) > 1  # what is scaled by somebody else may be more than one
    ]


def test_only_pods_of_stateful_sets_claim_that_identity(objects: list[Object]) -> None:
    for workload in workloads(objects):
        variables = environment(workload["spec"]["template"]["spec"])
        is_stateful = workload["kind"] == "StatefulSet"
        assert (STATEFUL_POD_VARIABLE in variables) == is_stateful, workload["metadata"]["name"]
        assert variables["TIDEGATE_INSTANCE_ID"]["value"] == "$(POD_NAME)"
        # Kubernetes expands only what stands above.
        order = list(variables)
        assert order.index("POD_NAME") < order.index("TIDEGATE_INSTANCE_ID")
        if is_stateful:
            assert max(order.index("POD_NAME"), order.index("POD_NAMESPACE")) < order.index(STATEFUL_POD_VARIABLE)
            assert named(objects, "Service", workload["spec"]["serviceName"])["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("service", ["scheduler", "gate"])
def test_owners_are_stateful(render: Render, service: str) -> None:
    assert named(render(MINIMAL), "StatefulSet", f"tidegate-{service}")["spec"]["replicas"] == 2


def test_the_kafka_for_development_is_ready_when_it_answers(render: Render, values_files: dict[str, Object]) -> None:
    objects = render(values_files["values-dev.yaml"])
    (container,) = named(objects, "StatefulSet", "tidegate-kafka")["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["tcpSocket"] == {"port": "kafka"}
    assert container["ports"] == [{"name": "kafka", "containerPort": 9092}]
    (port,) = named(objects, "Service", "tidegate-kafka")["spec"]["ports"]
    scheduler = environment(named(objects, "StatefulSet", "tidegate-scheduler")["spec"]["template"]["spec"])
    assert scheduler["TIDEGATE_KAFKA_BOOTSTRAP"]["value"] == f"tidegate-kafka:{port['port']}"
    assert "tidegate-kafka" in container["args"]
    # The job cannot reach it at the first try; elsewhere each try's log is kept.
    (job,) = [each for each in objects if each["kind"] == "Job"]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert named(render(MINIMAL), "Job", "tidegate-topics")["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_projection_on_chdb_is_one_process_with_a_disk(render: Render) -> None:
    spec = named(render(MINIMAL), "StatefulSet", "tidegate-projection")["spec"]
    assert spec["replicas"] == 1
    assert [claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]] == ["data"]
    pod = spec["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/var/lib/tidegate"] == "data"
    variables = environment(pod)
    assert variables["TIDEGATE_DATA_DIR"]["value"] == "/var/lib/tidegate"
    assert not {"TIDEGATE_CLICKHOUSE_URL", "TIDEGATE_PROJECTION_GROUP"} & set(variables)


def test_projection_without_a_disk_begins_anew_with_every_pod(render: Render) -> None:
    pod = named(render(VARIANTS["chdb in an emptyDir"]), "StatefulSet", "tidegate-projection")["spec"]["template"][
        "spec"
    ]
    assert {"name": "data", "emptyDir": {}} in pod["volumes"]
    variables = environment(pod)
    assert variables["POD_UID"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert variables["TIDEGATE_PROJECTION_GROUP"]["value"].endswith("$(POD_UID)")
    assert list(variables).index("POD_UID") < list(variables).index("TIDEGATE_PROJECTION_GROUP")


def test_projection_on_a_server_ends_before_its_successor_begins(render: Render) -> None:
    objects = render(VARIANTS["ClickHouse server"])
    spec = named(objects, "Deployment", "tidegate-projection")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    variables = environment(spec["template"]["spec"])
    assert variables["TIDEGATE_CLICKHOUSE_URL"]["value"] == "http://ch:8123"
    password = variables["TIDEGATE_CLICKHOUSE_PASSWORD"]["valueFrom"]
    assert password == {"secretKeyRef": {"name": "clickhouse", "key": "password"}}
    others = [spec for name, spec in pod_specs(objects) if not name.endswith(("-projection", "-test-run", "-cli"))]
    assert not any("TIDEGATE_CLICKHOUSE_PASSWORD" in environment(spec) for spec in others)


def test_who_asks_for_rows_asks_where_the_projection_writes(render: Render) -> None:
    server = {"clickhouse": {"url": "http://ch:8123", "database": "blue", "existingSecret": "clickhouse"}}
    for more in (server, {"projection": {"sql": {"enabled": True}}}):
        pods = {
            name.rpartition("tidegate-")[2]: environment(spec)
            for name, spec in pod_specs(render(MINIMAL | {"cli": {"enabled": True}} | more))
        }
        asked = {variable for variable in pods["cli"] if variable.startswith(("TIDEGATE_CLICKHOUSE", "TIDEGATE_SQL"))}
        for variable in asked:
            assert pods["test-run"][variable] == pods["cli"][variable]
            assert more is not server or pods["projection"][variable] == pods["cli"][variable]
        assert asked == (
            {f"TIDEGATE_CLICKHOUSE_{what}" for what in ("URL", "DATABASE", "USER", "PASSWORD")}
            if more is server
            else {"TIDEGATE_SQL_URL"}
        )


def test_services_wait_for_their_brokers_and_what_ends_by_itself_does_not(render: Render) -> None:
    """A process that ends while they are away is started again by Kubernetes after a pause that doubles up to five minutes."""
    for more, wanted in (({}, "86400"), ({"env": {"TIDEGATE_BROKER_WAIT_S": "5"}}, "5")):
        objects = render(VARIANTS["everything about it"] | more)
        for workload in workloads(objects):
            if not workload["metadata"]["name"].endswith("-cli"):
                assert environment(workload["spec"]["template"]["spec"])["TIDEGATE_BROKER_WAIT_S"]["value"] == wanted
        for name in ("tidegate-test-run", "tidegate-test-topics"):
            found = environment(named(objects, "Pod", name)["spec"]).get("TIDEGATE_BROKER_WAIT_S")
            assert found == ({"name": "TIDEGATE_BROKER_WAIT_S", "value": "5"} if more else None)


def test_services_end_by_themselves_before_they_are_killed(render: Render) -> None:
    default = ProcessSettings.model_fields["stop_within_s"].default
    for grace in (None, 36, 35, 34, 10):
        given = {} if grace is None else {"terminationGracePeriodSeconds": grace}
        services = ("scheduler", "gate", "projection", "gateway")
        objects = render(MINIMAL | dict.fromkeys(services, given))
        for service in services:
            pod = named(objects, "StatefulSet", f"tidegate-{service}")["spec"]["template"]["spec"]
            within = float(environment(pod).get("TIDEGATE_STOP_WITHIN_S", {"value": default})["value"])
            assert 0 < within < pod["terminationGracePeriodSeconds"] == (grace or 60), service
    # Executors drain for as long as their pool says.
    pod = named(render(MINIMAL | {"executors": [POOL]}), "StatefulSet", "tidegate-executor-orders")["spec"]["template"]
    assert "TIDEGATE_STOP_WITHIN_S" not in environment(pod["spec"])


def test_commands_find_the_gateway(render: Render) -> None:
    objects = render(MINIMAL | {"cli": {"enabled": True}})
    cli_pod = named(objects, "Deployment", "tidegate-cli")["spec"]["template"]["spec"]
    service = named(objects, "Service", "tidegate-gateway")
    where = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert environment(cli_pod)["TIDEGATE_GATEWAY_URL"]["value"] == where


def test_what_scales_a_pool_is_not_taken_back_by_an_upgrade(render: Render) -> None:
    scaled = POOL | {"replicas": 1, "autoscaling": {"enabled": True, "maxReplicas": 9, "prometheus": "http://p:9090"}}
    for pool, replicas, budgets in ((scaled, None, 1), (POOL, 2, 1), (POOL | {"replicas": 1}, 1, 0)):
        objects = render(MINIMAL | {"executors": [pool]})
        spec = named(objects, "StatefulSet", "tidegate-executor-orders")["spec"]
        assert spec.get("replicas") == replicas
        found = [o for o in objects if o["kind"] == "PodDisruptionBudget" and "executor" in o["metadata"]["name"]]
        assert len(found) == budgets


def test_what_scales_the_projection_is_not_taken_back_by_an_upgrade(render: Render) -> None:
    for values, replicas, budgets in (
        (SERVER, 1, 0),
        (VARIANTS["projections on a server"], 3, 1),
        (VARIANTS["projections that are scaled"], None, 1),
    ):
        objects = render(MINIMAL | values)
        spec = named(objects, "Deployment", "tidegate-projection")["spec"]
        assert (spec.get("replicas"), spec["strategy"]) == (replicas, {"type": "Recreate"})
        found = [o for o in objects if o["kind"] == "PodDisruptionBudget" and "projection" in o["metadata"]["name"]]
        assert len(found) == budgets
    assert (
        named(render(MINIMAL | {"projection": {"replicas": 0}}), "StatefulSet", "tidegate-projection")["spec"][
            "replicas"
        ]
        == 0
    )


SECRET_KEYS = {"SASL_USERNAME": "name", "SASL_PASSWORD": "word", "SSL_CERTIFICATE": "crt", "SSL_KEY": "key"}
OAUTH = {f"TIDEGATE_KAFKA_SASL_OAUTHBEARER_{what}": what for what in ("CLIENT_ID", "TOKEN_ENDPOINT_URL")}
# How Kafka is secured -> values besides the address, sasl and tls of the trigger, what KEDA reads from secrets and from the pod.
SECURED: dict[str, tuple[Object, tuple[str, str], set[str], set[str]]] = {
    "not": ({}, ("none", "disable"), set(), set()),
    "by certificates": (
        {"securityProtocol": "ssl", "existingSecret": "k", "caSecret": "ca"},
        ("none", "enable"),
        {"k/crt=cert", "k/key=key", "ca/ca.crt=ca"},
        set(),
    ),
    "by passwords": (
        {"securityProtocol": "sasl_ssl", "saslMechanism": "SCRAM-SHA-512", "existingSecret": "k", "caSecret": "ca"},
        ("scram_sha512", "enable"),
        {"k/name=username", "k/word=password", "k/crt=cert", "k/key=key", "ca/ca.crt=ca"},
        set(),
    ),
    "by a password of its own, in the clear": (
        {"securityProtocol": "sasl_plaintext", "saslMechanism": "PLAIN", "secrets": {"projection": "own"}},
        ("plaintext", "disable"),
        {"own/name=username", "own/word=password"},
        set(),
    ),
    "by tokens": (
        {"securityProtocol": "sasl_ssl", "saslMechanism": "OAUTHBEARER", "existingSecret": "k"}
        | {"secretKeys": {"SASL_OAUTHBEARER_CLIENT_SECRET": "secret"}},
        ("oauthbearer", "enable"),
        {"k/secret=password"},
        {"CLIENT_ID=username", "TOKEN_ENDPOINT_URL=oauthTokenEndpointUri"},
    ),
    "by Strimzi": (
        {"securityProtocol": "sasl_ssl", "saslMechanism": "SCRAM-SHA-512", "caSecret": "ca"},
        ("scram_sha512", "enable"),
        {"tidegate-projection/password=password", "ca/ca.crt=ca"},
        {"SASL_USERNAME=username"},
    ),
}


@pytest.mark.feature("K1")
@pytest.mark.parametrize("case", SECURED)
def test_keda_asks_for_the_projections_lag_as_the_projection_does(render: Render, case: str) -> None:
    kafka, (sasl, tls), from_secrets, from_pod = SECURED[case]
    if {"existingSecret", "secrets"} & set(kafka):
        kafka = {"secretKeys": SECRET_KEYS} | kafka
    objects = render(
        SCALED
        | {"kafka": {"bootstrap": "a:1,b:2", "topicPrefix": "Blue_"} | kafka}
        | {"topics": {"mode": "strimzi" if case == "by Strimzi" else "job"}}
        | {"env": OAUTH if case == "by tokens" else {}}
    )
    scaled = named(objects, "ScaledObject", "tidegate-projection")["spec"]
    assert scaled["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "tidegate-projection"}
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 8)
    assert [trigger["metadata"]["topic"] for trigger in scaled["triggers"]] == ["Blue_run-events", "Blue_gate-ledger"]
    assert {"Blue_" + topic for topic in TOPICS} >= {trigger["metadata"]["topic"] for trigger in scaled["triggers"]}
    for trigger in scaled["triggers"]:
        asked = trigger["metadata"]
        assert asked["bootstrapServers"] == "a:1,b:2"
        assert asked["consumerGroup"] == "Blue_" + ProjectionSettings.model_fields["projection_group"].default
        assert (asked["sasl"], asked["tls"], asked["lagThreshold"]) == (sasl, tls, "50000")
        assert all(isinstance(value, str) for value in asked.values())
        assert ("authenticationRef" in trigger) == bool(from_secrets)
    if not from_secrets:
        assert not [o for o in objects if o["kind"] == "TriggerAuthentication"]
        return
    told = named(objects, "TriggerAuthentication", "tidegate-projection")["spec"]
    assert {f"{one['name']}/{one['key']}={one['parameter']}" for one in told["secretTargetRef"]} == from_secrets
    assert {f"{one['name'].split('_KAFKA_')[1]}={one['parameter']}" for one in told.get("env", [])} == {
        f"SASL_OAUTHBEARER_{one}" if case == "by tokens" else one for one in from_pod
    }
    pod = named(objects, "Deployment", "tidegate-projection")["spec"]["template"]["spec"]
    assert {one["name"] for one in told.get("env", [])} <= set(environment(pod))
    mounted = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert {one["name"] for one in told["secretTargetRef"]} <= mounted, "it has none but the projection's own"


def test_keda_follows_the_group_that_the_projection_reads_in(render: Render) -> None:
    for where in ({"env": {"TIDEGATE_PROJECTION_GROUP": "mine"}}, {}):
        own = {"projection": SCALED["projection"] | ({} if where else {"env": {"TIDEGATE_PROJECTION_GROUP": "mine"}})}
        scaled = named(render(MINIMAL | SCALED | own | where), "ScaledObject", "tidegate-projection")["spec"]
        assert {trigger["metadata"]["consumerGroup"] for trigger in scaled["triggers"]} == {"mine"}


@pytest.mark.feature("L4")
@pytest.mark.parametrize("account", ["", "ours"])
def test_the_pod_for_commands_may_scale_the_projection_and_nothing_else(render: Render, account: str) -> None:
    values = VARIANTS["projections that are scaled"] | {"serviceAccountName": account}
    objects = render(values)
    assert len([o for o in objects if o["kind"] == "ServiceAccount"]) == (0 if account else 1)
    (role,) = (o for o in objects if o["kind"] == "Role")
    (binding,) = (o for o in objects if o["kind"] == "RoleBinding")
    assert [
        (*rule["apiGroups"], set(rule["resources"]), rule["resourceNames"], rule["verbs"]) for rule in role["rules"]
    ] == [
        ("apps", {"deployments", "statefulsets"}, ["tidegate-projection"], ["get", "patch"]),
        ("keda.sh", {"scaledobjects"}, ["tidegate-projection"], ["get", "patch"]),
    ]
    assert role["metadata"]["namespace"] == binding["subjects"][0]["namespace"] == "default"
    named_account = binding["subjects"][0]["name"]
    assert named_account == (account or "tidegate-cli")
    for name, spec in pod_specs(objects):
        assert spec["automountServiceAccountToken"] == name.endswith("-cli")
        assert (spec.get("serviceAccountName") == named_account) == (name.endswith("-cli") or bool(account))
    assert not [o for o in render(MINIMAL | {"cli": {"enabled": True}}) if o["kind"] in ("Role", "ServiceAccount")]


def test_gateways_find_each_other(render: Render) -> None:
    objects = render(MINIMAL)
    spec = named(objects, "StatefulSet", "tidegate-gateway")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = environment(spec["template"]["spec"])
    port = container["ports"][0]
    assert port == {"name": "http", "containerPort": int(variables["TIDEGATE_GATEWAY_PORT"]["value"])}
    advertised = variables["TIDEGATE_GATEWAY_ADVERTISED_HOST"]["value"]
    assert advertised == f"$(POD_NAME).{spec['serviceName']}.$(POD_NAMESPACE)"
    assert list(variables).index("POD_NAMESPACE") < list(variables).index("TIDEGATE_GATEWAY_ADVERTISED_HOST")
    assert named(objects, "Service", spec["serviceName"])["spec"]["publishNotReadyAddresses"] is True
    service = named(objects, "Service", "tidegate-gateway")["spec"]
    assert service["selector"] == spec["selector"]["matchLabels"]
    assert service["ports"][0]["targetPort"] == "http"


def test_every_service_is_probed_where_it_answers(render: Render) -> None:
    for workload in workloads(render(VARIANTS["all that is optional"])):
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        probes = {kind: container[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
        live, ready = ({"path": f"/health/{what}", "port": "health"} for what in ("live", "ready"))
        assert probes == {"startupProbe": live, "livenessProbe": live, "readinessProbe": ready}
        variables = environment(pod)
        assert {"name": "health", "containerPort": int(variables["TIDEGATE_HTTP_PORT"]["value"])} in container["ports"]
        assert variables["TIDEGATE_HTTP_HOST"]["value"] == "0.0.0.0"  # noqa: S104 - of a pod
    for workload in workloads(render(VARIANTS["everything about it"])):
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        assert not any("Probe" in key for key in container)


@pytest.mark.feature("T4")
@pytest.mark.parametrize("variant", ["functions as Jobs", "functions as Jobs with an account that is there"])
def test_executors_that_make_jobs_may_do_that_in_one_namespace_and_nothing_else(render: Render, variant: str) -> None:
    objects = render(VARIANTS[variant])
    roles = {o["metadata"]["name"]: o for o in objects if o["kind"] == "Role"}
    bindings = {o["metadata"]["name"]: o for o in objects if o["kind"] == "RoleBinding"}
    assert not [o for o in objects if o["kind"].startswith("Cluster")]
    assert set(roles) == set(bindings)
    for name, role in roles.items():
        assert role["metadata"]["namespace"] == bindings[name]["metadata"]["namespace"] == "tools"
        assert role["rules"] == [
            {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "list", "delete"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
            {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        ]
    accounts = {
        workload["metadata"]["name"]: workload["spec"]["template"]["spec"].get("serviceAccountName")
        for workload in workloads(objects)
        if workload["spec"]["template"]["spec"]["automountServiceAccountToken"]
    }
    subjects = [subject for binding in bindings.values() for subject in binding["subjects"]]
    assert sorted(accounts.values()) == sorted(subject["name"] for subject in subjects)
    assert {subject["namespace"] for subject in subjects} == {"default"}
    made = {o["metadata"]["name"] for o in objects if o["kind"] == "ServiceAccount"}
    if "an account" in variant:
        assert (set(accounts.values()), made) == ({"ours"}, set())
    else:
        assert set(accounts) == made == {"tidegate-executor-orders", "tidegate-executor-few"}


@pytest.mark.feature("T4")
def test_what_a_pool_says_of_jobs_becomes_the_executors_settings(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(VARIANTS["functions as Jobs"])

    def settings_of(pool: str) -> ExecutorSettings:
        spec = named(objects, "StatefulSet", f"tidegate-executor-{pool}")["spec"]["template"]["spec"]
        with monkeypatch.context() as patched:
            for variable, entry in environment(spec).items():
                if variable.startswith("TIDEGATE_EXECUTOR_"):
                    patched.setenv(variable, entry["value"])
            return ExecutorSettings()

    orders, few, plain = map(settings_of, ("orders", "few", "plain"))
    assert (orders.job_namespace, orders.job_memory_mib, orders.job_cpu_millis, orders.job_start_s) == (
        "tools",
        1024,
        100,
        300,
    )
    assert (orders.job_env, orders.job_env_secrets) == ({"REGION": "eu"}, ("keys",))
    assert orders.job_pod == {"nodeSelector": {"pool": "tools"}}
    assert orders.job_image == few.job_image != ""
    assert (few.job_namespace, few.job_memory_mib, few.job_env) == ("tools", 512, {})
    assert plain.job_namespace == ""


def mounted_secret(spec: Object) -> str | None:
    return next((v["secret"]["secretName"] for v in spec["volumes"] if v["name"] == "kafka-credentials"), None)


@pytest.mark.feature("K2")
def test_every_service_has_the_credentials_of_its_own_user(render: Render, values_files: dict[str, Object]) -> None:
    for name in ("values-production.yaml", "values-managed-kafka.yaml", "values-strimzi.yaml"):
        secrets = [mounted_secret(spec) for _, spec in pod_specs(render(values_files[name]))]
        assert None not in secrets
        # Only what changes and checks topics shares one: the job and the test.
        assert len(set(secrets)) == len(secrets) - secrets.count("tidegate-kafka-topics") + (
            "tidegate-kafka-topics" in secrets
        ), name


@pytest.mark.feature("K2")
def test_strimzi_users_may_do_what_their_services_need(render: Render) -> None:
    objects = render(VARIANTS["Strimzi with certificates"])
    users = {o["metadata"]["name"]: o for o in objects if o["kind"] == "KafkaUser"}
    used = {mounted_secret(spec) for _, spec in pod_specs(objects)}
    assert used == set(users)

    def may(user: str, operation: str) -> set[str]:
        return {
            acl["resource"]["name"]
            for acl in users[user]["spec"]["authorization"]["acls"]
            if acl["resource"]["type"] == "topic" and operation in acl["operations"]
        }

    topics = {o["spec"]["topicName"]: o for o in objects if o["kind"] == "KafkaTopic"}
    assert {"Blue_step-tasks.gpu", "Blue_step-tasks.smoke", "Blue_gate-ledger"} <= set(topics)
    for name in ("Blue_gate-ledger", "Blue_step-tasks.gpu", "Blue_step-tasks.smoke"):
        assert {user for user in users if name in may(user, "Write")} == {"tidegate-gate"}
    tasks = {name for name in topics if "step-tasks" in name}
    assert may("tidegate-executor-orders", "Read") & tasks == {"Blue_step-tasks.gpu"}
    assert may("tidegate-test", "Read") & tasks == {"Blue_step-tasks.smoke"}
    for made in [*users.values(), *topics.values()]:
        assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert made["metadata"]["name"] == made["metadata"]["name"].lower().replace("_", "-")
    assert {o["spec"]["authentication"]["type"] for o in users.values()} == {"tls"}
    environment_of_gate = environment(named(objects, "StatefulSet", "tidegate-gate")["spec"]["template"]["spec"])
    assert environment_of_gate["TIDEGATE_KAFKA_SSL_KEY_LOCATION"]["value"] == "/etc/tidegate/kafka/SSL_KEY"


def test_nothing_waits_for_a_hook_that_waits_for_it(objects: list[Object], values: Object) -> None:
    """A job after the install, with pods that wait for it, would never end."""
    for o in objects:
        hooks = o["metadata"].get("annotations", {}).get("helm.sh/hook", "")
        assert "post-" not in hooks
        if values.get("dev", {}).get("kafka", {}).get("enabled"):
            assert "pre-" not in hooks, "the Kafka that the job needs is not there before the chart"


def test_alerts_ask_for_metrics_of_this_namespace_and_lead_to_pages(render: Render, root: Path) -> None:
    (rule,) = (o for o in render(VARIANTS["everything about it"]) if o["kind"] == "PrometheusRule")
    for alert in rule["spec"]["groups"][0]["rules"]:
        assert 'namespace="default"' in alert["expr"], alert["alert"]
        assert (root / alert["annotations"]["runbook"]).is_file(), alert["alert"]


def test_alerts_and_scaling_ask_for_metrics_that_there_are(render: Render, root: Path) -> None:
    objects = render(VARIANTS["everything about it"])
    asked = (root / "charts/tidegate/files/alerts.yaml").read_text() + json.dumps(
        [o["spec"] for o in objects if o["kind"] == "ScaledObject"]
    )
    names = set(re.findall(r"\btidegate_[a-z_]+", asked))
    assert len(names) > 7
    assert names <= {metric.name for metric in metrics.DECLARED}


def test_nobody_may_connect_but_who_is_named(render: Render) -> None:
    objects = render(VARIANTS["everything about it"])
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    assert policies["tidegate-default"]["podSelector"]["matchLabels"] == {
        "app.kubernetes.io/name": "tidegate",
        "app.kubernetes.io/instance": "tidegate",
    }
    assert policies["tidegate-default"]["ingress"] == [] or policies["tidegate-default"]["ingress"] is None
    (gateway,) = policies["tidegate-gateway"]["ingress"]
    assert {"ipBlock": {"cidr": "10.0.0.0/8"}} in gateway["from"]


def test_a_pool_becomes_executors_of_its_app_and_queue(render: Render) -> None:
    objects = render(VARIANTS["all that is optional"])
    spec = named(objects, "StatefulSet", "tidegate-executor-orders")["spec"]
    pod = spec["template"]["spec"]
    assert pod["containers"][0]["args"] == ["executor", "--app", "orders:app", "--queue", "default", "--slots", "4"]
    assert spec["replicas"] == 2
    # The pod is given longer than the process gives itself.
    assert environment(pod)["TIDEGATE_EXECUTOR_DRAIN_S"]["value"] == "60"
    assert pod["terminationGracePeriodSeconds"] == 90
    other = named(objects, "StatefulSet", "tidegate-executor-other")["spec"]["template"]["spec"]
    assert environment(other)["A"]["value"] == "1"
    assert other["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]


@pytest.mark.parametrize(
    ("image", "pool_image", "expected"),
    [
        ({}, {}, "tidegate:0.1.0"),
        ({"tag": "t"}, {}, "tidegate:t"),
        ({"tag": "t"}, {"tag": "u"}, "tidegate:u"),
        ({"tag": "t"}, {"repository": "orders", "tag": "u"}, "orders:u"),
        ({"digest": "sha256:" + "1" * 64}, {}, "tidegate:0.1.0@sha256:" + "1" * 64),
        ({"digest": "sha256:" + "1" * 64}, {"repository": "orders", "tag": "u"}, "orders:u"),
        ({"digest": "sha256:" + "1" * 64}, {"tag": "u"}, "tidegate:u"),
    ],
)
def test_image_of_a_pool(render: Render, image: Object, pool_image: Object, expected: str) -> None:
    objects = render(MINIMAL | {"image": image, "executors": [POOL | {"image": pool_image}]})
    assert image_of(objects, "StatefulSet", "tidegate-executor-orders") == expected


def test_topics_are_made_before_the_pods_and_deleted_by_nothing(objects: list[Object], values: Object) -> None:
    hooks = {
        o["metadata"]["annotations"]["helm.sh/hook"]: o
        for o in objects
        if "helm.sh/hook" in o["metadata"].get("annotations", {})
    }
    commands = {hook: spec["containers"][0]["args"][:2] for hook, o in hooks.items() for _, spec in pod_specs([o])}
    assert set(commands) <= {"test", "pre-install,pre-upgrade"}
    in_development = values.get("dev", {}).get("kafka", {}).get("enabled", False)
    by_job = values.get("topics", {}).get("mode", "job") == "job" and not in_development
    assert commands.get("pre-install,pre-upgrade") == (["topics", "apply"] if by_job else None)


def test_topics_of_all_queues_are_made_as_the_values_say(render: Render) -> None:
    pools = [POOL | {"name": name, "queue": queue} for name, queue in (("a", "slow"), ("b", "fast"), ("c", "slow"))]
    values = MINIMAL | {"executors": pools, "topics": {"partitions": {"run": 16}}}
    variables = environment(named(render(values), "Job", "tidegate-topics")["spec"]["template"]["spec"])
    assert variables["TIDEGATE_TOPICS_QUEUES"]["value"] == "fast,slow,smoke"
    assert variables["TIDEGATE_TOPICS_PRODUCTION"]["value"] == "true"
    assert variables["TIDEGATE_TOPICS_PARTITIONS_RUN"]["value"] == "16"


def test_another_release_name_is_in_every_name(render: Render) -> None:
    for document in render(MINIMAL, release="blue"):
        assert document["metadata"]["name"].startswith("blue-tidegate")
