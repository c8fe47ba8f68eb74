"""Writes the generated manifests of this folder: `python k8s/render.py`. With `--check` it writes nothing and exits with 1
if a file is not what it would write.

tidegate.yaml and topics-job.yaml are the chart, rendered with helm/values-production.yaml, without what only Helm
understands. strimzi/topics.yaml is schemas/topics, for Strimzi's topic operator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import yaml

from tidegate.topics.declaration import load_topics, read_topic_files
from tidegate.topics.settings import TopicsSettings

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts/tidegate"
VALUES = ROOT / "helm/values-production.yaml"
RELEASE = "tidegate"

KAFKA_CLUSTER = "tidegate"  # the Kafka of strimzi/kafka.yaml
HEADER = "# Written by `python k8s/render.py` ({source}). Changes belong there.\n"
HOOK = "helm.sh/hook"


def rendered_chart(values: dict[str, Any], release: str = RELEASE) -> list[dict[str, Any]]:
    """Return the objects that Helm would make, hooks included, in a fixed order."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=release, namespace="default")
    texts = (text for name, text in sorted(files.items()) if not name.endswith("NOTES.txt"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def without_helm(document: dict[str, Any]) -> dict[str, Any]:
    """Return the object without the labels and annotations that only mean something to Helm."""
    metadata = dict(document["metadata"])
    metadata["labels"] = {
        name: value
        for name, value in metadata["labels"].items()
        if name not in {"helm.sh/chart", "app.kubernetes.io/managed-by"}
    }
    metadata.pop("annotations", None)
    return document | {"metadata": metadata}


def queues(values: dict[str, Any]) -> list[str]:
    """Return the queues that the pools of executors serve."""
    return sorted({pool["queue"] for pool in values["executors"]})


def kafka_topics(queue_names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield a KafkaTopic for every declared topic, as in production; one per queue where a topic has queues."""
    # Constructed so, the settings are the built-in ones, whatever is in this process's environment.
    settings = TopicsSettings.model_construct(production=True)
    for topic in load_topics(queue_names, settings, read_topic_files(ROOT / "schemas/topics")):
        yield {
            "apiVersion": "kafka.strimzi.io/v1",
            "kind": "KafkaTopic",
            "metadata": {"name": topic.name, "labels": {"strimzi.io/cluster": KAFKA_CLUSTER}},
            "spec": {
                "partitions": topic.partition_count,
                "replicas": topic.replication_factor,
                "config": dict(topic.config),
            },
        }


def manifests() -> dict[Path, str]:
    """Return the content of every generated file."""
    values = yaml.safe_load(VALUES.read_text())
    objects = rendered_chart(values)
    plain = [document for document in objects if HOOK not in document["metadata"].get("annotations", {})]
    jobs = [document for document in objects if document["kind"] == "Job"]
    chart = "from charts/tidegate and helm/values-production.yaml"
    return {
        ROOT / "k8s/tidegate.yaml": _text(chart, map(without_helm, plain)),
        ROOT / "k8s/topics-job.yaml": _text(chart, map(without_helm, jobs)),
        ROOT / "k8s/strimzi/topics.yaml": _text("from schemas/topics", kafka_topics(queues(values))),
    }


def _text(source: str, documents: Iterable[dict[str, Any]]) -> str:
    return HEADER.format(source=source) + yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=120)


def drifted() -> list[Path]:
    """Return the generated files that are missing or differ from what would be written."""
    return [path for path, text in manifests().items() if not path.exists() or path.read_text() != text]


def main(arguments: list[str]) -> int:
    """Write the files, or check them; returns the exit code."""
    if arguments == ["--check"]:
        for path in (stale := drifted()):
            sys.stderr.write(f"{path.relative_to(ROOT)} is not up to date: run `python k8s/render.py`\n")
        return 1 if stale else 0
    if arguments:
        sys.stderr.write("usage: render.py [--check]\n")
        return 2
    for path, text in manifests().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
