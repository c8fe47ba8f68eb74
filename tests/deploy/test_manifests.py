"""The manifests in k8s/ are what the chart and the declared topics say today; skaffold.yaml points at what is there."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml


def documents(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all(path.read_text()))
    return [document for document in found if kind in {None, document["kind"]}]


@pytest.mark.feature("K1")
def test_generated_manifests_are_up_to_date(render_script: ModuleType) -> None:
    assert render_script.drifted() == [], "run `python k8s/render.py`"


def test_a_changed_or_missing_manifest_is_noticed(
    render_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "changed.yaml").write_text("a: 1\n")
    expected = {tmp_path / "changed.yaml": "a: 2\n", tmp_path / "missing.yaml": "b: 1\n"}
    monkeypatch.setattr(render_script, "manifests", lambda: expected)
    monkeypatch.setattr(render_script, "chart_files", dict)
    monkeypatch.setattr(render_script, "ROOT", tmp_path)
    assert render_script.drifted() == list(expected)
    assert render_script.main(["--check"]) == 1
    assert render_script.main([]) == 0
    assert render_script.main(["--check"]) == 0


def test_plain_manifests_need_no_helm(root: Path) -> None:
    text = (root / "k8s/tidegate.yaml").read_text() + (root / "k8s/topics-job.yaml").read_text()
    assert "helm.sh" not in text
    assert "managed-by" not in text
    kinds = {document["kind"] for document in documents(root / "k8s/tidegate.yaml")}
    assert kinds == {
        "Service",
        "StatefulSet",
        "Deployment",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "ConfigMap",
        "PodMonitor",
        "PrometheusRule",
    }


def test_every_declared_topic_is_a_strimzi_topic(root: Path) -> None:
    declared = {path.stem: yaml.safe_load(path.read_text()) for path in (root / "schemas/topics").glob("*.yaml")}
    topics = {
        document["metadata"]["name"]: document
        for document in documents(root / "k8s/strimzi/tidegate.yaml", "KafkaTopic")
    }
    assert {name.partition(".")[0] for name in topics} == set(declared)
    for name, topic in topics.items():
        declaration = declared[name.partition(".")[0]]
        spec = topic["spec"]
        assert declaration["config"].items() <= spec["config"].items()
        assert spec["config"]["min.insync.replicas"] == "2"
        assert spec["replicas"] == 3
        # Global tables rest on having one partition.
        assert (spec["partitions"] == 1) == (declaration["partition_group"] in {"table", "dead"})


def test_topics_of_one_group_have_one_partition_count(root: Path) -> None:
    declared = {path.stem: yaml.safe_load(path.read_text()) for path in (root / "schemas/topics").glob("*.yaml")}
    counts: dict[str, set[int]] = {}
    for document in documents(root / "k8s/strimzi/tidegate.yaml", "KafkaTopic"):
        group = declared[document["metadata"]["name"].partition(".")[0]]["partition_group"]
        counts.setdefault(group, set()).add(document["spec"]["partitions"])
    assert all(len(found) == 1 for found in counts.values()), counts


def test_kafka_of_strimzi_is_the_one_that_is_meant(root: Path) -> None:
    pool, kafka = documents(root / "k8s/strimzi/kafka.yaml")
    assert pool["metadata"]["labels"] == {"strimzi.io/cluster": kafka["metadata"]["name"]}
    topics = documents(root / "k8s/strimzi/tidegate.yaml", "KafkaTopic")
    assert {topic["metadata"]["labels"]["strimzi.io/cluster"] for topic in topics} == {kafka["metadata"]["name"]}
    assert kafka["spec"]["kafka"]["config"]["auto.create.topics.enable"] is False
    # No topic can have more replicas than there are nodes.
    assert kafka["spec"]["kafka"]["config"]["default.replication.factor"] == pool["spec"]["replicas"]


def test_strimzi_values_point_at_that_kafka(root: Path) -> None:
    kafka = documents(root / "k8s/strimzi/kafka.yaml")[1]
    listeners = {str(listener["port"]): listener for listener in kafka["spec"]["kafka"]["listeners"]}
    values = yaml.safe_load((root / "helm/values-strimzi.yaml").read_text())
    host, _, port = values["kafka"]["bootstrap"].partition(":")
    assert host == f"{kafka['metadata']['name']}-kafka-bootstrap"
    assert listeners[port]["tls"] is True
    assert listeners[port]["authentication"]["type"] == values["topics"]["strimzi"]["authentication"]
    assert kafka["spec"]["kafka"]["authorization"]["type"] == "simple"
    assert {"topicOperator", "userOperator"} <= set(kafka["spec"]["entityOperator"])


@pytest.mark.feature("K1")
def test_skaffold_points_at_what_is_there(root: Path) -> None:
    config = yaml.safe_load((root / "skaffold.yaml").read_text())
    (artifact,) = config["build"]["artifacts"]
    dockerfile = root / artifact["context"] / artifact["docker"]["dockerfile"]
    # The Kafka and the ClickHouse of the development profile are in that stage alone.
    assert f" AS {artifact['docker']['target']}\n" in dockerfile.read_text()
    assert artifact["docker"]["target"] == "embedded"
    (release,) = config["deploy"]["helm"]["releases"]
    assert (root / release["chartPath"] / "Chart.yaml").is_file()
    assert release["valuesFiles"] == ["helm/values-dev.yaml"]
    assert all((root / path).is_file() for path in release["valuesFiles"])
    defaults = yaml.safe_load((root / release["chartPath"] / "values.yaml").read_text())
    for path, template in release["setValueTemplates"].items():
        group, _, key = path.partition(".")
        assert key in defaults[group], path
        assert f"_{artifact['image']}}}}}" in template
